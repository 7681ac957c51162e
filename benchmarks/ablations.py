"""What each part of LinGen buys (figs. 11 and 12): trained with one part taken out, and judged.

    python benchmarks/ablations.py                                   an hour a row, 21 rows
    python benchmarks/ablations.py --steps 150 --seeds 1 --captions 8            for a class
    python benchmarks/ablations.py --init runs/short.pt --frames 16 64 256 --steps 600 --rate 2e-3

Each variant changes one field of LinGenConfig. All are trained by the recipe of train_tiny.py, on
the same data for the same seed: from random weights, or (--init) from those that a checkpoint has
for the parts that are left. Measured on the mean of the weights (EMA), for clips of 16, 64 and 256
frames of held-out combinations: the loss, and the judge's verdict on sampled clips: the share of
clips with the right direction, and of frames that are right. Rows in the CSV are not made again.
"""

import dataclasses
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

import lingen
import sample as sampler
import train_tiny
from benchmarks import common
from toy import judge, shapes

VARIANTS = {**common.VARIANTS, "DiT": dict(mixer="attention")}
LENGTHS = (16, 64, 256)  # frames; the last two are longer than the recipe's clips
MEASURED = [f"{name}_{frames}" for frames in LENGTHS for name in ("loss", "direction", "right")]


def new_run(changes, steps, seed, device="cpu", rate=train_tiny.RATE, frames=None, init=None):
    """The run of train_tiny.py, with some fields of the config changed."""
    settings = {"steps": steps, "seed": seed, "rate": rate, "frames": frames}
    weights = init and sampler.load_checkpoint(init)["weights"]
    return train_tiny.Run(lingen.preset("tiny", **changes), settings, torch.device(device), weights)


def held_out_loss(model, frames, n=32):
    """The training loss on held-out combinations: the same clips, times and noise for all."""
    generator = torch.Generator().manual_seed(20_000_003 + frames)
    n = max(4, n * 16 // frames)
    clips, captions, _ = shapes.make_batch(n, frames, generator, held_out_only=True)
    t = train_tiny.draw_times(n, frames, generator)
    noise = torch.randn(clips.shape, generator=generator)
    text = sampler.encode(captions, shapes.WORDS)
    with torch.no_grad():
        return train_tiny.flow_matching_loss(model, clips, text, t, noise).item()


def sample_and_judge(model, n, frames=16, seed=0):
    """The judge's verdict on clips of n held-out captions."""
    generator = torch.Generator().manual_seed(30_000_001 + seed)
    specs = shapes.random_specs(n, generator, held_out_only=True)
    captions = [shapes.caption(spec) for spec in specs]
    settings = dataclasses.asdict(sampler.Settings(frames=frames, seed=seed))
    clips = train_tiny.sample_captions(model, captions, shapes.WORDS, settings)
    return judge.judge(clips, specs)


def measure(model, captions):
    """A row: for longer clips fewer captions, so that the number of frames is the same."""
    row = {}
    for frames in LENGTHS:
        verdict = sample_and_judge(model, max(1, captions * 16 // frames), frames)
        row[f"loss_{frames}"] = round(held_out_loss(model, frames), 5)
        for name in ("direction", "right"):
            row[f"{name}_{frames}"] = round(verdict[name].double().mean().item(), 3)
    return row


def summarise(rows, path):
    """One row for each variant: mean and standard deviation over the seeds."""
    table = common.Table(path)
    for variant in VARIANTS:
        own, cells = [row for row in rows if row["variant"] == variant], {}
        for name in MEASURED if own else ():
            values = [float(row[name]) for row in own]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells[name] = f"{statistics.mean(values):.3f} ± {spread:.3f}"
        if own:
            table.add(variant=variant, seeds=len(own), **cells)


def main():
    parser = common.parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=train_tiny.STEPS, help="of training")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--captions", type=int, default=64, help="judged a row (default 64)")
    names = list(VARIANTS)
    parser.add_argument("--variants", nargs="+", default=names, choices=names, metavar="VARIANT")
    parser.add_argument("--init", metavar="CHECKPOINT", help="begin with its weights")
    parser.add_argument("--frames", type=int, nargs="+", help="as in train_tiny.py")
    parser.add_argument("--rate", type=float, default=train_tiny.RATE, help="learning rate")
    args = common.arguments(parser)
    table = common.Table(args.out / "ablations.csv", resume=True)
    how = dict(rate=args.rate, frames=args.frames, init=args.init)
    settings = {name: str(value) for name, value in how.items()}
    settings |= {"steps": str(args.steps), "captions": str(args.captions)}
    if any(row[name] != value for row in table.rows for name, value in settings.items()):
        raise ValueError(f"{table.path} holds rows of other settings; give another --out")
    done = {(row["variant"], int(row["seed"])) for row in table.rows}
    for seed in range(args.seeds):
        for variant in args.variants:
            if (variant, seed) in done:
                continue
            run = new_run(VARIANTS[variant], args.steps, seed, **how)
            for _ in tqdm(range(args.steps), desc=f"{variant}, {seed}", leave=False, disable=None):
                run.advance()
            measured = measure(run.average, args.captions)
            table.add(variant=variant, seed=seed, **settings, **measured)
    print()
    summarise(table.rows, args.out / "ablations_summary.csv")


if __name__ == "__main__":
    common.run(__file__, main)
