"""The four scan orders: how a clip becomes a sequence, and comes back.

A Mamba reads tokens in a line, but a clip is a grid of t frames, h rows and w columns. Whatever the
line, it tears most neighbours apart: read row by row, the pixel below is w places away and the same
pixel in the next frame h*w places. LinGen's answer is *Rotary Major Scan* (RMS, fig. 4 of the paper):
let each layer walk the grid in another order, so that each axis is the fast one in turn. The token
(t, y, x) of a T x H x W grid stands in the sequence at

    layer mod 4   order              place in the sequence
    0             spatial-row        t*H*W + y*W + x
    1             spatial-column     t*H*W + x*H + y
    2             temporal-row       (y*W + x)*T + t
    3             temporal-column    (x*H + y)*T + t

All four only permute the axes, and a permutation of axes is one strided copy (none at all for
spatial-row). The zigzag, with which the paper compares RMS (table 2, fig. 11b), is no such permutation:
each row and each frame is walked in the direction opposite to the last, so it needs a table with one
index per token and a gather through it.

Symbols: b batch; t, h, w frames, rows, columns (T, H, W in the table, where t is a place); d width of a token;
l = t*h*w length of the sequence; (t, y, x) the place of one token in the grid.

Run it: `python scan.py --grid 4 8 8` prints how far apart the neighbours land, and draws the orders.
"""

import difflib
import functools

import torch
from einops import rearrange

# Read an entry as nested loops, slowest axis first. The key order is the layer order of RMS.
AXES = {
    "spatial-row": "t h w",
    "spatial-column": "t w h",
    "temporal-row": "h w t",
    "temporal-column": "w h t",
}
SCANS = tuple(AXES)


# ---------------------------------------------------------------- there and back


def to_sequence(grid, order):
    """Lay a grid of tokens out in a line.

    grid   (b, t, h, w, d), any dtype; t, h, w >= 1
    order  a name of SCANS, "zigzag", or a layer number >= 0 (taken mod 4, as in fig. 4)
    ->     (b, t*h*w, d); a view of a contiguous grid for spatial-row, else one copy
    ValueError for another rank, an empty axis, an unknown name, a negative layer; TypeError for an
    order that is neither str nor int.
    """
    order = _name(order)
    if not isinstance(grid, torch.Tensor):
        raise TypeError(f"grid is a {type(grid).__name__}; expected a tensor (b, t, h, w, d)")
    if grid.ndim != 5 or 0 in grid.shape[1:4]:
        raise ValueError(f"grid has shape {tuple(grid.shape)}; expected (b, t, h, w, d) with t, h, w >= 1")
    if order == "zigzag":
        place_in_grid, _ = zigzag_table(*grid.shape[1:4], grid.device)
        return grid.flatten(1, 3).index_select(1, place_in_grid)  # (b, l, d)
    return rearrange(grid, f"b t h w d -> b ({AXES[order]}) d")  # (b, l, d)


def to_grid(seq, order, shape):
    """The inverse of `to_sequence`.

    seq (b, l, d), any dtype; order as there; shape = (t, h, w) with t*h*w = l  ->  (b, t, h, w, d)
    ValueError for another rank, or a shape that does not hold l tokens; else as `to_sequence`.
    """
    order = _name(order)
    if not isinstance(seq, torch.Tensor):
        raise TypeError(f"seq is a {type(seq).__name__}; expected a tensor (b, l, d)")
    if seq.ndim != 3:
        raise ValueError(f"seq has shape {tuple(seq.shape)}; expected (b, l, d)")
    if not _whole(shape) or shape[0] * shape[1] * shape[2] != seq.shape[1]:
        raise ValueError(f"shape {tuple(shape)} does not hold the {seq.shape[1]} tokens of seq; "
                         "expected three sizes (t, h, w) >= 1 with t*h*w equal to that")  # fmt: skip
    t, h, w = shape
    if order == "zigzag":
        _, place_in_seq = zigzag_table(t, h, w, seq.device)
        return seq.index_select(1, place_in_seq).unflatten(1, (t, h, w))  # (b, t, h, w, d)
    return rearrange(seq, f"b ({AXES[order]}) d -> b t h w d", t=t, h=h, w=w)  # (b, t, h, w, d)


def _whole(shape):
    """Three sizes (t, h, w) of at least 1?"""
    return len(shape) == 3 and all(isinstance(size, int) and size >= 1 for size in shape)


