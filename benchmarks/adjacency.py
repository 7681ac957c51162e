"""Claim: Rotary Major Scan keeps neighbours together (fig. 4). How many are within k places?

    python benchmarks/adjacency.py                     the grid of a 17 s clip at 512p: 34 x 32 x 32
    python benchmarks/adjacency.py --grid 4 6 6 --window 4 3 3           the toy's

Neighbours share a face (6 of them), or a face, an edge or a corner (26). For each order: the share
of pairs that stand at most k places apart in the sequence; for RMS, in at least one of four layers.
TESA covers a pair if both tokens share a window in an even layer or in an odd one.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import common
from scan import SCANS, places
from tesa import windows

WITHIN = (1, 2, 8, 32, 128)
DRAWN = ("spatial-row", "temporal-row", "zigzag", "RMS", "zigzag + TESA", "RMS + TESA")
# One offset for each pair of opposite ones: 13, of which 3 are faces.
ALL = [offset for offset in itertools.product((-1, 0, 1), repeat=3) if offset > (0, 0, 0)]
FACES = [offset for offset in ALL if sum(map(abs, offset)) == 1]


def pairs(values, offsets):
    """values (t, h, w) at both ends of all pairs of tokens an offset apart: (2, pairs)."""
    ends = [[], []]
    for offset in offsets:
        for end, sign in zip(ends, (-1, 1)):
            cut = []
            for along, size in zip(offset, values.shape):
                cut.append(slice(max(0, sign * along), size + min(0, sign * along)))
            end.append(values[tuple(cut)].flatten())
    return torch.stack([torch.cat(end) for end in ends])


def within(grid, window, offsets):
    """For each order and each k of WITHIN, which pairs are near: {order: {k: bool (pairs,)}}."""
    apart = {}
    for order in (*SCANS, "zigzag"):
        apart[order] = pairs(places(order, grid), offsets).diff(dim=0)[0].abs()
    apart["RMS"] = torch.stack([apart[order] for order in SCANS]).amin(0)
    near = {order: {k: far <= k for k in WITHIN} for order, far in apart.items()}
    together = []
    for shift in ((0, 0, 0), tuple(size // 2 for size in window)):
        first, second = pairs(windows(grid, window, shift), offsets)
        together.append(first == second)
    near["TESA"] = dict.fromkeys(WITHIN, together[0] | together[1])
    for order in ("zigzag", "RMS"):
        near[f"{order} + TESA"] = {k: near[order][k] | near["TESA"][k] for k in WITHIN}
    return near


def draw(rows):
    def panels(*axes):
        for axis, kind in zip(axes, ("faces", "all")):
            for row in rows:
                if row["neighbours"] == kind and row["order"] in DRAWN:
                    line = [float(row[f"within_{k}"]) for k in WITHIN]
                    style = "--" if "TESA" in row["order"] else "-"
                    axis.semilogx(WITHIN, line, marker="o", label=row["order"], linestyle=style)
            title = "6 neighbours (faces)" if kind == "faces" else "26 neighbours"
            axis.set(title=title, xlabel="within k places", ylabel="% of pairs", ylim=(0, 103))
        axes[1].legend(loc="center left", bbox_to_anchor=(0, 0.6))

    return panels


def main():
    parser = common.parser_of(__doc__)
    axes = ("T", "H", "W")
    parser.add_argument("--grid", type=int, nargs=3, default=[34, 32, 32], metavar=axes)
    parser.add_argument("--window", type=int, nargs=3, default=[8, 4, 4], metavar=axes)
    args = common.arguments(parser)
    table = common.Table(args.out / "adjacency.csv")
    for kind, offsets in (("faces", FACES), ("all", ALL)):
        for order, near in within(tuple(args.grid), tuple(args.window), offsets).items():
            shares = {k: 100 * pair.double().mean().item() for k, pair in near.items()}
            cells = {f"within_{k}": round(share, 1) for k, share in shares.items()}
            table.add(order=order, neighbours=kind, **cells)
    common.plot(args.out / "adjacency.png", draw(table.rows), panels=2)


if __name__ == "__main__":
    common.run(__file__, main)
