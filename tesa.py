"""Temporal Swin Attention: softmax attention inside small windows of space and time.

However a clip is laid out in a line (scan.py), a line leaves most neighbours apart. LinGen therefore
gives every block a second branch, *TESA* (fig. 5 of the paper): cut the grid into small 3-D windows and
let the tokens of one window attend to each other with plain softmax attention. In every second layer
the windows are shifted by half a window, so that what was a border lies inside a window and, layer by
layer, a token hears from ever farther away. The window keeps its size at every resolution and length:
a token attends to at most the m tokens of its window however long the clip, so the cost is linear in the number of tokens.

    even layer, window 4:   0 1 2 3 | 4 5 6 7
    odd layer, shift 2:     0 1 | 2 3 4 5 | 6 7

The odd row has a window more, and broken ones at the ends. As in Swin, the image transformer that TESA
carries over to time, we roll the grid by the shift first, which puts the two broken ends next to each
other in one window of full size,

    rolled by 2:            2 3 4 5 | 6 7 0 1

and a mask keeps apart the tokens that only the roll brought together (6 7 from 0 1). The same mask
keeps out the padding that fills up a grid which the window does not divide.

Symbols: b batch; t, h, w frames, rows, columns of the grid; d width; n heads; e = d/n width of a head;
k windows in the grid; m tokens in a window.

Run it: `python tesa.py` prints how far tokens hear after each layer, and draws windows, shift and mask.
"""

import functools
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

# ---------------------------------------------------------------- which tokens share a window


def fit(shape, window, shift):
    """Window and shift as used on a grid of this shape: along an axis no longer than the window, one
    window covers all, so that it is cut to the axis (no padding to compute) and there is no shift."""
    pairs = [(size, 0) if win >= size else (win, by) for size, win, by in zip(shape, window, shift)]
    return tuple(win for win, _ in pairs), tuple(by for _, by in pairs)


