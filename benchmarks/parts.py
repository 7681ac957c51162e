"""What each part costs (table 2): the time of a denoising step with one part taken out.

    python benchmarks/parts.py                          the tiny preset, 17 seconds: a minute or two
    python benchmarks/parts.py --preset small --pixels 256 --seconds 4 --depth 4 --rounds 5

All variants run in turn, and each is held against the default of its own round, since the speed of
a shared machine drifts. Shown: median and quartiles over the rounds. The paper's row "Mamba in
place of Mamba2" is left out: there is no Mamba of the first kind here.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from benchmarks import common

PAPER = {  # seconds for a clip of 17 s at 512p on an H100
    "default": 102,
    "without TESA": 94,
    "without RMS": 99,
    "zigzag for RMS": 144,
    "without MA-branch": 65,
    "without review": 98,
}


def main():
    parser = common.parser_of(__doc__)
    parser.add_argument("--preset", choices=("tiny", "small", "4b"), default="tiny")
    parser.add_argument("--seconds", type=int, default=17, help="of video (default 17)")
    parser.add_argument("--pixels", type=int, default=512, help="side of the clip, for latents")
    parser.add_argument("--depth", type=int, help="blocks, where the preset's take too long")
    parser.add_argument("--rounds", type=int, default=11, help="at least 2 (default 11)")
    args = common.arguments(parser)
    depth, steps = {"depth": args.depth} if args.depth else {}, {}
    for name in PAPER:
        model = common.build(args.preset, backend="torch", **common.VARIANTS[name], **depth)
        shape = common.clip_shape(model.config, args.seconds, args.pixels)
        steps[name] = common.denoising_step(model, shape)
    taken = {name: [] for name in PAPER}
    for round_ in tqdm(range(args.rounds + 1), unit="round", leave=False, disable=None):
        for name, step in steps.items():
            time = common.seconds(step)
            if round_:  # the first warms up
                taken[name].append(time)
    table = common.Table(args.out / f"parts_{args.preset}.csv")
    for name, paper in PAPER.items():
        relative = [own / default for own, default in zip(taken[name], taken["default"])]
        low, middle, high = statistics.quantiles(relative, n=4, method="inclusive")
        table.add(variant=name, seconds=round(statistics.median(taken[name]), 3),
                  relative=round(middle, 2), low=round(low, 2), high=round(high, 2),
                  paper_s=paper, paper=round(paper / PAPER["default"], 2))  # fmt: skip


if __name__ == "__main__":
    common.keep_memory()
    common.run(__file__, main)
