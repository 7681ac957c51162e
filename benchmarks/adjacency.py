"""Claim: Rotary Major Scan keeps neighbours together (LinGen fig. 4). How many come within k places of each other?

    python benchmarks/adjacency.py                        the grid of a 17 s clip at 512p: 34 x 32 x 32 tokens, seconds
    python benchmarks/adjacency.py --grid 4 8 8           the toy's

Neighbours share a face (6 of them) or a face, an edge or a corner (26). For each order: the share of these pairs that
stand at most k places apart in the sequence; for RMS, in at least one of its four layers. TESA's windows, unshifted and
shifted, cover a pair if both tokens share a window in one of the two.
"""
import argparse
import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks import common  # noqa: E402
from scan import SCANS, places  # noqa: E402
from tesa import windows  # noqa: E402

WITHIN = (1, 2, 8, 32, 128)
DRAWN = ("spatial-row", "temporal-row", "zigzag", "RMS", "zigzag + TESA", "RMS + TESA")
OFFSETS = [o for o in itertools.product((-1, 0, 1), repeat=3) if o > (0, 0, 0)]     # 13: of each pair, one direction


def pairs(values, offsets):
    """values (t, h, w) at both ends of every pair of tokens that are an offset apart: two (m,) tensors."""
    ends = [], []
    for offset in offsets:
        for end, sign in zip(ends, (-1, 1)):
            cut = tuple(slice(max(0, sign * o), size + min(0, sign * o)) for o, size in zip(offset, values.shape))
            end.append(values[cut].flatten())
    return torch.cat(ends[0]), torch.cat(ends[1])


def distances(order, grid, offsets):
    a, b = pairs(places(order, grid), offsets)
    return (a - b).abs()


def covered(grid, window, offsets):
    """Which pairs share a window of TESA, in an even layer or in an odd one: bool (m,)."""
    both = [pairs(windows(grid, window, shift), offsets) for shift in ((0, 0, 0), tuple(size // 2 for size in window))]
    return (both[0][0] == both[0][1]) | (both[1][0] == both[1][1])


def draw(rows):
    def panels(*axes):
        for axis, kind, title in zip(axes, ("faces", "all"), ("6 neighbours (faces)", "26 neighbours (and edges, corners)")):
            for row in rows:
                if row["neighbours"] == kind and row["order"] in DRAWN:
                    line = [float(row[f"within_{k}"]) for k in WITHIN]
                    axis.semilogx(WITHIN, line, marker="o", label=row["order"], linestyle="--" if "TESA" in row["order"] else "-")
            axis.set(title=title, xlabel="within k places", ylabel="% of pairs", ylim=(0, 103))
        axes[1].legend(loc="center left", bbox_to_anchor=(0, 0.6))
    return panels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, nargs=3, default=[34, 32, 32], metavar=("T", "H", "W"), help="of tokens (default 34 32 32)")
    parser.add_argument("--window", type=int, nargs=3, default=[8, 4, 4], metavar=("T", "H", "W"),
                        help="of TESA (default 8 4 4, the preset 4b's)")
    parser.add_argument("--out", default=str(common.RESULTS / "adjacency.csv"))
    parser.add_argument("--plot", default=str(common.ASSETS / "adjacency.png"))
    args = parser.parse_args()
    grid, window = tuple(args.grid), tuple(args.window)
    if min(grid) < 2 or torch.tensor(grid).prod() > 10**6 or min(window) < 1:
        parser.error("--grid must hold 2 to a million tokens, at least 2 along each axis; --window at least 1")
    table = common.Table(args.out)
    for kind, offsets in (("faces", [o for o in OFFSETS if sum(map(abs, o)) == 1]), ("all", OFFSETS)):
        found = {order: distances(order, grid, offsets) for order in tqdm((*SCANS, "zigzag"), leave=False, disable=None)}
        found["RMS"] = torch.stack([found[order] for order in SCANS]).amin(0)
        tesa = covered(grid, window, offsets)
        table_of = {order: {k: apart <= k for k in WITHIN} for order, apart in found.items()}
        table_of |= {"TESA": dict.fromkeys(WITHIN, tesa)}
        table_of |= {f"{order} + TESA": {k: near | tesa for k, near in table_of[order].items()} for order in ("zigzag", "RMS")}
        for order, near in table_of.items():
            table.add(order=order, neighbours=kind, **{f"within_{k}": round(100 * near[k].double().mean().item(), 1) for k in WITHIN})
    table.wrote()
    common.plot(args.plot, draw(table.rows), panels=2)


if __name__ == "__main__":
    common.run(main, "adjacency.py")
