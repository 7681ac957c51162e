"""How right the clips are over the time of training, for several seeds.

    python benchmarks/progress.py                         three default runs, three hours
    python benchmarks/progress.py --steps 1600 --every 400               an hour on one core
    python benchmarks/progress.py --steps 200 --seeds 1 --every 50 --captions 8          for a class

Judged are clips of held-out captions, sampled from the mean of the weights (EMA). The time is that
of the training alone.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from benchmarks import ablations, common
from toy import judge
from train_tiny import STEPS

SHARES = ("colour", "shape", "direction", "lenient", "strict")


def draw(rows):
    def panel(axis):
        for name, colour in zip(SHARES, common.COLOURS):
            for seed in sorted({row["seed"] for row in rows}):
                own = [row for row in rows if row["seed"] == seed]
                minutes = [float(row["minutes"]) for row in own]
                shares = [100 * float(row[name]) for row in own]
                axis.plot(minutes, shares, color=colour, label=name if seed == "0" else None)
        axis.set(xlabel="minutes of training", ylabel="% of clips right", ylim=(0, 103))
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)  # above the lines

    return panel


def train_and_judge(add, run, every, captions):
    """Train to the end, and add a row with the judge's verdict every few steps."""
    steps, seed, taken = run.settings["steps"], run.settings["seed"], 0.0
    for step in tqdm(range(1, steps + 1), desc=f"seed {seed}", leave=False, disable=None):
        start = time.monotonic()
        run.advance()
        taken += time.monotonic() - start
        if step % every == 0 or step == steps:
            mean = judge.summary(ablations.sample_and_judge(run.average, captions))
            shares = {name: round(mean[name], 3) for name in (*SHARES, "overlap")}
            add(seed=seed, step=step, minutes=round(taken / 60, 2), **shares)


def main():
    parser = common.parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--every", type=int, default=500, help="steps from verdict to verdict")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--captions", type=int, default=32, help="judged each time (default 32)")
    args = common.arguments(parser)
    table = common.Table(args.out / "progress.csv")
    for seed in range(args.seeds):
        run = ablations.new_run({}, args.steps, seed)
        train_and_judge(table.add, run, args.every, args.captions)
    common.plot(args.out / "progress.png", draw(table.rows))


if __name__ == "__main__":
    common.run(__file__, main)
