"""The exercises of docs/tour.md, solved. Solve them first, then read on."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lingen
import mamba2_ref
import sample
import scan
import tesa
import train_tiny
from toy import judge, shapes


def test_1_a_fifth_scan_order(monkeypatch):
    """Three axes can be nested in six ways, of which RMS takes four. A fifth is one line."""
    monkeypatch.setitem(scan.AXES, "row-time", "h t w")
    grid = torch.randn(2, 3, 4, 5, 6)
    seq = scan.to_sequence(grid, "row-time")
    assert torch.equal(seq[:, 1 * 3 * 5 + 2 * 5 + 3], grid[:, 2, 1, 3])  # y*T*W + t*W + x
    places = scan.places("row-time", (4, 8, 8))
    assert [places.diff(dim=axis).unique().tolist() for axis in range(3)] == [[8], [32], [1]]


@pytest.mark.parametrize("window, layers", [((4, 4, 4), 5), ((2, 8, 4), 9), ((8, 4, 2), 5)])
def test_2_windows_of_another_form(window, layers):
    """Windows carry information by half a window a layer, along each axis."""
    reached = torch.zeros(16, 8, 8, dtype=torch.bool)
    reached[8, 4, 4] = True
    for layer in range(layers):
        assert not reached.all()
        number = tesa.windows((16, 8, 8), window, [size // 2 * (layer % 2) for size in window])
        reached = torch.isin(number, number[reached])
    assert reached.all()


def test_3_half_life():
    """A head forgets half in ln 2 / (dt |A|) tokens: read it off an impulse."""
    dt, A, ones = 0.05, -0.5, torch.ones(1, 200, 1, 1)
    x, steps = torch.eye(1, 200)[..., None, None], torch.full((1, 200, 1), dt)  # an impulse
    y = mamba2_ref.ssd_recurrent(x, steps, torch.tensor([A]), ones, ones)[0, :, 0, 0]
    assert y[28] < y[0] / 2 < y[27] and 27 < math.log(2) / (dt * -A) < 28
    assert y[199] / y[0] == pytest.approx(math.exp(199 * dt * A), rel=1e-4)


def test_4_the_skip():
    """D x goes past the state: y changes by D x alone, and the final state does not change."""
    x, B, C = torch.randn(1, 50, 4, 8), torch.randn(1, 50, 1, 16), torch.randn(1, 50, 1, 16)
    inputs, D = (x, torch.rand(1, 50, 4), -torch.rand(4), B, C), torch.tensor([0.0, 1.0, 2.0, 3.0])
    plain, state = mamba2_ref.ssd_chunked(*inputs, return_final_states=True)
    y, same = mamba2_ref.ssd_chunked(*inputs, D=D, return_final_states=True)
    torch.testing.assert_close(y, plain + D[:, None] * x)
    assert torch.equal(state, same)


def test_5_without_the_mask(monkeypatch):
    """The roll puts the end of the clip beside its beginning. The mask keeps them apart."""
    torch.manual_seed(0)
    layer = tesa.TemporalSwinAttention(16, 2, (4, 4, 4), (2, 0, 0))
    grid = torch.randn(1, 8, 4, 4, 16)
    changed = grid.clone()
    changed[:, 0] += 1

    def frames_that_hear():
        change = (layer(changed) - layer(grid)).abs().amax((0, 2, 3, 4))
        return (change > 1e-6).nonzero()[:, 0].tolist()

    assert frames_that_hear() == [0, 1]
    monkeypatch.setattr(tesa, "window_mask", lambda *_: None)
    assert frames_that_hear() == [0, 1, 6, 7]


def test_6_without_review_tokens():
    """The state fades, the overview does not: with it a token hears the end of a long clip."""
    torch.manual_seed(0)
    model = lingen.MATE(lingen.preset("tiny", tesa=False, backend="torch"))
    grid = torch.randn(1, 64, 6, 6, 128, requires_grad=True)

    def heard():  # how much the first token's output moves with each frame of tokens: (64,)
        (gradient,) = torch.autograd.grad(model(grid)[0, 0, 0, 0].square().sum(), grid)
        return gradient.square().sum((0, 2, 3, 4)).sqrt()

    with_review = heard()
    model.pool = None  # the same weights without an overview
    without = heard()
    assert with_review[0] == pytest.approx(without[0].item(), rel=0.2)
    assert with_review[32] > 1e3 * without[32] and with_review[63] > 0.01 and without[63] < 1e-9


def test_7_where_the_dit_overtakes():
    """Twice the frames cost MATE twice the operations; full attention has a quadratic term."""
    def operations(mixer, frames):
        config = lingen.preset("tiny", mixer=mixer, depth=1, backend="torch")
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            clip, text = torch.empty(1, 3, frames, 24, 24), torch.zeros(1, 5, dtype=torch.long)
            lingen.LinGen(config)(clip, torch.empty(1), text)
        return counter.get_total_flops()

    frames = (16, 64, 256, 512)  # 18 tokens a frame
    mate, dit = ([operations(mixer, n) for n in frames] for mixer in ("mate", "attention"))
    assert mate[3] / mate[2] == pytest.approx(2, rel=0.02) and dit[3] / dit[2] > 3
    assert dit[0] < mate[0] and dit[1] > mate[1]  # between 288 and 1152 tokens


def test_8_heun_instead_of_euler():
    """Data of one number, normal with deviation s: the flow is known, x(1) = s x(0)."""
    s = 0.1
    def velocity(x, t):
        return (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2) * x

    def error(steps, heun):
        x, times = torch.ones(()).double(), sample.times(steps).double()
        for t, t_next in zip(times, times[1:]):
            v = velocity(x, t)
            if heun:  # the mean of the velocities at both ends of the step
                v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
            x = x + (t_next - t) * v
        return abs(x.item() - s)

    assert 1.5 < error(100, False) / error(200, False) < 2.5  # first order
    assert 3 < error(100, True) / error(200, True) < 5  # second order
    assert error(50, True) < error(100, False)  # for the same number of calls


def test_9_another_shape(monkeypatch):
    """A diamond in place of the cross. Data, captions and judge share one drawing."""
    draw_four = shapes.draw_shapes

    def draw(centre, size=shapes.SIZE):
        x, y = (shapes.wrap(torch.arange(size) - centre[:, i : i + 1], size).abs() for i in (0, 1))
        distance = (x[:, None, :] + y[:, :, None]) / math.sqrt(2) - 0.9 * shapes.RADIUS
        return torch.cat([draw_four(centre, size)[:, :3], (0.5 - distance).clamp(0, 1)[:, None]], 1)

    monkeypatch.setattr(shapes, "SHAPES", (*shapes.SHAPES[:3], "diamond"))
    monkeypatch.setattr(shapes, "draw_shapes", draw)
    monkeypatch.setattr(judge, "draw_shapes", draw)
    spec = torch.tensor([[0, 3, 0]])
    assert shapes.caption(spec[0]) == "a red diamond moving right"
    clip = shapes.render(spec, torch.tensor([[8.0, 16.0]]), 16)
    specs = torch.tensor([[0, 3, 0], [0, 3, 1], [0, 0, 0]])  # as told, moving left, a circle
    verdict = judge.judge(clip.expand(3, -1, -1, -1, -1), specs)
    assert verdict["strict"].tolist() == [True, False, False]


def test_10_your_own_gifs(monkeypatch, tmp_path):
    """Files that are named by their captions take the place of the toy's clips."""
    specs = torch.tensor([[1, 1, 3], [0, 0, 0]])  # in the order of their names
    drawn = shapes.render(specs, torch.full((2, 2), 8.0), 16)
    for spec, clip in zip(specs, drawn):
        sample.write_clip(tmp_path / f"{shapes.caption(spec)}.gif", sample.to_frames(clip))
    files = sorted(tmp_path.glob("*.gif"))
    clips = torch.stack([sample.read_frames(file, 24, 24) for file in files])
    assert (clips - drawn).abs().max() < 0.1  # a GIF has 256 colours

    def batch(n, frames, generator, **options):
        chosen = torch.randint(len(files), (n,), generator=generator)
        return clips[chosen, :, :frames], [files[i].stem for i in chosen], None

    monkeypatch.setattr(shapes, "make_batch", batch)
    run = train_tiny.Run(lingen.preset("tiny", depth=1), dict(steps=300, seed=0, rate=3e-3), "cpu")
    losses = [run.advance() for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5]) / 2
