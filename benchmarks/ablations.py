"""What each part of LinGen adds (figs. 11 and 12): trained with one part taken out, and judged.

    python benchmarks/ablations.py                                  ten minutes a row, 24 rows
    python benchmarks/ablations.py --steps 700 --seeds 1 --variants default "without RMS"

Each variant changes one field of LinGenConfig. All are trained from random weights for the same
number of steps, on the same data for the same seed. So that a row takes minutes, the world is
smaller than that of the toy: 16 x 16 pixels, circles only. A TESA window has 8 frames of the whole
picture; one variant has 32. Training goes from pictures to clips of 4, 16, 64 and 256 frames.
Measured on the mean of the weights (EMA), for 16, 64 and 256 frames:

    loss       that of the training, on new clips, with the same times and noise for all variants
    direction  share of sampled clips whose mean step is right to half a pixel
    steady     share of their steps that are right to half a pixel
    path       share of their frames on one path, see share_on_one_path
    right      share of their frames that are right by the judge, with the step that leads to them

Rows in the CSV are not made again. The folder ablations/ beside it has a checkpoint of each run.
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

VARIANTS = {
    **common.VARIANTS,
    "windows of 32 frames": dict(window=(16, 4, 4)),
    "DiT": dict(mixer="attention"),
}
LENGTHS = (16, 64, 256)  # frames
WORLD = dict(size=16, n_shapes=1)  # pixels; circles
SMALL = dict(grid=(0, 4, 4), pool=(2, 2, 2), window=(4, 4, 4))  # fields of the config
SAMPLING = vars(sampler.Settings(frames=64, height=16, width=16, steps=24))
SHARES = ("direction", "steady", "path", "right")
COLUMNS = [f"{name}_{frames}" for name in ("loss", *SHARES) for frames in LENGTHS]


def new_run(changes, steps, seed, device="cpu"):
    """The run of train_tiny.py, with some fields of the config changed."""
    settings = {"steps": steps, "seed": seed, "rate": train_tiny.RATE}
    return train_tiny.Run(lingen.preset("tiny", **changes), settings, torch.device(device))


def clip_length(step, steps):
    """Frames of the clips of a step: 1, 4, 16, 64, 256, each from a part of the steps on.

    Every eighth step is on pictures. From 16 frames on, the lengths reached so far take turns.
    """
    part = step / steps
    if part < 0.1 or step % train_tiny.PICTURES_EVERY == 0:
        return 1
    if part < 0.2:
        return 4
    reached = LENGTHS[: 1 + (part >= 0.45) + (part >= 0.7)]
    return reached[step % len(reached)]


def without_colour(text):
    """Word numbers (b, n) with padding in place of the words of colour, which come first."""
    return text.masked_fill(text <= len(shapes.COLOURS), 0)


def small_batch(n, frames, seed):
    """Random data of a step in the small world: clips, text (n, words), t (n,), noise."""
    generator = torch.Generator().manual_seed(seed)
    clips, captions, _ = shapes.make_batch(n, frames, generator, **WORLD)
    t = train_tiny.draw_times(n, frames, generator)
    noise = torch.randn(clips.shape, generator=generator)
    return clips, sampler.encode(captions, shapes.WORDS), t, noise


def train_step(run, frames, named=True):
    """A step on clips of so many frames: 1,024 tokens, or one clip of 256 frames (2,048)."""
    n = max(1, 128 // max(frames, 2))
    clips, text, *rest = small_batch(n, frames, 1_000_003 * run.settings["seed"] + run.step)
    return run.advance((clips, text if named else without_colour(text), *rest))


def train(variant, seed, steps, named=True, **changes):
    """A finished run of a variant. named: captions name the colour. changes: of SMALL."""
    run = new_run({**SMALL, **changes, **VARIANTS[variant]}, steps, seed)
    for step in tqdm(range(steps), f"{variant}, {seed}", leave=False, disable=None):
        train_step(run, clip_length(step, steps), named)
    return run


def loss_on_new_clips(model, frames, n=32):
    """The training loss on clips, times and noise that are the same for all models."""
    batch = small_batch(n, frames, seed=900_000_000 + frames)
    with torch.no_grad():
        losses = [
            train_tiny.flow_matching_loss(model, *part)
            for part in zip(*(tensor.split(4) for tensor in batch))
        ]
    return torch.stack(losses).mean().item()


def sample_and_judge(model, n):
    """The judge's verdict on clips of n held-out captions of the toy."""
    generator = torch.Generator().manual_seed(30_000_001)
    specs = shapes.random_specs(n, generator, held_out_only=True)
    captions = [shapes.caption(spec) for spec in specs]
    settings = vars(sampler.Settings())
    return judge.judge(train_tiny.sample_captions(model, captions, shapes.WORDS, settings), specs)


