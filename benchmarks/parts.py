"""What each part costs (LinGen table 2): seconds per denoising step with one part taken out or swapped.

    python benchmarks/parts.py                                   the tiny preset, a clip of 17 s: a minute or two
    python benchmarks/parts.py --preset small --pixels 256 --depth 4 --rounds 3       nearer the paper's proportions
    python benchmarks/parts.py --preset 4b --device cuda         as the paper: 512p, 17 s (in bfloat16, on a GPU)

The variants run in turn, round after round, and each is held against the default of its own round, its neighbour in time:
a shared machine drifts. Shown: the median over the rounds, and the quartiles. The paper's seconds are those of a whole
17 s clip at 512p on an H100; its row "Mamba in place of Mamba2" is left out, since we have no Mamba of the first kind.
"""
import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks import common  # noqa: E402

PAPER = {"default": 102, "without TESA": 94, "without RMS": 99, "zigzag for RMS": 144, "without MA-branch": 65, "without review": 98}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("tiny", "small", "4b"), default="tiny")
    parser.add_argument("--seconds", type=int, default=17, help="length of the clip, at 16 frames a second (default 17)")
    parser.add_argument("--pixels", type=int, default=512, help="height and width of the clip, for presets of latents (default 512)")
    parser.add_argument("--depth", type=int, help="fewer blocks than the preset's, where time is short; 4 are one turn of the scan")
    parser.add_argument("--rounds", type=int, default=11, help="how often each is timed (default 11)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: in bfloat16")
    parser.add_argument("--out", default=str(common.RESULTS), help="folder of the CSV")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.pixels % 16 or not 16 <= args.pixels <= 4096 or min(args.seconds, args.rounds, 1 if args.depth is None else args.depth) < 1:
        parser.error("--pixels must be a multiple of 16 up to 4096, --seconds, --rounds and --depth at least 1")
    dtype, depth = torch.float32 if args.device == "cpu" else torch.bfloat16, {"depth": args.depth} if args.depth else {}
    steps = {}
    for name in PAPER:
        model = common.build(args.preset, args.device, dtype, **common.VARIANTS[name], **depth)
        shape = common.clip_shape(model.config, args.seconds, args.pixels)
        steps[name] = common.denoising_step(model, shape)
    print(f"{args.preset}, {model.config.depth} blocks of {model.config.d_model}, {common.tokens(model.config, shape):,} tokens, "
          f"{args.device}, {torch.get_num_threads()} threads\n")
    taken = {name: [] for name in PAPER}
    for round_ in tqdm(range(args.rounds + 1), unit="round", leave=False, disable=None):
        for name, step in steps.items():
            second = common.seconds(step, args.device)
            if round_:                                              # the first warms up
                taken[name].append(second)
    table = common.Table(Path(args.out) / f"parts_{args.preset}_{args.device}.csv")
    for name, paper in PAPER.items():
        relative = [mine / default for mine, default in zip(taken[name], taken["default"])]
        low, _, high = statistics.quantiles(relative, n=4, method="inclusive") if args.rounds > 1 else relative * 3
        table.add(variant=name, seconds=round(statistics.median(taken[name]), 3), relative=round(statistics.median(relative), 2),
                  low=round(low, 2), high=round(high, 2), paper_s=paper, paper=round(paper / PAPER["default"], 2))
    table.wrote()


if __name__ == "__main__":
    common.keep_memory()
    common.run(main, "parts.py")
