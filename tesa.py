"""Temporal Swin Attention (TESA): softmax attention inside small windows of space and time.

Every scan order separates neighbours (scan.py). So LinGen has a second branch in each block
(fig. 5). It cuts the grid into small 3-D windows. The tokens of a window attend to each other. In
every second layer the windows are shifted by half a window, so that information crosses their
borders, as in Swin (Liu et al. 2021, arXiv 2103.14030). A token attends to the m tokens of its
window, however long the clip is: the cost is linear in the number of tokens.

    even layer, window 4:   0 1 2 3 | 4 5 6 7
    odd layer, shift 2:     0 1 | 2 3 4 5 | 6 7

The odd layer has half windows at both ends. Rolling the grid back by the shift joins them:

    rolled by 2:            2 3 4 5 | 6 7 0 1

A mask keeps the two apart, and excludes the padding of a grid that the window does not divide.

b batch; t, h, w frames, rows, columns of the grid; d width; e width of a head;
wins windows after rolling; m tokens in a window. Run `python tesa.py`: how far information spreads.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


def fit(shape, window, shift):
    """Clamp window and shift (t, h, w) to a grid: an axis within one window has no shift."""
    axes = list(zip(shape, window, shift, strict=True))
    window = tuple(min(size, win) for size, win, _ in axes)
    return window, tuple(by if win < size else 0 for size, win, by in axes)


def windows(shape, window, shift, device=None):
    """The window number of each token: int64 (t, h, w). Tokens of one number attend to each other.

    Windows begin at shift, shift + window, ...; the tokens before the first form a window, too.
    """
    window, shift = fit(shape, window, shift)
    number = torch.zeros(1, 1, 1, dtype=torch.int64, device=device)
    for axis, (size, win, by) in enumerate(zip(shape, window, shift)):
        place = torch.arange(size, device=device) + (win - by) % win  # as if `by` began a window
        along = (place // win).view([-1 if i == axis else 1 for i in range(3)])
        number = number * (size // win + 2) + along  # axes as digits; along <= size // win + 1
    return number


def partition(grid, window, shift):
    """Pad, roll and cut a grid into fitted windows: (b, t, h, w, d) -> (b, wins, m, d)."""
    pad = [-size % win for size, win in zip(grid.shape[1:4], window)]
    if any(pad):  # at the far end of each axis; F.pad counts axes from the last one
        grid = F.pad(grid, (0, 0, 0, pad[2], 0, pad[1], 0, pad[0]))
    if any(shift):
        grid = grid.roll([-by for by in shift], (1, 2, 3))
    m1, m2, m3 = window
    pattern = "b (t m1) (h m2) (w m3) d -> b (t h w) (m1 m2 m3) d"
    return rearrange(grid, pattern, m1=m1, m2=m2, m3=m3)


def unpartition(parts, shape, window, shift):
    """The inverse of `partition`: (b, wins, m, d) -> (b, t, h, w, d), without the padding."""
    m1, m2, m3 = window
    t, h, _ = (-(-size // win) for size, win in zip(shape, window))  # windows along each axis
    pattern = "b (t h w) (m1 m2 m3) d -> b (t m1) (h m2) (w m3) d"
    grid = rearrange(parts, pattern, t=t, h=h, m1=m1, m2=m2, m3=m3)
    if any(shift):
        grid = grid.roll(shift, (1, 2, 3))
    return grid[:, : shape[0], : shape[1], : shape[2]]


def window_mask(shape, window, shift, device=None):
    """Who may attend to whom: bool (wins, m, m), or None if every window is whole."""
    if not any(shift) and not any(size % win for size, win in zip(shape, window)):
        return None
    # Real windows count from 1. Padding is 0, a window of its own: no token attends to it, and it
    # attends to itself, since softmax over no key is NaN.
    number = windows(shape, window, shift, device)[None, ..., None] + 1
    number = partition(number, window, shift)[0, ..., 0]  # (wins, m)
    return number[:, :, None] == number[:, None, :]


def rotary(shape, e, dtype, device=None, longest=16):
    """Rotary position embedding (RoPE; Su et al. 2021, arXiv 2104.09864) in three dimensions.

    shape (t, h, w), m tokens -> cosines and sines, (m, e // 2) each. The pairs of features take the
    axes t, h, w in turn, with wavelengths between 2 and `longest` tokens.
    """
    dtype = torch.promote_types(dtype, torch.float32)  # bfloat16 would round positions
    pair = torch.arange(e // 2, device=device)
    exponent = ((pair // 3).to(dtype) + 0.5) / ((e + 5) // 6)  # over ceil(e / 6): in (0, 1)
    frequency = torch.pi * (longest / 2) ** -exponent
    place = torch.cartesian_prod(*(torch.arange(size, device=device) for size in shape))  # (m, 3)
    angles = place[:, pair % 3] * frequency  # (m, e // 2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each pair of features (i, i + e/2) of x (..., m, e) by its angle."""
    first, second = x.to(cos.dtype).chunk(2, -1)
    turned = torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
    return turned.to(x.dtype)


class TemporalSwinAttention(nn.Module):
    """TESA (fig. 5): (b, t, h, w, d) -> the same shape and dtype, for any t, h, w >= 1.

    window (t, h, w) in tokens; shift (t, h, w), 0 in even layers and half a window in odd ones.
    Raises ValueError for a width that 2 * nheads does not divide, or unless 0 <= shift < window.
    forward adds offset to the shift along time. Choice: RoPE, where Swin has a learnt bias.
    """

    def __init__(self, d_model, nheads, window=(4, 4, 4), shift=(0, 0, 0)):
        super().__init__()
        if d_model % (2 * nheads):
            raise ValueError(f"d_model={d_model} is not a multiple of 2 * nheads={2 * nheads}")
        if any(not 0 <= by < win for win, by in zip(window, shift, strict=True)):
            raise ValueError(f"shift {tuple(shift)} is not within the window {tuple(window)}")
        self.nheads, self.window, self.shift = nheads, tuple(window), tuple(shift)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, grid, offset=0):
        b, shape = grid.shape[0], tuple(grid.shape[1:4])
        shift = ((self.shift[0] + offset) % self.window[0], *self.shift[1:])
        window, shift = fit(shape, self.window, shift)
        parts = self.qkv(partition(grid, window, shift))  # (b, wins, m, 3 d)
        pattern = "b wins m (three heads e) -> three (b wins) heads m e"  # q, k, v
        q, k, v = rearrange(parts, pattern, three=3, heads=self.nheads)
        cos, sin = rotary(window, q.shape[-1], q.dtype, q.device)  # (m, e // 2)
        mask = window_mask(shape, window, shift, q.device)  # (wins, m, m)
        if mask is not None:
            mask = mask[:, None].repeat(b, 1, 1, 1)  # (b*wins, 1, m, m)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # softmax(q k^T / sqrt(e)) v, with scores (b*wins, heads, m, m)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = rearrange(out, "(b wins) heads m e -> b wins m (heads e)", b=b)
        return self.proj(unpartition(out, shape, window, shift))


if __name__ == "__main__":
    shape, window = (16, 8, 8), (4, 4, 4)
    reached = torch.zeros(shape, dtype=torch.bool)
    reached[8, 4, 4] = True
    print(f"grid {shape}, windows {window}: how far the middle token's information spreads\n")
    for layer in range(6):
        number = windows(shape, window, [size // 2 * (layer % 2) for size in window])
        reached = torch.isin(number, number[reached])
        span = " x ".join(str(len(axis.unique())) for axis in reached.nonzero().T)
        print(f"layer {layer}: {len(number.unique()):3} windows, {reached.sum():5} tokens, {span}")
