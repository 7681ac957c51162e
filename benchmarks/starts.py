"""Claim: clips of a caption start everywhere. Starts of many seeds, counted in parts of the torus.

    python benchmarks/starts.py                              the shipped checkpoint, 90 seeds each
    python benchmarks/starts.py "a green cross moving up" --seeds 45

The torus is cut into 3 x 3 parts. least, most: clips that start in a part. If all places are
equally likely, chi-square (8 degrees of freedom) is below 15.5 in 19 of 20 tests.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import sample as sampler
from benchmarks import common
from toy import judge, shapes

CAPTIONS = ["a red circle moving right", "a blue square moving up", "a green cross moving up-left"]


def count_starts(starts, parts=3):
    """Starts (n, 2) in pixels -> how many lie in each part of the torus (parts * parts,)."""
    x, y = (starts * parts / shapes.SIZE).long().clamp(0, parts - 1).unbind(1)
    return torch.bincount(x + parts * y, minlength=parts * parts)


def chi_square(counts):
    expected = counts.sum() / len(counts)
    return ((counts - expected).square() / expected).sum().item()


def main():
    parser = common.parser_of(__doc__)
    parser.add_argument("captions", nargs="*", metavar="CAPTION", default=CAPTIONS)
    parser.add_argument("--checkpoint", default=common.SHIPPED)
    parser.add_argument("--seeds", type=int, default=90, help="clips of a caption (default 90)")
    args = common.arguments(parser)
    model, checkpoint = sampler.load_model(args.checkpoint)
    table = common.Table(args.out / "starts.csv")
    for caption in args.captions:
        settings, words = checkpoint["sampling"], checkpoint["vocabulary"]
        clips = sampler.sample_captions(model, [caption] * args.seeds, words, settings)
        verdict = judge.judge(clips, shapes.parse_caption(caption).expand(args.seeds, 3))
        counts = count_starts(verdict["start"])
        strict = round(100 * verdict["strict"].double().mean().item())
        table.add(caption=caption, clips=args.seeds, strict=strict, least=counts.min().item(),
                  most=counts.max().item(), chi_square=round(chi_square(counts), 1))  # fmt: skip


if __name__ == "__main__":
    common.run(__file__, main)
