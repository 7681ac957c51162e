"""Four scan orders: how a grid of tokens becomes a sequence, and comes back.

Mamba reads a sequence, but a clip is a grid of T frames, H rows and W columns. Every order
separates most neighbours. Row by row, the token below is W places away, and the same token of the
next frame H*W places. *Rotary Major Scan* (RMS, fig. 4 of the paper) changes the order from layer
to layer, so that each axis is the fastest one in some layer.

    layer mod 4   order              place of token (t, y, x) in the sequence
    0             spatial-row        t*H*W + y*W + x
    1             spatial-column     t*H*W + x*H + y
    2             temporal-row       (y*W + x)*T + t
    3             temporal-column    (x*H + y)*T + t

Each order only permutes the axes, which costs one strided copy (for spatial-row not even that). The
zigzag is the paper's baseline (table 2, fig. 11b). The direction alternates from row to row, and
the order of rows from frame to frame. That is no permutation of axes: every token needs an index.

b batch; T, H, W (t, h, w in shapes) frames, rows, columns; (t, y, x) frame, row, column of a token;
d width of a token; l = T*H*W length of the sequence.

Run it: `python scan.py` prints how far apart neighbours land in each order.
"""

import torch
from einops import rearrange

# The axes of each order, slowest first. Layer i of RMS takes entry i mod 4.
AXES = {
    "spatial-row": "t h w",
    "spatial-column": "t w h",
    "temporal-row": "h w t",
    "temporal-column": "w h t",
}
SCANS = tuple(AXES)


def to_sequence(grid, order):
    """Flatten a grid of tokens: (b, t, h, w, d) -> (b, t*h*w, d).

    order: a name of SCANS, "zigzag", or a layer number (mod 4, as in fig. 4).
    Raises ValueError for an unknown order.
    """
    order = order_name(order)
    if order == "zigzag":
        return grid.flatten(1, 3)[:, zigzag_index(*grid.shape[1:4], grid.device)]  # (b, l, d)
    return rearrange(grid, f"b t h w d -> b ({AXES[order]}) d")


def to_grid(seq, order, shape):
    """The inverse of `to_sequence`: (b, l, d) and shape = (t, h, w) -> (b, t, h, w, d).

    Raises ValueError for an unknown order, or a shape that does not hold l tokens.
    """
    order = order_name(order)
    t, h, w = shape
    if t * h * w != seq.shape[1]:
        raise ValueError(f"shape {tuple(shape)} does not hold the {seq.shape[1]} tokens of seq")
    if order == "zigzag":
        inverse = zigzag_index(t, h, w, seq.device).argsort()  # (l,)
        return seq[:, inverse].unflatten(1, (t, h, w))
    return rearrange(seq, f"b ({AXES[order]}) d -> b t h w d", t=t, h=h, w=w)


def order_name(order):
    """The name of an order that is given by name or by layer number."""
    if isinstance(order, int):
        return SCANS[order % 4]
    if order not in AXES and order != "zigzag":
        raise ValueError(f"unknown order {order!r}; expected {', '.join(SCANS)} or zigzag")
    return order


def zigzag_index(t, h, w, device=None):
    """The token at each place of the zigzag: int64 (l,). Tokens are numbered row by row."""
    place = torch.arange(t * h * w, device=device)
    row = place // w  # counted over all frames
    frame, y, x = row // h, row % h, place % w
    y = torch.where(frame % 2 == 0, y, h - 1 - y)
    # x reverses at every row of the whole clip: the parity of `row` decides, not that of y.
    x = torch.where(row % 2 == 0, x, w - 1 - x)
    return (frame * h + y) * w + x


def places(order, shape):
    """Where each token of a grid of shape (t, h, w) stands in the sequence: int64 (t, h, w)."""
    line = torch.arange(shape[0] * shape[1] * shape[2])
    return to_grid(line[None, :, None], order, shape)[0, ..., 0]


if __name__ == "__main__":
    shape = (4, 8, 8)
    print(f"grid {shape}: mean (and largest) distance of neighbours in the sequence, by axis\n")
    print(f"{'order':16} {'time':>12} {'height':>12} {'width':>12}")
    apart = {}
    for order in (*SCANS, "zigzag"):
        apart[order] = [places(order, shape).diff(dim=axis).abs().double() for axis in range(3)]
        print(f"{order:16} " + " ".join(f"{a.mean():6.1f} ({a.max():3.0f})" for a in apart[order]))
    # The smallest distance of each pair over the four orders.
    best = [torch.stack([apart[o][axis] for o in SCANS]).amin(0).mean() for axis in range(3)]
    print(f"{'rotary, best':16} " + " ".join(f"{mean:6.1f}      " for mean in best))
