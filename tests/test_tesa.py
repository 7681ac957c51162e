"""tesa.py against brute force: one dense softmax over the whole grid, masked by walked windows."""

import itertools
import math
import runpy

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import tesa
from tesa import TemporalSwinAttention

CASES = [  # grid, window, shift
    ((4, 4, 4), (2, 2, 2), (0, 0, 0)),
    ((8, 4, 4), (4, 2, 2), (2, 0, 1)),
    ((8, 4, 4), (4, 2, 2), (3, 1, 0)),  # not half a window
    ((5, 3, 7), (2, 2, 3), (0, 0, 0)),  # nothing divides
    ((5, 3, 7), (2, 2, 3), (1, 1, 1)),
    ((5, 5, 5), (4, 4, 4), (2, 2, 2)),  # windows of padding alone
    ((3, 3, 5), (4, 8, 3), (2, 4, 1)),  # larger than the grid
    ((4, 2, 2), (4, 2, 2), (2, 1, 1)),  # as large as the grid
    ((1, 4, 6), (4, 2, 2), (2, 1, 1)),  # one frame
    ((1, 1, 1), (2, 2, 2), (1, 1, 1)),
    ((3, 4, 2), (1, 1, 1), (0, 0, 0)),  # each token alone
    ((6, 1, 5), (1, 3, 2), (0, 2, 1)),
    ((9, 8, 5), (5, 8, 8), (2, 4, 4)),  # many keys, for which a fused kernel serves
]
CUT, PADDED, STILL = (CASES[i] for i in (4, 5, 8))


def walk(i, size, window, shift):
    """The window of place i on one axis, found by walking: the first border is at `shift`."""
    if window >= size:
        return 0
    number, border = 0, shift or window
    while border <= i:
        number, border = number + 1, border + window
    return number


def allowed(shape, window, shift):
    """Who may attend to whom: bool (l, l)."""
    axes = list(zip(shape, window, shift))
    tokens = itertools.product(*map(range, shape))
    places = [[walk(i, *axis) for i, axis in zip(token, axes)] for token in tokens]
    return torch.tensor([[a == c for c in places] for a in places])


