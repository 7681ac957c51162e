"""tesa.py against brute force: one dense softmax over the whole grid, masked by windows counted by hand."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import tesa
from tesa import TemporalSwinAttention

CASES = [  # grid, window, shift
    ((4, 4, 4), (2, 2, 2), (0, 0, 0)),
    ((4, 4, 4), (2, 2, 2), (1, 1, 1)),
    ((8, 4, 4), (4, 2, 2), (2, 0, 1)),
    ((8, 4, 4), (4, 2, 2), (3, 1, 0)),  # not half a window
    ((5, 3, 7), (2, 2, 3), (0, 0, 0)),  # nothing divides
    ((5, 3, 7), (2, 2, 3), (1, 1, 1)),
    ((5, 5, 5), (4, 4, 4), (2, 2, 2)),  # windows of padding alone
    ((5, 4, 4), (4, 4, 4), (3, 0, 0)),
    ((3, 3, 5), (4, 8, 3), (2, 4, 1)),  # larger than the grid
    ((4, 2, 2), (4, 2, 2), (2, 1, 1)),  # as large as the grid
    ((1, 4, 6), (4, 2, 2), (2, 1, 1)),  # a still image
    ((1, 1, 1), (2, 2, 2), (1, 1, 1)),
    ((3, 4, 2), (1, 1, 1), (0, 0, 0)),  # each token alone
    ((6, 1, 5), (1, 3, 2), (0, 2, 1)),
]


def piece(i, size, window, shift):
    """The window of place i on one axis, found by walking: the first border is at `shift`."""
    if window >= size:
        return 0
    number, border = 0, shift or window
    while border <= i:
        number, border = number + 1, border + window
    return number


def together(a, b, shape, window, shift):
    return all(piece(i, *axis) == piece(j, *axis) for i, j, axis in zip(a, b, zip(shape, window, shift)))


def tokens(shape):
    return list(itertools.product(*map(range, shape)))


def brute_force(layer, grid, drift=None):
    b, *shape, d = grid.shape
    n, e, every = layer.nheads, d // layer.nheads, tokens(shape)
    q, k, v = layer.qkv(grid.reshape(b, -1, d)).reshape(b, -1, 3, n, e).unbind(2)
    odd = torch.einsum("bin,bjn->bnij", q[..., -1], k[..., -1]) if e % 2 else 0     # an odd feature is not turned
    # Rotary positions by hand: a pair of features as one complex number, turned by its place in the *grid*. That the
    # layer turns by the place in the window must not matter, since only differences count.
    pairs = e // 2
    axes = [[1, 2, 1, 2, 1, 2, 1, 0, 2, 1, 2, 1][pair] if layer.travel else pair % 3 for pair in range(pairs)]
    place = torch.tensor(every, dtype=torch.float64)[None, :, None].expand(b, -1, n, -1)        # (b, tokens, n, 3)
    if drift is not None:    # as seen from a frame of reference that moves
        place = torch.cat([place[..., :1], place[..., 1:] - place[..., :1] * drift[:, None]], -1)
    turn = torch.ones(b, len(every), n, pairs, dtype=torch.complex128)
    for pair, axis in enumerate(axes):
        wave = torch.pi * 2 ** (-3 * (axes[:pair].count(axis) + 0.5) / axes.count(axis))
        turn[..., pair] = torch.polar(torch.ones_like(place[..., 0]), place[..., axis] * wave)
    q, k = (torch.complex(z[..., :pairs], z[..., pairs : 2 * pairs]) * turn for z in (q, k))
    scores = (torch.einsum("binc,bjnc->bnij", q, k.conj()).real + odd) / e**0.5
    extra = torch.full((n, len(every), len(every)), float("-inf"), dtype=grid.dtype)
    for i, a in enumerate(every):
        for j, c in enumerate(every):
            if together(a, c, shape, layer.window, layer.shift):
                extra[:, i, j] = 0
    out = torch.einsum("bnij,bjnc->binc", (scores + extra).softmax(-1), v)
    return layer.proj(out.reshape(b, *shape, d))


def layer_for(window, shift, d=12, n=3, dtype=torch.float64):
    torch.manual_seed(0)
    layer = TemporalSwinAttention(d, n, window, shift).to(dtype)
    torch.nn.init.normal_(layer.qkv.weight, std=0.5)  # large enough that a wrong angle shows
    return layer


@pytest.mark.parametrize("shape, window, shift", CASES)
def test_values_and_gradients_are_those_of_masked_full_attention(shape, window, shift):
    layer = layer_for(window, shift)
    grid = torch.randn(2, *shape, 12, dtype=torch.float64, requires_grad=True)
    got, want = layer(grid), brute_force(layer, grid)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    weight, wrt = torch.randn_like(got), [grid, *layer.parameters()]
    for a, c in zip(torch.autograd.grad((got * weight).sum(), wrt), torch.autograd.grad((want * weight).sum(), wrt)):
        torch.testing.assert_close(a, c, rtol=0, atol=1e-11)  # finite too, wherever padding fills a window
    with torch.no_grad():  # without gradients another kernel may serve
        torch.testing.assert_close(layer(grid), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape, window, shift", CASES)
def test_window_numbers(shape, window, shift):
    number = tesa.windows(shape, window, shift)
    assert number.shape == shape and number.unique().tolist() == list(range(int(number.max()) + 1))
    for a, c in itertools.product(tokens(shape), repeat=2):
        assert (number[a] == number[c]) == together(a, c, shape, window, shift)


@pytest.mark.parametrize("shape, window, shift", [CASES[3], CASES[5], CASES[8]])
def test_reach_by_gradient(shape, window, shift):
    layer = layer_for(window, shift)
    for a in tokens(shape):
        grid = torch.randn(1, *shape, 12, dtype=torch.float64, requires_grad=True)
        layer(grid)[(0, *a)].sum().backward()
        for c in tokens(shape):
            assert bool(grid.grad[(0, *c)].any()) == together(a, c, shape, window, shift)


def test_two_layers_cross_the_border_of_one():
    even, odd = layer_for((4, 2, 2), (0, 0, 0)), layer_for((4, 2, 2), (2, 0, 0))
    grid = torch.randn(1, 12, 2, 2, 12, dtype=torch.float64, requires_grad=True)
    odd(even(grid))[0, 4].sum().backward()  # window 2..5 of the odd layer, 0..7 of the even one behind it
    assert [bool(frame.any()) for frame in grid.grad[0]] == [True] * 8 + [False] * 4


def test_whole_windows_need_no_mask_and_tables_are_made_once():
    cpu = torch.device("cpu")
    assert tesa.window_mask((8, 4, 4), (4, 2, 2), (0, 0, 0), cpu) is None
    assert tesa.window_mask((3, 4, 2), (4, 8, 2), (2, 4, 1), cpu) is None  # cut to the grid, shift dropped
    mask = tesa.window_mask((8, 4, 4), (4, 2, 2), (2, 1, 1), cpu)
    assert mask.shape == (8, 16, 16) and mask is tesa.window_mask((8, 4, 4), (4, 2, 2), (2, 1, 1), cpu)
    assert tesa.rotation((4, 2, 2), 8, torch.float32, cpu) is tesa.rotation((4, 2, 2), 8, torch.float32, cpu)


def test_on_a_torus_who_moves_the_grid_around_moves_the_output():
    """With and without: rows and columns that go around are equivariant to every roll, and only they are."""
    grid = torch.randn(1, 5, 4, 6, 12, dtype=torch.float64)
    for window, torus, rolls in (((2, 4, 6), True, (True, True)), ((2, 9, 8), True, (True, True)), ((2, 4, 3), True, (True, False)),
                                 ((2, 4, 6), False, (False, False))):
        torch.manual_seed(0)
        for travel in (False, True):
            layer = TemporalSwinAttention(12, 2, window, (1, 0, 0), torus, travel).double()
            for axis, by, holds in ((2, 1, rolls[0]), (2, -2, rolls[0]), (3, 1, rolls[1]), (3, 4, rolls[1]), (1, 1, False)):
                moved = layer(grid.roll(by, axis))
                assert torch.allclose(moved, layer(grid).roll(by, axis)) == holds, (window, torus, travel, axis, by)
    # However narrow a head is, moments differ, and so do rows.
    for e, travel in itertools.product((4, 8, 12, 16, 32), (False, True)):
        angles, *_ = tesa.rotation((2, 2, 1), e, torch.float64, torch.device("cpu"), travel=travel)
        assert (angles[0] - angles[1]).abs().max() > 0.5 and (angles[0] - angles[2]).abs().max() > 0.5, (e, travel)
    # Every offset around the torus has an angle of its own, or a query could not tell where to look.
    angles, *_ = tesa.rotation((1, 8, 1), 32, torch.float64, torch.device("cpu"), (False, True, False))
    turned = torch.cat([angles.cos(), angles.sin()], 1)
    assert (torch.cdist(turned, turned) + 9 * torch.eye(8)).min() > 1


@pytest.mark.parametrize("shape, window, shift", [CASES[2], CASES[5], CASES[8], CASES[10]])
@pytest.mark.parametrize("travel", [False, True])
def test_positions_that_move_are_those_of_a_frame_of_reference_that_moves(shape, window, shift, travel):
    torch.manual_seed(0)
    layer = TemporalSwinAttention(46, 2, window, shift, travel=travel).double()  # 11 pairs and an odd feature
    torch.nn.init.normal_(layer.qkv.weight, std=0.3)
    grid, drift = torch.randn(2, *shape, 46, dtype=torch.float64, requires_grad=True), torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    got, want = layer(grid, drift), brute_force(layer, grid, drift)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    weight, wrt = torch.randn_like(got), [grid, drift, *layer.parameters()]
    for a, c in zip(torch.autograd.grad((got * weight).sum(), wrt), torch.autograd.grad((want * weight).sum(), wrt)):
        torch.testing.assert_close(a, c, rtol=0, atol=1e-11)
    torch.testing.assert_close(layer(grid), layer(grid, 0 * drift), rtol=0, atol=1e-14)
    torch.testing.assert_close(layer.float()(grid.float(), drift), got.float(), rtol=0, atol=1e-4)


def test_what_flies_along_is_seen_as_if_it_stood_still():
    """On a torus, a grid that moves by whole tokens a step under positions that move with it: the output moves, no more."""
    layer = TemporalSwinAttention(32, 2, (4, 5, 6), torus=True, travel=True).double()
    grid, drift = torch.randn(1, 4, 5, 6, 32, dtype=torch.float64), torch.tensor([[[1.0, -2.0]] * 2], dtype=torch.float64)

    def moved(x):
        return torch.stack([frame.roll((i, -2 * i), (1, 2)) for i, frame in enumerate(x.unbind(1))], 1)

    torch.testing.assert_close(layer(moved(grid), drift), moved(layer(grid)), rtol=0, atol=1e-12)
    assert not torch.allclose(layer(moved(grid)), moved(layer(grid)))


def test_a_new_layer_that_travels_looks_at_its_own_place_at_all_moments():
    layer = TemporalSwinAttention(128, 4, (4, 8, 8), torus=True, travel=True)
    torch.nn.init.zeros_(layer.qkv.weight)
    maps, attend = [], tesa.attend
    tesa.attend = lambda q, k, v, mask: maps.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)) or attend(q, k, v, mask)
    try:
        layer(torch.zeros(1, 4, 8, 8, 128), torch.tensor([[[1.0, -2.0]] * 4]))
    finally:
        tesa.attend = attend
    seen = maps[0][0, 3].view(4, 8, 8, 4, 8, 8)[1, 4, 4]  # by the token of moment 1 in the middle
    along = torch.stack([frame.roll((1 - i, 2 * i - 2), (0, 1)) for i, frame in enumerate(seen)])  # brought back to moment 1
    for frame in along:
        assert frame.argmax() == 4 * 8 + 4 and frame[4, 4] > 0.5 * frame.sum() > 0.05


def test_keys_begin_with_a_constant():
    bias = TemporalSwinAttention(12, 3).qkv.bias.view(3, 12)
    assert (bias[1] == 1).all() and (bias[[0, 2]].abs() < 1).all()


def test_places_are_not_rounded_to_half_precision():
    layer = TemporalSwinAttention(64, 2, (4, 8, 8), travel=True)
    torch.nn.init.normal_(layer.qkv.weight, std=0.3)
    layer, grid, drift = layer.half(), torch.randn(1, 4, 8, 8, 64).half(), torch.tensor([[[1.9, -2.1], [0.3, 1.7]]])
    got = layer(grid, drift).double()
    torch.testing.assert_close(got, layer.double()(grid.double(), drift), rtol=0, atol=0.05)


def test_cost_is_linear_in_the_frames():
    from torch.utils.flop_counter import FlopCounterMode

    layer, cost = layer_for((4, 4, 4), (2, 2, 2), dtype=torch.float32), []
    for frames in (8, 16, 32):
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(1, frames, 8, 8, 12))
        cost.append(counter.get_total_flops())
    assert cost[0] > 0 and cost == [cost[0], 2 * cost[0], 4 * cost[0]]


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 1e-2)])
def test_dtypes(dtype, close):
    for shape, window, shift in (CASES[5], CASES[6], CASES[10]):
        exact = layer_for(window, shift)
        grid = torch.randn(2, *shape, 12, dtype=torch.float64)
        out = layer_for(window, shift).to(dtype)(grid.to(dtype))
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact(grid), rtol=0, atol=close)
    with torch.autocast("cpu", torch.bfloat16):  # weights in float32, queries in bfloat16
        assert layer_for((2, 2, 2), (1, 1, 1), dtype=torch.float32)(torch.randn(1, 4, 4, 4, 12)).isfinite().all()


def test_inference_first_and_training_later():
    tesa.window_mask.cache_clear()
    tesa.rotation.cache_clear()
    layer = layer_for((2, 2, 2), (1, 1, 1))
    grid = torch.randn(1, 5, 3, 4, 12, dtype=torch.float64)
    with torch.inference_mode():
        first = layer(grid)
    layer(grid).sum().backward()
    assert layer.qkv.weight.grad.isfinite().all()
    torch.testing.assert_close(layer(grid).detach(), first.clone())


def test_other_places():
    with torch.device("meta"):
        layer = TemporalSwinAttention(12, 3, (4, 4, 4), (2, 2, 2))
        assert layer(torch.empty(2, 5, 6, 7, 12)).shape == (2, 5, 6, 7, 12)
    # What was made for the meta device must not be handed to the CPU.
    assert layer_for((4, 4, 4), (2, 2, 2))(torch.randn(2, 5, 6, 7, 12, dtype=torch.float64)).isfinite().all()
    strided = torch.randn(1, 12, 4, 4, 4, dtype=torch.float64).permute(0, 2, 3, 4, 1)
    layer = layer_for((2, 2, 2), (1, 1, 1))
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()))
    layer.eval()(torch.randn(0, 4, 4, 4, 12, dtype=torch.float64))  # an empty batch


def test_state_dict():
    layer = layer_for((2, 3, 4), (0, 0, 0), dtype=torch.float32)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    linears = {"qkv.weight": (36, 12), "qkv.bias": (36,), "proj.weight": (12, 12), "proj.bias": (12,)}
    assert shapes == linears
    other = TemporalSwinAttention(12, 3, (2, 3, 4), (1, 1, 2))  # the shift is no weight: layers can be exchanged
    other.load_state_dict(layer.state_dict())
    grid = torch.randn(1, 2, 3, 4, 12)  # and one window covers this grid, shifted or not
    torch.testing.assert_close(other(grid), layer(grid))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((10, 3, (2, 2, 2), (0, 0, 0)), "multiple of nheads"),
        ((12, 0, (2, 2, 2), (0, 0, 0)), "nheads=0"),
        ((12, 3, (2, 0, 2), (0, 0, 0)), "at least 1"),
        ((12, 3, (2, 2), (0, 0, 0)), "three whole numbers"),
        ((12, 3, (2, 2, 2.0), (0, 0, 0)), "three whole numbers"),
        ((12, 3, (2, 2, 2), (0, True, 0)), "three whole numbers"),
        ((12, 3, (2, 2, 2), (2, 0, 0)), "0 <= shift < window"),
        ((12, 3, (2, 2, 2), (0, 0, -1)), "0 <= shift < window"),
    ],
)
def test_bad_settings(arguments, words):
    with pytest.raises(ValueError, match=words):
        TemporalSwinAttention(*arguments)


def test_bad_grids():
    layer = TemporalSwinAttention(12, 3)
    for shape in [(4, 4, 4, 12), (1, 4, 4, 4, 11), (1, 0, 4, 4, 12)]:
        with pytest.raises(ValueError, match="expected \\(b, t, h, w, 12\\)"):
            layer(torch.zeros(shape))
    for shape in [(4, 4), (0, 4, 4)]:
        with pytest.raises(ValueError, match="three sizes"):
            tesa.windows(shape, (2, 2, 2), (0, 0, 0))


def run(*arguments, folder):
    return subprocess.run([sys.executable, Path(tesa.__file__), *arguments], cwd=folder, capture_output=True, text=True)


def test_script(tmp_path):
    for grid, window in (("8 8 8", "4 4 4"), ("5 4 6", "4 3 8"), ("1 1 1", "2 2 2")):
        done = run("--grid", *grid.split(), "--window", *window.split(), folder=tmp_path)
        assert done.returncode == 0, done.stderr
        with Image.open(tmp_path / "tesa_windows.png") as img:
            assert img.width <= 1100 and len(img.getcolors(1 << 20)) > 10
    assert "64 of 512" in run(folder=tmp_path).stdout


def test_script_refuses_with_one_message(tmp_path):
    for bad in ("--grid 0 1 1", "--window 0 1 1", "--shift 4 0 0", "--grid 65 1 1"):
        done = run(*bad.split(), folder=tmp_path)
        assert done.returncode == 2 and "error:" in done.stderr and "Traceback" not in done.stderr
    for out in ("no/such/folder.png", "windows.nonsense"):
        done = run("--out", out, folder=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr and out in done.stderr
    assert not list(tmp_path.iterdir())
