"""Claim: LinGen adapts faster to longer clips than the DiT (LinGen fig. 10). Loss over the steps after the move.

    python benchmarks/adapt.py                            16 frames, then 64; two seeds each: a quarter of an hour on one core
    python benchmarks/adapt.py --frames 4 --steps 100     shorter clips, fewer steps

Both learn clips of --frames by train_tiny's own loop, pictures first, and then clips four times as long, at a steady learning
rate. Before the move and every few steps after it: the loss on long clips of held-out combinations. Both have position
tables made for the short clips and stretched for the long ones, as the paper's have: only the mixer differs. (The tiny preset
itself has none, and would have nothing to adapt.) Each run is a process of its own with one thread.
"""
import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import train_tiny  # noqa: E402
from benchmarks import ablations, common  # noqa: E402
from lingen import preset  # noqa: E402

MODELS = {"LinGen": "mate", "DiT": "attention"}


def child(model, seed, frames, steps, every):
    """One run, in this process: the loss on long clips after 0, every, 2 every, ... steps on them."""
    torch.set_float32_matmul_precision("medium")
    planned, clips = 4 * steps, 256 // frames                   # the plateau of the learning rate ends at 0.6 of it
    config = preset("tiny", vocab_size=len(train_tiny.VOCABULARY), mixer=MODELS[model], grid=(frames // 4, 8, 8))
    run = train_tiny.Run(config, dict(steps=planned, seed=seed, objects=1, rate=2e-3), torch.device("cpu"))
    # The same share of steps on pictures as in the recipe; no short clips among the long: they would blur the move.
    stage = train_tiny.Stage
    train_tiny.STAGES = (stage(1, 64, 0.05), stage(frames, clips, 0.20), stage(4 * frames, clips // 4, 0.75))
    train_tiny.LONG_EVERY = 1
    train_tiny.PERIOD = 0                                       # every frame has noise of its own, as in ablations.py
    losses = []
    for step in tqdm(range(2 * steps + 1), desc=f"{model}, seed {seed}", leave=False, disable=None):
        if step >= steps and (step - steps) % every == 0:
            losses.append(ablations.validation_loss(run.model, 4 * frames))
        if step < 2 * steps:
            run.advance()
    return losses


def draw(rows):
    def panel(axis):
        for model, colour in zip(MODELS, common.COLOURS):
            own = [row for row in rows if row["model"] == model]
            for seed in sorted({row["seed"] for row in own}):
                line = [(int(row["step"]), float(row["loss"])) for row in own if row["seed"] == seed]
                axis.plot(*zip(*line), color=colour, marker=".", label=model if seed == "0" else None)
        axis.set(xlabel="steps after the move to clips 4 times as long", ylabel="loss on long clips")
        axis.legend()
    return panel


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=16, choices=(4, 16, 64), help="of the short clips (default 16)")
    parser.add_argument("--steps", type=int, default=150, help="before the move, and as many after it (default 150)")
    parser.add_argument("--every", type=int, default=10, help="steps from one measurement to the next (default 10)")
    parser.add_argument("--seeds", type=int, default=2, help="how many (default 2)")
    parser.add_argument("--plot", default=str(common.ASSETS / "adapt.png"))
    args = common.arguments(parser, child)
    if min(args.steps, args.every, args.seeds) < 1:
        parser.error("--steps, --every and --seeds must be at least 1")
    curves = common.Table(Path(args.out) / "adapt_curves.csv", quiet=True)
    for seed in tqdm(range(args.seeds), unit="seed", leave=False, disable=None):
        for model in MODELS:
            losses = common.in_fresh_process(__file__, threads=1, model=model, seed=seed, frames=args.frames, steps=args.steps,
                                             every=args.every)
            for number, loss in enumerate(losses):
                curves.add(model=model, seed=seed, step=number * args.every, loss=round(loss, 5))
    curves.wrote()
    table = common.Table(Path(args.out) / "adapt.csv")
    steps = sorted({int(row["step"]) for row in curves.rows})
    for step in steps[:: max(1, len(steps) // 5)]:
        here = [row for row in curves.rows if int(row["step"]) == step]
        ours, dit = (statistics.mean(float(row["loss"]) for row in here if row["model"] == model) for model in MODELS)
        table.add(step=step, lingen_loss=round(ours, 4), dit_loss=round(dit, 4), dit_over_lingen=round(dit / ours, 3))
    table.wrote()
    common.plot(args.plot, draw(curves.rows))


if __name__ == "__main__":
    common.run(main, "adapt.py")
