"""Claim: LinGen adapts faster to longer clips than the DiT (LinGen fig. 10). Loss and accuracy over the steps after the move.

    python benchmarks/adapt.py                                              16 frames, then 64; three seeds each: over an hour of one core
    python benchmarks/adapt.py --steps 100 --seeds 1 --out runs/adapt --plot runs/adapt.png       for a class: minutes

All learn clips of --frames by train_tiny's own loop, pictures first, and then clips four times as long, at a steady learning
rate. Before the move and every few steps after it: the loss on long clips of held-out combinations, and at the start, in the middle
and at the end the share of their seconds that move as told. Both are measured on the average of the weights (its memory is a tenth
of the steps). All have position tables made for the short clips and stretched for the long ones, as the paper's have; the tiny
preset has none, and would have nothing to adapt. LinGen's TESA has the toy's drift besides, which the paper does not have:
"without drift" leaves it out, so that from there to the DiT only the mixer differs. Each run is a process of its own with one
thread; runs that stand in the CSV are not made again.
"""
import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import sample  # noqa: E402
import train_tiny  # noqa: E402
from benchmarks import ablations, common, judge  # noqa: E402
from lingen import preset  # noqa: E402

MODELS = {"LinGen": {}, "without drift": dict(travel=False), "DiT": dict(mixer="attention")}


def moves_as_told(model, captions, frames, seed):
    """Sampled clips of held-out combinations, judged second by second: the share that moves as its caption says."""
    _, texts, _ = train_tiny.make_batch(captions, 2, torch.Generator().manual_seed(30_000_001 + seed), held_out_only=True, speeds=True)
    right = []
    for clips, said in judge.clips_for(model, texts, frames, sample.steps_for(train_tiny.SAMPLING) | {"period": 0, "views": 1}, seed):
        seconds = clips.unflatten(2, (-1, 16)).transpose(1, 2).flatten(0, 1)               # (n frames / 16, 3, 16, h, w)
        records = judge.judge(seconds, [text for text in said for _ in range(frames // 16)])
        right += [record["direction_ok"] for record in records]
    return sum(right) / len(right)


def child(model, seed, frames, steps, every, captions):
    """One run, in this process: [loss, share that moves as told or None] after 0, every, 2 every, ... steps on long clips."""
    torch.set_float32_matmul_precision("medium")
    planned, clips = 4 * steps, 256 // frames                   # the plateau of the learning rate ends at 0.6 of it
    config = preset("tiny", vocab_size=len(train_tiny.VOCABULARY), grid=(frames // 4, 8, 8), **MODELS[model])
    run = train_tiny.Run(config, dict(steps=planned, seed=seed, objects=1, rate=2e-3), torch.device("cpu"))
    # The same share of steps on pictures as in the recipe; no short clips among the long: they would blur the move.
    stage = train_tiny.Stage
    train_tiny.STAGES = (stage(1, 64, 0.05), stage(frames, clips, 0.20), stage(4 * frames, clips // 4, 0.75))
    train_tiny.LONG_EVERY = 1
    train_tiny.PERIOD = 0                                       # every frame has noise of its own, as in ablations.py
    last, measured = steps // every, []
    for step in tqdm(range(2 * steps + 1), desc=f"{model}, seed {seed}", leave=False, disable=None):
        if step >= steps and (step - steps) % every == 0:
            average = run.averaged()
            average.vocabulary = train_tiny.VOCABULARY
            judged = len(measured) in (0, last // 2, last)
            measured.append((ablations.validation_loss(average, 4 * frames),
                             moves_as_told(average, captions, 4 * frames, seed) if judged else None))
        if step < 2 * steps:
            run.advance()
    return measured


def draw(rows):
    def panels(*axes):
        for axis, name, title in zip(axes, ("loss", "moves"), ("loss on long clips", "share of seconds that move as told")):
            for model, colour in zip(MODELS, common.COLOURS):
                own = [row for row in rows if row["model"] == model and row[name]]
                for seed in sorted({row["seed"] for row in own}):
                    line = [(int(row["step"]), float(row[name])) for row in own if row["seed"] == seed]
                    axis.plot(*zip(*line), color=colour, marker=".", label=model if seed == "0" else None)
            axis.set(xlabel="steps after the move to clips 4 times as long", ylabel=title)
            axis.legend()
    return panels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=16, choices=(4, 16, 64), help="of the short clips (default 16)")
    parser.add_argument("--steps", type=int, default=400, help="before the move, and as many after it (default 400)")
    parser.add_argument("--every", type=int, default=20, help="steps from one measurement to the next (default 20)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--captions", type=int, default=8, help="sampled and judged at the start, in the middle and at the end (default 8)")
    parser.add_argument("--plot", default=str(common.ASSETS / "adapt.png"))
    args = common.arguments(parser, child)
    if min(args.steps, args.every, args.seeds, args.captions) < 1:
        parser.error("--steps, --every, --seeds and --captions must be at least 1")
    settings = dict(frames=args.frames, steps=args.steps, every=args.every, captions=args.captions)
    curves = common.going_on(parser, Path(args.out) / "adapt_curves.csv", settings, quiet=True)
    done = {(row["model"], int(row["seed"])) for row in curves.rows}
    wanted = [(model, seed) for seed in range(args.seeds) for model in MODELS if (model, seed) not in done]
    for model, seed in tqdm(wanted, unit="run", leave=False, disable=None):
        measured = common.in_fresh_process(__file__, threads=1, model=model, seed=seed, **settings)
        for number, (loss, moves) in enumerate(measured):
            curves.add(model=model, seed=seed, **settings, step=number * args.every, loss=round(loss, 5), moves=moves)
    curves.wrote()
    table, last = common.Table(Path(args.out) / "adapt.csv"), args.steps // args.every
    for step in sorted({number * last // 4 * args.every for number in range(5)}):
        means = {}
        for model in MODELS:
            here = [row for row in curves.rows if row["model"] == model and int(row["step"]) == step]
            means[model] = [statistics.mean(float(row[name]) for row in here) if here[0][name] else None for name in ("loss", "moves")]
        losses = {f"{model} loss": f"{loss:.4f}" for model, (loss, _) in means.items()}
        moves = {f"{model} moves": share if share is None else f"{share:.2f}" for model, (_, share) in means.items()}
        table.add(step=step, **losses, dit_over_without_drift=round(means["DiT"][0] / means["without drift"][0], 2), **moves)
    table.wrote()
    common.plot(args.plot, draw(curves.rows), panels=2)


if __name__ == "__main__":
    common.run(main, "adapt.py")