def windows(shape, window, shift):
    """The windows of fig. 5: an int64 (t, h, w) that numbers the window of each token.

    shape, window, shift  each (t, h, w), with 0 <= shift < window; ValueError for anything else
    Two tokens may attend to each other if and only if their numbers are equal. Along each axis the
    windows start at shift, shift + window, ...; what lies before the first start is a window of its own.
    """
    _check(window, shift)
    if len(shape) != 3 or any(not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(f"shape is {tuple(shape)}; expected three sizes (t, h, w) of at least 1")
    window, shift = fit(shape, window, shift)
    number = torch.zeros(1, 1, 1, dtype=torch.int64, device="cpu")  # also under torch.device("meta"): the values are needed
    for axis, (size, win, by) in enumerate(zip(shape, window, shift)):
        along = (torch.arange(size, device="cpu") - by) // win
        along = (along - along[0]).view([-1 if i == axis else 1 for i in range(3)])  # the first is number 0
        number = number * (int(along.max()) + 1) + along
    return number


def partition(grid, window, shift):
    """Roll, pad and cut a grid into windows that `fit` has fitted to it: (b, t, h, w, d) -> (b, k, m, d)."""
    pad = [(-size) % win for size, win in zip(grid.shape[1:4], window)]
    if any(pad):  # at the far end of each axis; F.pad counts axes from the last, which is d
        grid = F.pad(grid, (0, 0, 0, pad[2], 0, pad[1], 0, pad[0]))
    if any(shift):
        grid = grid.roll([-by for by in shift], (1, 2, 3))
    return rearrange(grid, "b (kt t) (kh h) (kw w) d -> b (kt kh kw) (t h w) d",
                     t=window[0], h=window[1], w=window[2])  # (b, k, m, d)  # fmt: skip


def unpartition(parts, shape, window, shift):
    """The inverse of `partition`: (b, k, m, d) -> (b, t, h, w, d), without the padding."""
    kt, kh, kw = (-(-size // win) for size, win in zip(shape, window))
    grid = rearrange(parts, "b (kt kh kw) (t h w) d -> b (kt t) (kh h) (kw w) d",
                     kt=kt, kh=kh, kw=kw, t=window[0], h=window[1], w=window[2])  # fmt: skip
    if any(shift):
        grid = grid.roll(shift, (1, 2, 3))
    return grid[:, : shape[0], : shape[1], : shape[2]]  # (b, t, h, w, d)


# Mask and rotation depend on shapes alone: made once for each, not in every step. A tensor born in inference
# mode could never serve autograd, and the first to ask may be a sampler: hence inference_mode(False).
@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def window_mask(shape, window, shift, device):
    """Which token may attend to which: bool (k, m, m), or None where every window is whole."""
    window, shift = fit(shape, window, shift)
    if not any(shift) and not any(size % win for size, win in zip(shape, window)):
        return None
    # Numbers from 1 up, so that the zeros of the padding are a window of their own: no token attends to
    # padding, and a row of padding still attends to itself, since softmax over nothing would be NaN.
    number = partition((windows(shape, window, shift) + 1)[None, ..., None], window, shift)[0, ..., 0]  # (k, m)
    return (number[:, :, None] == number[:, None, :]).to(device)  # (k, m, m)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def rotation(window, e, dtype, device, around=(False, False, False), travel=False):
    """Rotary positions: the angles (m, e) by which queries and keys are turned for their place in the window; and, for
    places that drift, the moment of each token, (m, 1), and `turn`, the angle that one step along h and one along w add, (2, e).

    The e/2 pairs of features (i, i + e/2) take the axes t, h, w in turn, each with wavelengths from about 2
    to 14 tokens. A score then depends on places through their differences alone. An axis that goes around, its last
    token next to its first, has waves that go around in whole turns instead: lengths size/1, size/2, ... to about 2, and
    then these again. travel: one pair in eight (of fewer, the last) for t, the others for h and w in turn.
    """
    place = torch.cartesian_prod(*(torch.arange(size, device="cpu") for size in window)).double()  # (m, 3)
    axes = [(0 if pair % 8 == min(7, e // 2 - 1) else 1 + (pair - pair // 8) % 2) if travel else pair % 3 for pair in range(e // 2)]
    turn = torch.zeros(3, e, dtype=torch.float64, device="cpu")  # by one step along t, h, w; an odd feature left over keeps 0
    for axis in range(3):
        own = [pair for pair in range(e // 2) if axes[pair] == axis]
        for i, pair in enumerate(own):
            angle = math.pi * 2 ** (-3 * (i + 0.5) / len(own))  # 2 pi / wavelength
            if around[axis]:
                angle = 2 * math.pi / window[axis] * (1 + i % max(1, window[axis] // 2))
            turn[axis, pair] = turn[axis, pair + e // 2] = angle
    angles = (place[:, :, None] * turn).sum(1)  # (m, e); no matrix product, which counters of operations would count
    return angles.to(device, dtype), place[:, :1].to(device, dtype), turn[1:].to(device, dtype)


# ---------------------------------------------------------------- the attention


class TemporalSwinAttention(nn.Module):
    """TESA (fig. 5): (b, t, h, w, d) -> the same shape and dtype; any t, h, w >= 1.

    d_model   d, a multiple of nheads
    window    (t, h, w) in tokens. choice: the paper says only "small"; callers choose
    shift     (t, h, w), 0 <= shift < window: (0, 0, 0) in even layers, half a window in odd ones
    torus     rows and columns go around (train_tiny.py's world does): heeded along an axis that the window covers whole
    travel    positions drift, as `forward` is told, and waves are shared out for it (`rotation`)
    Along an axis that the window covers whole, it is cut to the axis and the shift is dropped.
    ValueError for sizes that do not fit, in the constructor and in forward.

    choice: rotary positions inside the window, where Swin has a table of biases. A bias prefers an offset once and
    for all; a turned query asks for "the token one to the left of me, one moment ago" if its caption says
    "moving right", and for another if it says "up". On the toy of train_tiny.py this makes motion learnable soon.

    choice: the keys' biases begin at 1. A score is a product, and where query and key both begin near 0, neither has a
    reason to grow; next to a key that stands there from the first step, the query alone can learn where to look.

    choice: with `travel`, positions drift, each head's at a pace of its own. What flies along at that pace keeps its place, so
    that one query, "here", finds it at all times. With angles along t, h and w alone a query can ask for "one step later, one
    to the left", but not for "k steps later, k to the left" for every k at once. With `travel` the queries'
    biases begin at 1 too: a new head looks at its own place at all moments, which is right as soon as the drift is.
    """

    def __init__(self, d_model, nheads, window=(4, 4, 4), shift=(0, 0, 0), torus=False, travel=False):
        super().__init__()
        if nheads < 1 or d_model < 1 or d_model % nheads:
            raise ValueError(f"d_model={d_model} cannot be split among nheads={nheads}; choose a multiple of nheads")
        _check(window, shift)
        self.nheads, self.window, self.shift, self.torus, self.travel = nheads, tuple(window), tuple(shift), torus, travel
        self.qkv = nn.Linear(d_model, 3 * d_model)
        nn.init.ones_(self.qkv.bias[0 if travel else d_model : 2 * d_model])
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, grid, drift=None):
        """grid (b, t, h, w, d) -> the same. drift (b, nheads, 2): rows and columns that positions move by a step of t; None: 0."""
        d, weight = self.proj.in_features, self.proj.weight
        if not isinstance(grid, torch.Tensor):
            raise TypeError(f"grid is a {type(grid).__name__}; expected a tensor (b, t, h, w, {d})")
        if grid.ndim != 5 or grid.shape[-1] != d or 0 in grid.shape[1:4]:
            raise ValueError(f"grid has shape {tuple(grid.shape)}; expected (b, t, h, w, {d}) with t, h, w >= 1")
        autocast = grid.device.type != "meta" and torch.is_autocast_enabled(grid.device.type)  # which mends the dtype
        if grid.device != weight.device or (grid.dtype != weight.dtype and not autocast):
            raise ValueError(f"grid is {grid.dtype} on {grid.device}, the weights {weight.dtype} on {weight.device}; "
                             "move or convert one with .to(...)")  # fmt: skip
        b, shape = grid.shape[0], tuple(grid.shape[1:4])
        if drift is not None and (not isinstance(drift, torch.Tensor) or drift.shape != (b, self.nheads, 2) or drift.device != grid.device):
            raise ValueError(f"drift is {getattr(drift, 'shape', type(drift).__name__)}; expected (b, nheads, 2), here {(b, self.nheads, 2)}, on {grid.device}")
        window, shift = fit(shape, self.window, self.shift)
        parts = partition(grid, window, shift)  # (b, k, m, d)
        k = parts.shape[1]
        qkv = rearrange(self.qkv(parts), "b k m (three n e) -> three b k n m e", three=3, n=self.nheads)
        around = tuple(self.torus and axis > 0 and window[axis] == shape[axis] for axis in range(3))
        # Angles in float32 at least: they are places, and a rounded place is another one.
        angles, moment, turn = rotation(window, qkv.shape[-1], torch.promote_types(qkv.dtype, torch.float32), grid.device, around, self.travel)
        if drift is not None:
            angles = (angles - moment * (drift.to(turn)[..., None] * turn).sum(2, keepdim=True))[:, None]  # (b, 1, n, m, e)
        cos, sin = angles.cos().to(qkv.dtype), angles.sin().to(qkv.dtype)
        both, v = qkv.split([2, 1])  # split, not indexed: the gradient of an index is filled up with zeros first
        q, key = (both * cos + quarter_turn(both) * sin).flatten(1, 2)  # (b*k, n, m, e)
        v = v.flatten(0, 2)

        mask = window_mask(shape, window, shift, grid.device)  # (k, m, m)
        if mask is not None:
            # Windows of all clips share one axis, since the fast kernels want four axes and no more.
            mask = mask[None, :, None].expand(b, -1, -1, -1, -1).flatten(0, 1)  # (b*k, 1, m, m)
        out = attend(q, key, v, mask)  # (b*k, n, m, e)

        out = rearrange(out, "(b k) n m e -> b k m (n e)", b=b, k=k)
        return self.proj(unpartition(out, shape, window, shift))  # (b, t, h, w, d)


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(e)) v over the last two axes; mask bool, True where a query may attend.

    Every query needs a key that it may attend. On a CPU, torch's fused kernel is made for long sequences: over fewer
    keys, a caption's or a small window's, plain products are as fast, and under autocast to bfloat16 several times faster.
    """
    if q.device.type != "cpu" or k.shape[-2] >= 256:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1) @ v


def quarter_turn(x):
    """Each pair of features (i, i + e/2) turned by 90 degrees; the odd one out stays, its sine being 0."""
    half = x.shape[-1] // 2
    first, second, odd = x.split([half, half, x.shape[-1] % 2], -1)
    return torch.cat([-second, first, odd], -1)


def _check(window, shift):
    for name, sizes in (("window", window), ("shift", shift)):
        if len(sizes) != 3 or any(isinstance(n, bool) or not isinstance(n, int) for n in sizes):
            raise ValueError(f"{name} is {sizes!r}; expected three whole numbers (t, h, w)")
    if min(window) < 1:
        raise ValueError(f"window is {tuple(window)}; every size must be at least 1")
    if any(not 0 <= by < win for win, by in zip(window, shift)):
        raise ValueError(f"shift is {tuple(shift)} for window {tuple(window)}; expected 0 <= shift < window on an axis")


# ---------------------------------------------------------------- the demonstration


def spread(shape, layers):
    """Which tokens have heard of the middle token after each layer: a list of bool (t, h, w).

    layers  the `windows` of each layer in turn"""
    heard, after = torch.zeros(shape, dtype=torch.bool), []
    heard[tuple(size // 2 for size in shape)] = True
    for number in layers:
        heard = torch.isin(number, number[heard])
        after.append(heard)
    return after


if __name__ == "__main__":
    import argparse

    from benchmarks import pictures

    pictures.end_with_the_reader()
    parser = argparse.ArgumentParser(description="Windows, shift and mask of Temporal Swin Attention (fig. 5).")
    for name, default, words in (("--grid", [8, 8, 8], "frames, rows, columns of tokens"),
                                 ("--window", [4, 4, 4], "size of a window"),
                                 ("--shift", None, "shift of the odd layers (default: half a window)")):  # fmt: skip
        parser.add_argument(name, type=int, nargs=3, default=default, metavar=("T", "H", "W"),
                            help=words + (f" (default {' '.join(map(str, default))})" if default else ""))  # fmt: skip
    parser.add_argument("--out", default="tesa_windows.png", help="the picture (default tesa_windows.png)")
    args = parser.parse_args()
    shape, window = tuple(args.grid), tuple(args.window)
    shift = tuple(args.shift or (size // 2 for size in window))
    length = shape[0] * shape[1] * shape[2]
    if max(shape) > 64:
        parser.error(f"--grid {args.grid}: more than 64 along an axis is too much to draw")
    pictures.check_out(parser, args.out)
    try:
        layers = [windows(shape, window, by) for by in ((0, 0, 0), shift)] * 2
    except ValueError as error:
        parser.error(str(error))
    (wt, wh, ww), by = fit(shape, window, shift)
    print(f"grid {shape}: {length} tokens; windows of {wt} x {wh} x {ww} = {wt * wh * ww}; odd layers shift by {by}\n")
    print("layer   windows   share of pairs   tokens that have heard of the middle one   span t, y, x")
    for i, (number, heard) in enumerate(zip(layers, spread(shape, layers))):
        sizes = number.flatten().bincount()
        span = " ".join(f"{len(axis.unique()):3d}" for axis in heard.nonzero().T)
        pairs = 100 * sizes.square().sum() / length**2
        print(f"{i:5}   {len(sizes):7}   {pairs:12.2f} %   {heard.sum():20} of {length:<17}   {span}")
    pictures.save(pictures.tesa_windows(shape, window, shift), args.out)
