"""The README's exercises, solved: each solution is a few lines, and its asserts show what one should see.

Solve them first, then read on. Numbers are those of the exercises.
"""
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lingen
import mamba2_ref
import sample
import scan
import tesa
import train_tiny
from benchmarks import judge


def test_1_a_fifth_scan_order(monkeypatch):
    """Three axes can be nested in six ways; Rotary Major Scan takes four. A fifth is one line."""
    monkeypatch.setitem(scan.AXES, "row-time", "h t w")             # y slowest, x fastest, time between
    grid = torch.randn(2, 3, 4, 5, 6)
    seq = scan.to_sequence(grid, "row-time")
    assert torch.equal(scan.to_grid(seq, "row-time", (3, 4, 5)), grid)
    assert torch.equal(seq[:, 1 * 3 * 5 + 2 * 5 + 3], grid[:, 2, 1, 3])                 # y*T*W + t*W + x
    along_t, along_y, along_x = (d.unique().tolist() for d in scan.distances("row-time", (4, 8, 8)))
    assert (along_t, along_y, along_x) == ([8], [32], [1])          # what the time is brought nearer, the rows are moved away


def test_2_which_tokens_hear():
    """Windows alone carry news by half a window per layer and side: so many layers until all have heard."""
    def layers(shape, window):
        half = tuple(size // 2 for size in window)
        pair = [tesa.windows(shape, window, shift) for shift in ((0, 0, 0), half)]
        return [int(heard.sum()) for heard in tesa.spread(shape, pair * 8)]
    assert layers((8, 8, 8), (4, 4, 4))[:3] == [64, 216, 512]
    thin = layers((16, 8, 8), (2, 8, 8))            # all of a frame, but only two tokens of time
    assert [n // 64 for n in thin[:4]] == [2, 4, 6, 8] and thin.index(16 * 64) == 8      # counted from 0: the ninth layer
    deep = layers((16, 8, 8), (8, 4, 4))            # as many tokens in a window, more of them in time: the third layer
    assert deep.index(16 * 64) == 2


def test_3_half_a_life():
    """A head forgets half in ln 2 / (dt |A|) tokens: read it off an impulse, walked token by token."""
    l, dt, A = 200, 0.05, -0.5
    x = torch.zeros(1, l, 1, 1)
    x[0, 0] = 1
    ones = torch.ones(1, l, 1, 1)
    y = mamba2_ref.ssd_recurrent(x, dt * torch.ones(1, l, 1), torch.tensor([A]), ones, ones)[0, :, 0, 0]
    half = math.log(2) / (dt * -A)                                  # 27.7 tokens
    assert y[28] < y[0] / 2 < y[27] and 27 < half < 28
    assert y[199] / y[0] == pytest.approx(0.5 ** (199 / half), rel=1e-4)            # and to 0.7 % after 200


def test_4_a_skip_per_head():
    """D x goes past the state: any form gives it, per head or per channel, and the final state does not change."""
    t = dict(x=torch.randn(1, 50, 4, 8), dt=torch.rand(1, 50, 4), A=-torch.rand(4), B=torch.randn(1, 50, 1, 16), C=torch.randn(1, 50, 1, 16))
    D = torch.tensor([0.0, 1.0, 2.0, 3.0])
    plain, state = mamba2_ref.ssd_chunked(**t, return_final_states=True)
    for skip in (D, D[:, None].expand(4, 8)):
        y, state_too = mamba2_ref.ssd_chunked(**t, D=skip, return_final_states=True)
        torch.testing.assert_close(y, plain + D[:, None] * t["x"])
        assert torch.equal(y[:, :, 0], plain[:, :, 0]) and torch.equal(state, state_too)


def test_5_without_the_mask(monkeypatch):
    """The roll puts the clip's end beside its beginning. Without the mask the last frame hears of the first."""
    torch.manual_seed(0)
    layer, grid = tesa.TemporalSwinAttention(16, 2, (4, 4, 4), (2, 0, 0)), torch.randn(1, 8, 4, 4, 16)
    changed = grid.clone()
    changed[:, 0] += 1

    def heard():                                                    # which frames hear of a change in frame 0
        return ((layer(changed) - layer(grid)).abs().amax((0, 2, 3, 4)) > 1e-6).nonzero()[:, 0].tolist()
    assert heard() == [0, 1]
    monkeypatch.setattr(tesa, "window_mask", lambda *_: None)
    assert heard() == [0, 1, 6, 7]


class TwoMamba2(nn.Module):
    """Both directions with weights of their own."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.forth, self.back = mamba2_ref.Mamba2(*args, **kwargs), mamba2_ref.Mamba2(*args, **kwargs)

    def forward(self, u):
        return self.forth(u) + self.back(u.flip(1)).flip(1)


def test_6_directions_that_share_nothing():
    """Twice the parameters, and nearly twice the work: what both need is no longer done once."""
    sizes = dict(d_model=128, d_state=32, headdim=32, expand=1, backend="torch")
    torch.manual_seed(0)
    shared, own, u = mamba2_ref.BidirectionalMamba2(**sizes).double(), TwoMamba2(**sizes).double(), torch.randn(1, 256, 128).double()
    parameters = [sum(p.numel() for p in layer.parameters()) for layer in (shared, own)]
    assert parameters[1] == 2 * parameters[0]
    work = []
    for layer in (shared, own):
        with FlopCounterMode(display=False) as count:
            layer(u)
        work.append(count.get_total_flops())
    assert 1.6 < work[1] / work[0] < 2
    moved = u.clone()
    moved[:, 100] += 1
    assert ((own(moved) - own(u)).abs().amax((0, 2)) > 0).all()     # every token hears of it, on either side
    assert not ((own.forth(moved) - own.forth(u)).abs().amax((0, 2)) > 0)[:100].any()


def influence(model, shape, width=128):
    """How much the output of the clip's first token moves with each frame of the clip: (t,)."""
    grid = torch.randn(1, *shape, width, generator=torch.Generator().manual_seed(1), requires_grad=True)
    model(grid)[0, 0, 0, 0].square().sum().backward()
    return grid.grad.square().sum((0, 2, 3, 4)).sqrt()


def test_7_without_review_tokens():
    """The state fades; the overview in front of it does not. Without it the end of a long clip is hardly heard."""
    torch.manual_seed(0)
    model = lingen.MATE(lingen.preset("tiny", vocab_size=1, tesa=False, backend="torch"))
    with_review = influence(model, (64, 8, 8))
    model.pool = None                                               # the same weights, but no overview
    without = influence(model, (64, 8, 8))
    assert with_review[0] == pytest.approx(without[0], rel=0.1)     # its own frame matters as much as before: 9
    assert without[32] < 1e-12 and with_review[32] > 1e-5           # the middle of the clip, 2048 tokens away
    assert without[63] < 1e-12 and with_review[63] > 0.1            # its end: the overview's end stands next to the first token


def test_8_where_the_dit_overtakes():
    """Twice the frames cost MATE twice the operations; full attention has a term that grows fourfold."""
    def operations(mixer, frames):                                  # of the last row that `python lingen.py` prints
        return lingen.describe(lingen.preset("tiny", vocab_size=40, mixer=mixer, depth=1), frames, 32, 32)[-1][-1]
    mate, dit = ([operations(mixer, frames) for frames in (32, 64, 256, 512)] for mixer in ("mate", "attention"))
    assert mate[3] / mate[2] == pytest.approx(2, rel=0.01) and dit[3] / dit[2] > 3
    assert dit[0] < mate[0] and dit[1] > mate[1]                    # they cross between 512 and 1024 tokens


def test_9_heun_instead_of_euler():
    """Data of one number, normal with deviation s: then the flow is known, x(1) = s x(0), and so is each error."""
    s = 0.1
    velocity = lambda x, t: (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2) * x

    def error(steps, heun):
        x = torch.ones((), dtype=torch.float64)
        times = sample.times(steps).double()
        for t, after in zip(times, times[1:]):
            v = velocity(x, t)
            if heun:                                                # ask again at the end of the step, and take the mean
                v = (v + velocity(x + (after - t) * v, after)) / 2
            x = x + (after - t) * v
        return abs(x.item() - s)
    assert 1.5 < error(100, False) / error(200, False) < 2.5        # first order: half the step, half the error
    assert 3 < error(100, True) / error(200, True) < 5              # second order: a quarter
    assert error(50, True) < error(100, False)                      # and better for the same number of questions


def test_10_another_shape(monkeypatch):
    """A diamond in place of the cross. Data, captions and judge read the same tables and the same drawing, so these are all there is to change."""
    four = train_tiny.draw_shapes

    def diamond(half, centre, size):
        x, y = (train_tiny.wrap(torch.arange(size) - centre[:, i : i + 1], size) for i in (0, 1))
        outline = (x.abs()[:, None, :] + y.abs()[:, :, None]) / math.sqrt(2) - 0.85 * half[:, None, None]
        return torch.cat([four(half, centre, size)[:, :3], (0.5 - outline).clamp(0, 1)[:, None]], 1)
    shapes = (*train_tiny.SHAPES[:3], "diamond")
    monkeypatch.setattr(train_tiny, "SHAPES", shapes)
    for module in (train_tiny, judge):
        monkeypatch.setattr(module, "draw_shapes", diamond)
        monkeypatch.setattr(module, "ATTRIBUTES", {**train_tiny.ATTRIBUTES, "shape": shapes})
    specs = torch.tensor([[[0, 3, 0, 0, 1]]])                       # a large red diamond, slowly to the right
    clip = train_tiny.render(specs, torch.tensor([[[8.0, 16.0]]]), 16)
    text = train_tiny.caption(specs[0], plain=True)
    assert text == "a large red diamond moving slowly right"
    right, turned, other = judge.judge(clip.expand(3, -1, -1, -1, -1), [text, text.replace("right", "left"), text.replace("diamond", "circle")])
    assert right["ok"]
    assert not turned["ok"] and not turned["direction_ok"] and turned["shape_ok"] and turned["colour_ok"]
    assert not other["ok"] and not other["shape_ok"] and other["direction_ok"]