def small_specs(n):
    """Specs (n, 3) of circles: each direction equally often, colours in turn, none held out."""
    specs = torch.cartesian_prod(torch.arange(6), torch.tensor([0]), torch.arange(8))
    by_direction = [specs[(specs[:, 2] == d) & ~shapes.held_out(specs)] for d in range(8)]
    return torch.stack([by_direction[i % 8][(i + i // 8) % 5] for i in range(n)])


def share_on_one_path(centre, told, size):
    """The most frames that one path joins: centres (b, frames, 2), told (b, 2) -> shares (b,).

    The path goes through one of the frames by the step that is told; of all these paths the best
    counts. A frame is on it if its centre is less than 0.9 pixels away.
    """
    began = centre - torch.arange(centre.shape[1])[:, None] * told[:, None]  # where the path began
    apart = shapes.wrap(began[:, :, None] - began[:, None], size).norm(dim=3)  # (b, frames, frames)
    return (apart < 0.9).double().mean(2).amax(1)


def shares(verdict, specs, size):
    """SHARES of clips that the judge has seen: tensors (b,), of numbers from 0 to 1."""
    centre, told = verdict["centre"], shapes.STEPS[specs[:, 2]]  # NaN where no shape was found
    steps = shapes.wrap(centre.diff(dim=1), size)  # (b, frames - 1, 2)
    return {
        "direction": (steps.nanmean(1) - told).norm(dim=1) <= judge.JUMP,
        "steady": ((steps - told[:, None]).norm(dim=2) <= judge.JUMP).double().mean(1),
        "path": share_on_one_path(centre, told, size),
        "right": verdict["right"].double().mean(1),
    }


def measure(model, seed, captions):
    """COLUMNS -> numbers, and a clip of the most frames. Of longer clips a third is sampled."""
    row = {}
    for frames in LENGTHS:
        row[f"loss_{frames}"] = loss_on_new_clips(model, frames)
        specs = small_specs(captions if frames == 16 else max(1, captions // 3))
        words = [shapes.caption(spec) for spec in specs]
        changes = {**SAMPLING, "frames": frames, "seed": 1000 * seed}
        clips = train_tiny.sample_captions(model, words, shapes.WORDS, changes)
        for name, values in shares(judge.judge(clips, specs), specs, WORLD["size"]).items():
            row[f"{name}_{frames}"] = values.double().mean().item()
    return {name: round(row[name], 4) for name in COLUMNS}, sampler.to_frames(clips[0])


def train_and_measure(variant, seed, steps, captions, path):
    """A row of the table. Writes a checkpoint to path, and beside it the clip as .npy."""
    run = train(variant, seed, steps)
    row, clip = measure(run.average, seed, captions)
    trained = {"frames": [1, 4, *LENGTHS], "height": [WORLD["size"]], "width": [WORLD["size"]]}
    state = {**run.state(), "training": None, "sampling": SAMPLING, "trained": trained}
    train_tiny.write_checkpoint(path, state)
    sampler.write_clip(path.with_suffix(".npy"), clip)
    return {"parameters": sum(p.numel() for p in run.model.parameters()), **row}


def summarise(rows, path, columns=COLUMNS):
    """One row for each variant: mean ± standard deviation over the seeds; shares in %."""
    table = common.Table(path)
    for variant in VARIANTS:
        own, cells = [row for row in rows if row["variant"] == variant], {}
        for name in columns if own else ():
            scale, digits = (1, 3) if name.startswith("loss") else (100, 0)
            values = [scale * float(row[name]) for row in own]
            cells[name] = f"{statistics.mean(values):.{digits}f}"
            if len(own) > 1:
                cells[name] += f" ± {statistics.stdev(values):.{digits}f}"
        if own:
            same = {name: own[0][name] for name in own[0] if name not in ("seed", *columns)}
            table.add(**same, seeds=len(own), **cells)


def draw(clips):
    """A clip (frames, y, x, 3) of each variant: each column is a frame, the brightest along y."""

    def panel(axis):
        above = [clip.max(1).transpose(1, 0, 2) for clip in clips.values()]  # (x, frames, 3)
        above = [np.pad(x, ((0, 2), (0, 0), (0, 0)), constant_values=255) for x in above]
        axis.imshow(np.concatenate(above), interpolation="nearest", aspect="auto")
        middles = np.arange(len(above)) * len(above[0]) + (len(above[0]) - 3) / 2
        axis.set(xlabel="frame", yticks=middles, yticklabels=list(clips))
        axis.set(title="a red circle moving right, seen along y")
        axis.grid(False)

    return panel


def main():
    parser = common.parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=1400, help="of training (default 1400)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--captions", type=int, default=24, help="sampled at 16 frames")
    names = list(VARIANTS)
    parser.add_argument("--variants", nargs="+", default=names, choices=names, metavar="VARIANT")
    args = common.arguments(parser)
    how = {"steps": args.steps, "captions": args.captions}
    table = common.Table(args.out / "ablations.csv", resume=True, **how)
    folder, clips = args.out / "ablations", {}
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        for variant in args.variants:
            path = folder / f"{variant.replace(' ', '-')}-{seed}.pt"
            if not table.find(variant=variant, seed=seed):
                row = train_and_measure(variant, seed, args.steps, args.captions, path)
                table.add(variant=variant, seed=seed, **how, **row)
            if path.with_suffix(".npy").exists():
                clips[variant] = np.load(path.with_suffix(".npy"))  # at last, that of the last seed
    print()
    summarise(table.rows, args.out / "ablations_summary.csv")
    if clips:
        common.plot(args.out / "ablations.png", draw(clips), width=9)


if __name__ == "__main__":
    common.run(__file__, main)
