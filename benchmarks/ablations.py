"""What each part of LinGen buys (figs. 11 and 12): trained with one part taken out, and judged.

    python benchmarks/ablations.py                                  five minutes a row, 21 rows
    python benchmarks/ablations.py --seeds 1 --variants default "without TESA"      for a class

Each variant changes one field of LinGenConfig. All are trained from random weights, on the same
data for the same seed. So that a row takes minutes, the world is smaller than that of the toy:
16 x 16 pixels, circles only. Training goes from pictures over 4 and 16 to 64 and 256 frames.

Measured on the mean of the weights (EMA), for 16, 64 and 256 frames of held-out combinations:

    loss       that of the training, of the same clips, times and noise for all
    direction  share of sampled clips with the right mean direction
    one path   share of their frames that agree where the circle is: within a pixel of one path
    right      share of their frames that are right by the strict judge

Rows in the CSV are not made again.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm import tqdm

import lingen
import sample as sampler
import train_tiny
from benchmarks import common
from toy import judge, shapes

VARIANTS = {**common.VARIANTS, "DiT": dict(mixer="attention")}
LENGTHS = (16, 64, 256)  # frames
WORLD = dict(size=16, kinds=1)  # pixels, shapes
SMALL = dict(grid=(0, 4, 4), pool=(2, 2, 2))  # fields of the config
COLUMNS = [f"{name}_{n}" for name in ("loss", "direction", "path", "right") for n in LENGTHS]


def new_run(changes, steps, seed, device="cpu"):
    """The run of train_tiny.py, with some fields of the config changed."""
    settings = {"steps": steps, "seed": seed, "rate": train_tiny.RATE}
    return train_tiny.Run(lingen.preset("tiny", **changes), settings, torch.device(device))


def clip_length(step, steps):
    """Frames of the clips of a step: longer and longer, and shorter ones among them."""
    part = step / steps
    if part < 0.1 or step % train_tiny.PICTURES_EVERY == 0:
        return 1
    if part < 0.2:
        return 4
    reached = LENGTHS[: 1 + (part >= 0.45) + (part >= 0.7)]
    return reached[step % len(reached)]  # in turn


def small_batch(frames, seed, step):
    """The random data of a step in the small world, as train_tiny.training_batch gives it."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    n = max(1, 128 // max(frames, 2))  # 1,024 tokens; a clip of 256 frames has 2,048
    clips, captions, _ = shapes.make_batch(n, frames, generator, **WORLD)
    t = train_tiny.draw_times(n, frames, generator)
    noise = torch.randn(clips.shape, generator=generator)
    return clips, sampler.encode(captions, shapes.WORDS), t, noise


def held_out_loss(model, frames, n=32):
    """The training loss on held-out combinations: the same clips, times and noise for all."""
    generator = torch.Generator().manual_seed(20_000_003 + frames)
    clips, captions, _ = shapes.make_batch(n, frames, generator, held_out_only=True, **WORLD)
    t = train_tiny.draw_times(n, frames, generator)
    noise = torch.randn(clips.shape, generator=generator)
    parts = zip(*(x.split(4) for x in (clips, sampler.encode(captions, shapes.WORDS), t, noise)))
    with torch.no_grad():
        losses = [train_tiny.flow_matching_loss(model, *part) for part in parts]
    return torch.stack(losses).mean().item()


def sample_and_judge(model, n, frames=16, seed=0, size=shapes.SIZE, kinds=4):
    """n held-out combinations -> their specs (n, 3), a sampled clip of each, the verdict on it."""
    generator = torch.Generator().manual_seed(30_000_001 + seed)
    specs = shapes.random_specs(n, generator, held_out_only=True, kinds=kinds)
    captions = [shapes.caption(spec) for spec in specs]
    settings = vars(sampler.Settings(frames=frames, height=size, width=size, seed=seed))
    clips = train_tiny.sample_captions(model, captions, shapes.WORDS, settings)
    return specs, clips, judge.judge(clips, specs)


