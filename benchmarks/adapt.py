"""Claim: LinGen adapts faster to longer clips than the DiT (fig. 10).

    python benchmarks/adapt.py                               three seeds of each: half an hour
    python benchmarks/adapt.py --steps 100 --seeds 1         for a class

Both learn pictures and clips of 16 frames, and then clips of 64, in the small world of
ablations.py. From the move on, the loss on new clips of 64 frames is measured every few steps, on
the mean of the weights. The fall of a model is the part, in %, of its own gain until the last step.
Both have a position table along time, made for 16 frames and stretched to 64, as the paper's models
have. The DiT also has RoPE over the whole clip, LinGen only inside the windows. A window holds a
whole clip of 16 frames. Rows in adapt_curves.csv are not made again.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

import train_tiny
from benchmarks import ablations, common

SHORT, LONG = 16, 64  # frames
MODELS = {"LinGen": dict(window=(SHORT // 2, 4, 4)), "DiT": dict(mixer="attention")}


def losses_after_the_move(model, steps, every, seed):
    """[(step after the move, loss)] of a run: `steps` on short clips, then as many on long ones."""
    changes = {**ablations.SMALL, "grid": (SHORT // 2, 4, 4), **MODELS[model]}
    # The last half of these steps is never reached: the learning rate stays at its plateau.
    run = ablations.new_run(changes, 4 * steps, seed)
    losses = []
    for step in tqdm(range(2 * steps + 1), desc=f"{model}, {seed}", leave=False, disable=None):
        if step >= steps and (step - steps) % every == 0:
            loss = ablations.loss_on_new_clips(run.average, LONG)
            losses.append((step - steps, loss))
        if step < 2 * steps:
            frames = SHORT if step < steps else LONG
            still = step < steps / 5 or step % train_tiny.PICTURES_EVERY == 0
            ablations.train_step(run, 1 if still else frames)
    return losses


def draw(rows):
    def panel(axis):
        for model, colour in zip(MODELS, common.COLOURS):
            own = [row for row in rows if row["model"] == model]
            for seed in sorted({row["seed"] for row in own}):
                line = [row for row in own if row["seed"] == seed]
                steps, losses = ([float(row[name]) for row in line] for name in ("step", "loss"))
                axis.plot(steps, losses, color=colour, label=model if seed == "0" else None)
        axis.set(xlabel=f"steps after the move to {LONG} frames", ylabel="loss on new clips")
        axis.legend()

    return panel


def main():
    parser = common.parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=500, help="before the move, and after it")
    parser.add_argument("--every", type=int, default=50, help="steps between measurements")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    args = common.arguments(parser)
    how = {"steps": args.steps, "every": args.every}
    table = common.Table(args.out / "adapt_curves.csv", resume=True, **how)
    for seed in range(args.seeds):
        for model in MODELS:
            if not table.find(model=model, seed=seed):
                for step, loss in losses_after_the_move(model, args.steps, args.every, seed):
                    table.add(model=model, seed=seed, **how, step=step, loss=round(loss, 5))
    print()
    losses = {}  # (model, step) -> of each seed
    for row in table.rows:
        losses.setdefault((row["model"], int(row["step"])), []).append(float(row["loss"]))
    mean = {key: statistics.mean(values) for key, values in losses.items()}
    steps, means = sorted({step for _, step in mean}), common.Table(args.out / "adapt.csv")
    for step in steps:
        row = {}
        for model in MODELS:
            first, now, last = (mean[model, at] for at in (0, step, steps[-1]))
            row[model] = round(now, 4)
            row[f"{model}_fall"] = round(100 * (first - now) / ((first - last) or 1))
        means.add(step=step, **row)
    common.plot(args.out / "adapt.png", draw(table.rows))


if __name__ == "__main__":
    common.run(__file__, main)
