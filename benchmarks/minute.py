"""Claim: a minute of video. Time, memory, and how much of it is right, from 16 frames to 1088.

    python benchmarks/minute.py                                  the shipped checkpoint, 10 captions
    python benchmarks/minute.py --checkpoint runs/long.pt --frames 272 --steps 200

For each length: time and peak memory of one clip, in a process of its own; then the judge's verdict
on held-out captions. A clip is made in one pass, with the checkpoint's own settings (and --steps);
the noise of all pixels of all frames is independent. A frame is right if it and the step to it are,
a second if all its 16 frames are, a film if all frames are (strict).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

import sample as sampler
import train_tiny
from benchmarks import common
from toy import judge, shapes


def sample_one(model, checkpoint, caption, frames, seed=0):
    settings = {**checkpoint["sampling"], "frames": frames, "seed": seed}
    return train_tiny.sample_captions(model, [caption], checkpoint["vocabulary"], settings)


def load(path, steps):
    """The model and its checkpoint; steps: of the sampler, or None for the checkpoint's own."""
    model, checkpoint = sampler.load_model(path)
    checkpoint["sampling"]["steps"] = steps or checkpoint["sampling"]["steps"]
    return model, checkpoint


def child(path, frames, steps):
    """[seconds, MiB] that a clip takes, in this process."""
    model, checkpoint = load(path, steps)

    def run():
        sample_one(model, checkpoint, "a red circle moving right", frames)

    return [common.seconds(run), common.peak_mib()]


def main():
    parser = common.parser_of(__doc__)
    parser.add_argument("--checkpoint", default=common.SHIPPED)
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 64, 272, 1088])
    parser.add_argument("--steps", type=int, help="of the sampler; default: the checkpoint's own")
    parser.add_argument("--captions", type=int, default=10, help="judged (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of captions and noise")
    args = common.arguments(parser, child)
    model, checkpoint = load(args.checkpoint, args.steps)
    generator = torch.Generator().manual_seed(args.seed)
    specs = shapes.random_specs(args.captions, generator, held_out_only=True)
    table = common.Table(args.out / "minute.csv")
    for frames in args.frames:
        request = dict(path=args.checkpoint, frames=frames, steps=args.steps)
        taken, peak = common.in_fresh_process(__file__, **request)
        clips = []
        for i, spec in enumerate(tqdm(specs, desc=f"{frames}", leave=False, disable=None)):
            caption = shapes.caption(spec)
            clips.append(sample_one(model, checkpoint, caption, frames, args.seed + i))
        verdict = judge.judge(torch.cat(clips), specs)
        seconds = judge.seconds(verdict).double().mean().item()
        table.add(frames=frames, seconds_of_film=frames // 16, seconds_to_make=round(taken, 1),
                  peak_mib=round(peak), captions=args.captions,
                  frames_right=f"{100 * verdict['right'].double().mean():.1f} %",
                  seconds_right=f"{100 * seconds:.1f} %",
                  lenient=f"{100 * verdict['lenient'].double().mean():.0f} %",
                  films_right=f"{100 * verdict['strict'].double().mean():.0f} %")  # fmt: skip


if __name__ == "__main__":
    common.run(__file__, main)