def share_on_one_path(centre, specs, size):
    """The most frames that one path joins: centres (b, frames, 2), specs (b, 3) -> shares (b,).

    Each frame tells where its path began: at the centre, less one step for each frame before it.
    Frames belong together if these places are at most a pixel apart.
    """
    steps = torch.arange(centre.shape[1])[:, None] * shapes.STEPS[specs[:, 2]][:, None]
    began = centre - steps  # (b, frames, 2)
    apart = shapes.wrap(began[:, :, None] - began[:, None], size).norm(dim=3)  # (b, frames, frames)
    return (apart <= 1).double().mean(2).amax(1)


def measure(model, captions):
    """COLUMNS -> numbers, and a clip of the greatest length. Of longer clips fewer are judged."""
    row = {}
    for frames in LENGTHS:
        row[f"loss_{frames}"] = held_out_loss(model, frames)
        n = max(1, round(captions * (16 / frames) ** 0.5))
        specs, clips, verdict = sample_and_judge(model, n, frames, **WORLD)
        verdict["path"] = share_on_one_path(verdict["centre"], specs, WORLD["size"])
        for name in ("direction", "path", "right"):
            row[f"{name}_{frames}"] = verdict[name].double().mean().item()
    return {name: round(row[name], 4) for name in COLUMNS}, clips[0]


def summarise(rows, path):
    """One row for each variant: mean and standard deviation over the seeds; shares in %."""
    table = common.Table(path)
    for variant in VARIANTS:
        own, cells = [row for row in rows if row["variant"] == variant], {}
        for name in COLUMNS if own else ():
            scale, digits = (1, 3) if name.startswith("loss") else (100, 0)
            values = [scale * float(row[name]) for row in own]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells[name] = f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"
        if own:
            table.add(variant=variant, seeds=len(own), **cells)


def clip_file(folder, variant, seed):
    return folder / f"{variant.replace(' ', '-')}-{seed}.npy"


def draw(files):
    """The clip of each variant in one picture: each column of pixels is a frame, from above."""
    clips = {name: np.load(path) for name, path in files.items()}  # (frames, y, x, 3)
    above = [np.pad(clip.max(1).transpose(1, 0, 2), ((0, 2), (0, 0), (0, 0)), constant_values=255)
             for clip in clips.values()]  # (x, frames, 3), and a white line  # fmt: skip

    def panel(axis):
        axis.imshow(np.concatenate(above), interpolation="nearest", aspect="auto")
        middles = (np.arange(len(above)) + 0.5) * len(above[0]) - 1
        axis.set(xlabel="frame", yticks=middles, yticklabels=list(clips))
        axis.grid(False)

    return panel


def main():
    parser = common.parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=900, help="of training (default 900)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--captions", type=int, default=24, help="judged at 16 frames (default 24)")
    names = list(VARIANTS)
    parser.add_argument("--variants", nargs="+", default=names, choices=names, metavar="VARIANT")
    args = common.arguments(parser)
    table = common.Table(args.out / "ablations.csv", resume=True)
    settings = {"steps": str(args.steps), "captions": str(args.captions)}
    if any(row[name] != value for row in table.rows for name, value in settings.items()):
        raise ValueError(f"{table.path} holds rows of other settings; give another --out")
    done = {(row["variant"], int(row["seed"])) for row in table.rows}
    for seed in range(args.seeds):
        for variant in args.variants:
            if (variant, seed) in done:
                continue
            run = new_run({**SMALL, **VARIANTS[variant]}, args.steps, seed)
            for step in tqdm(range(args.steps), f"{variant}, {seed}", leave=False, disable=None):
                run.advance(small_batch(clip_length(step, args.steps), seed, step))
            row, clip = measure(run.average, args.captions)
            sampler.write_clip(clip_file(args.out, variant, seed), sampler.to_frames(clip))
            table.add(variant=variant, seed=seed, **settings, **row)
    print()
    summarise(table.rows, args.out / "ablations_summary.csv")
    last = {variant: clip_file(args.out, variant, args.seeds - 1) for variant in args.variants}
    common.plot(args.out / "ablations.png", draw(last), width=9)


if __name__ == "__main__":
    common.run(__file__, main)