@functools.lru_cache(maxsize=16)  # a model asks for the same few shapes in every layer of every step
@torch.inference_mode(False)  # a table first made while sampling must also serve training later
def zigzag_table(t, h, w, device):
    """The zigzag as two int64 tables of length t*h*w: which token of the grid stands at each place of
    the sequence, and its inverse. Tokens of the grid are counted in spatial-row order."""
    place = torch.arange(t * h * w, device=device)
    row = place // w  # rows walked so far, over all frames
    frame, y, x = row // h, row % h, place % w
    y = torch.where(frame % 2 == 0, y, h - 1 - y)  # every other frame from the bottom up
    # The parity of `row`, not of y: the count runs on over frames, and so does the turning of the walk.
    x = torch.where(row % 2 == 0, x, w - 1 - x)
    place_in_grid = (frame * h + y) * w + x  # (l,)
    return place_in_grid, place_in_grid.argsort()


def _name(order):
    """The name of an order given by name or by layer number."""
    if isinstance(order, bool) or not isinstance(order, (str, int)):
        raise TypeError(f"order is {order!r}; expected a name or a layer number (int)")
    if isinstance(order, int):
        if order < 0:
            raise ValueError(f"order is {order}; layers count from 0")
        return SCANS[order % 4]  # a fifth order would be asked for by name
    if order not in AXES and order != "zigzag":
        close = difflib.get_close_matches(order, [*SCANS, "zigzag"], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown order {order!r}{hint}; known are {', '.join(SCANS)} and zigzag")
    return order


# ---------------------------------------------------------------- the adjacency argument in numbers


def places(order, shape):
    """Where each token of a grid of shape (t, h, w) stands in the sequence: int64 (t, h, w)."""
    if not _whole(shape):
        raise ValueError(f"shape is {shape!r}; expected three sizes (t, h, w) >= 1")
    line = torch.arange(shape[0] * shape[1] * shape[2])
    return to_grid(line[None, :, None], order, shape)[0, ..., 0]


def distances(order, shape):
    """How far apart neighbours land in the sequence: one int64 tensor for each axis t, y, x.

    order as in `to_sequence`, or "rms": for each pair the smallest distance over the four layers."""
    if order == "rms":
        return [torch.stack(axis).amin(0) for axis in zip(*(distances(s, shape) for s in SCANS[:4]))]
    return [places(order, shape).diff(dim=axis).abs().flatten() for axis in range(3)]


def table(shape, within):
    """The table as text: an order a line; mean and largest distance along each axis; near pairs."""
    head = "mean  largest"
    lines = [f"{'':24}{'along t':>15}{'along y':>15}{'along x':>15}{'pairs within':>15}",
             f"{'order':24}{head:>15}{head:>15}{head:>15}{f'{within} places':>15}"]  # fmt: skip
    for order in (*SCANS, "zigzag", "rms"):
        apart = distances(order, shape)
        cells = [f"{a.double().mean():.1f}{a.max():9d}" if a.numel() else "no pairs" for a in apart]
        every = torch.cat(apart)
        near = f"{100 * (every <= within).double().mean():.0f} %" if every.numel() else "no pairs"
        name = "RMS, best of four layers" if order == "rms" else order
        lines.append(f"{name:24}" + "".join(f"{cell:>15}" for cell in [*cells, near]))
    return "\n".join(lines)


if __name__ == "__main__":
    import argparse

    from benchmarks import pictures

    pictures.end_with_the_reader()
    parser = argparse.ArgumentParser(description="How far apart neighbours of the grid land in the sequence.")
    parser.add_argument("--grid", type=int, nargs=3, default=[4, 8, 8], metavar=("T", "H", "W"),
                        help="frames, rows, columns of the grid to measure (default 4 8 8)")  # fmt: skip
    parser.add_argument("--within", type=int, default=8, metavar="K",
                        help="count a pair as near when at most K places apart (default 8)")  # fmt: skip
    parser.add_argument("--out", default="scan_orders.png",
                        help="the picture, of the grid cut to 4 per axis (default scan_orders.png)")  # fmt: skip
    args = parser.parse_args()
    if min(args.grid) < 1 or args.within < 1:
        parser.error(f"--grid {args.grid} and --within {args.within}: every number must be at least 1")
    if args.grid[0] * args.grid[1] * args.grid[2] > 10**7:
        parser.error(f"--grid {args.grid} has more than ten million tokens; choose a smaller grid")
    pictures.check_out(parser, args.out)
    print(f"How far apart neighbours of a {' x '.join(map(str, args.grid))} grid land in the sequence\n")
    print(table(args.grid, args.within))
    pictures.save(pictures.scan_orders([min(size, 4) for size in args.grid]), args.out)