def turn(x, shape):
    """RoPE by complex numbers, at places of the grid: x (b, l, n, e) -> (b, l, n, e / 2)."""
    pairs = x.shape[-1] // 2
    place = torch.tensor(list(itertools.product(*map(range, shape))), dtype=torch.float64)
    angles = torch.empty(len(place), pairs, dtype=torch.float64)
    for pair in range(pairs):  # the axes take turns
        wavelength = 2 * 8 ** ((pair // 3 + 0.5) / math.ceil(pairs / 3))  # from 2 up to 16 tokens
        angles[:, pair] = 2 * torch.pi / wavelength * place[:, pair % 3]
    z = torch.complex(x[..., :pairs], x[..., pairs:])
    return z * torch.polar(torch.ones_like(angles), angles)[:, None]


def dense(layer, grid):
    """The layer as full attention with a mask."""
    b, *shape, d = grid.shape
    n = layer.nheads
    q, k, v = layer.qkv(grid.reshape(b, -1, d)).reshape(b, -1, 3, n, d // n).unbind(2)
    scores = torch.einsum("binc,bjnc->bnij", turn(q, shape), turn(k, shape).conj()).real
    mask = allowed(shape, layer.window, layer.shift)
    scores = (scores / (d // n) ** 0.5).masked_fill(~mask, -math.inf)
    out = torch.einsum("bnij,bjnc->binc", scores.softmax(-1), v)
    return layer.proj(out.reshape(b, *shape, d))


def new_layer(window=(2, 2, 2), shift=(1, 1, 1), d=28, nheads=2, dtype=torch.float64):
    torch.manual_seed(0)
    layer = TemporalSwinAttention(d, nheads, window, shift)
    torch.nn.init.normal_(layer.qkv.weight, std=0.3)  # large enough that a wrong angle shows
    return layer.to(dtype)


def random_grid(*shape, d=28):
    torch.manual_seed(1)
    return torch.randn(*shape, d, dtype=torch.float64, requires_grad=True)


def assert_same(got, want, layer, grid):
    """Equal values, and equal gradients of the input and of every weight."""
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    wrt = [grid, *layer.parameters()]
    pull = torch.randn_like(want)
    for a, c in zip(torch.autograd.grad(got, wrt, pull), torch.autograd.grad(want, wrt, pull)):
        torch.testing.assert_close(a, c, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape, window, shift", CASES)
def test_values_and_gradients_equal_dense_masked_attention(shape, window, shift):
    layer, grid = new_layer(window, shift), random_grid(2, *shape)
    for each, wanted in zip(layer(grid)[0].flatten(0, 2).sum(-1), allowed(shape, window, shift)):
        (grad,) = torch.autograd.grad(each, grid, retain_graph=True)  # who is heard
        assert torch.equal(grad[0].flatten(0, 2).any(-1), wanted)
    assert_same(layer(grid), dense(layer, grid), layer, grid)
    moved = layer(grid, 2 * window[0] + 1)  # offset is added to the shift along time
    layer.shift = ((shift[0] + 1) % window[0], *shift[1:])
    assert_same(moved, dense(layer, grid), layer, grid)


def test_every_even_width_of_a_head_serves():
    for d in (2, 4, 6, 8, 32):
        layer, grid = new_layer(d=d, nheads=1), random_grid(1, 3, 4, 5, d=d)
        assert_same(layer(grid), dense(layer, grid), layer, grid)


def test_tokens_of_one_window_have_one_number_and_whole_windows_no_mask():
    for shape, window, shift in CASES:
        number = tesa.windows(shape, window, shift)
        assert number.shape == shape and number.dtype == torch.int64
        number = number.flatten()
        assert torch.equal(number[:, None] == number, allowed(shape, window, shift))
        window, shift = tesa.fit(shape, window, shift)
        whole = (number.unique(return_counts=True)[1] == math.prod(window)).all()
        assert (tesa.window_mask(shape, window, shift) is None) == whole


@pytest.mark.parametrize("name, atol", [("float32", 1e-5), ("bfloat16", 0.1), ("float16", 0.02)])
@pytest.mark.parametrize("shape, window, shift", [CUT, PADDED, STILL])
def test_lower_precision_and_autocast_come_close(shape, window, shift, name, atol):
    dtype, grid = getattr(torch, name), random_grid(2, *shape)
    want = new_layer(window, shift)(grid)
    out = new_layer(window, shift, dtype=dtype)(grid.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=0, atol=atol)
    with torch.autocast("cpu", dtype, enabled=name != "float32"):
        out = new_layer(window, shift, dtype=torch.float32)(grid.float())
    torch.testing.assert_close(out.double(), want, rtol=0, atol=atol)


def test_compiled_equals_eager_and_fake_meta_exported_and_inference_tensors_leave_nothing_behind():
    for nowhere in (FakeTensorMode(), torch.device("meta")):
        with nowhere:
            TemporalSwinAttention(28, 2, (2, 2, 2), (1, 1, 1))(torch.empty(1, 5, 3, 4, 28))
    layer, grid = new_layer((2, 2, 3)), random_grid(2, 5, 3, 7)
    torch.export.export(layer, (grid,))
    with torch.inference_mode():
        layer(grid)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for each in (layer, compiled):
        assert_same(each(grid, 2), dense(layer, grid), layer, grid)


def test_cost_is_linear_in_the_frames():
    cost = []
    for frames in (8, 16, 32):
        with FlopCounterMode(display=False) as counter:
            new_layer((4, 4, 4), (2, 2, 2))(random_grid(1, frames, 8, 8))
        cost.append(counter.get_total_flops())
    assert cost[0] > 0 and cost == [cost[0], 2 * cost[0], 4 * cost[0]]


def test_wrong_widths_windows_and_shifts_raise():
    for d in (10, 9):  # 9 gives odd heads
        with pytest.raises(ValueError, match=f"d_model={d} is not a multiple"):
            TemporalSwinAttention(d, 3)
    for shift in ((2, 0, 0), (0, 0, -1), (0, 0, 2)):
        with pytest.raises(ValueError, match="not within the window"):
            TemporalSwinAttention(12, 3, (2, 2, 2), shift)
    pytest.raises(ValueError, TemporalSwinAttention, 12, 3, (2, 2), (0, 0, 0))


def test_the_script_prints_how_the_receptive_field_grows(capsys):
    runpy.run_path(tesa.__file__, run_name="__main__")
    layers = [line for line in capsys.readouterr().out.splitlines() if line.startswith("layer")]
    assert "64 tokens, 4 x 4 x 4" in layers[0] and "1024 tokens, 16 x 8 x 8" in layers[-1]
