"""How close is a model to the best denoiser there is, and how many frames does it use?

    python benchmarks/ideal.py                                   the shipped checkpoint
    python benchmarks/ideal.py --checkpoint assets/tiny.pt runs/long.pt

A clip of the toy is given by its caption and its start, so the best denoiser can be worked out. It
rolls every frame back by the motion so far and averages: the noise of n frames falls by sqrt(n). It
weighs all starts by how well they fit (Bayes' rule) and returns the mean clip. Early in sampling, a
model that used all frames would see more the longer the clip is. The table has the mean squared
error per pixel of the clean clip that is predicted from new noisy clips with full captions.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import sample as sampler
from benchmarks import common
from toy import shapes

PARTS = 16  # starts are tried at sixteenths of a pixel


def first_frames(spec):
    """Frame 0 of a spec (3,) from every start within a pixel: (PARTS * PARTS, 3, y, x)."""
    offsets = torch.arange(PARTS) / PARTS
    starts = torch.cartesian_prod(offsets, offsets)
    return shapes.render(spec.expand(len(starts), 3), starts, 1)[:, :, 0]


def posterior_mean(clips, specs, t):
    """The mean clean clip, given noisy clips (b, 3, frames, y, x), full specs (b, 3), and t."""
    frames = clips.shape[2]
    mean = shapes.move(clips, specs[:, 2], -1).double().mean(2)  # (b, 3, y, x): t * frame 0 + noise
    out = torch.empty_like(mean)
    for i, spec in enumerate(specs):
        drawn = first_frames(spec).double()  # (parts, 3, y, x)
        template, size = torch.fft.rfft2(drawn), mean.shape[2:]
        # |mean - t drawn|^2 = |mean|^2 - 2 t correlation + t^2 |drawn|^2, for all whole pixels.
        match = torch.fft.irfft2((torch.fft.rfft2(mean[i]) * template.conj()).sum(1), size)
        apart = t**2 * drawn.square().sum((1, 2, 3))[:, None, None] - 2 * t * match  # (parts, y, x)
        weights = (-apart * frames / (1 - t) ** 2 / 2).flatten().softmax(0).view(match.shape)
        spread = torch.fft.rfft2(weights)[:, None] * template  # each frame 0 at each start
        out[i] = torch.fft.irfft2(spread.sum(0), size)
    return shapes.move(out[:, :, None].to(clips.dtype).expand_as(clips), specs[:, 2])


def errors(models, frames, t, n, seed=0):
    """Mean squared error of the best denoiser, and of each model, on n clips."""
    generator = torch.Generator().manual_seed(seed)
    clips, captions, specs = shapes.make_batch(n, frames, generator)
    noisy = (1 - t) * torch.randn(clips.shape, generator=generator) + t * clips
    found = {"best": posterior_mean(noisy, specs, t)}
    parts = list(zip(noisy.split(4), sampler.encode(captions, shapes.WORDS).split(4)))
    for name, model in models.items():
        with torch.inference_mode():
            out = torch.cat([model(x, torch.full((len(x),), t), words) for x, words in parts])
        found[name] = out if model.config.predicts == "clean" else noisy + (1 - t) * out
    return {name: (out - clips).square().mean().item() for name, out in found.items()}


def main():
    parser = common.parser_of(__doc__)
    parser.add_argument("--checkpoint", nargs="+", default=[common.SHIPPED])
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--times", type=float, nargs="+", default=[0.03, 0.06, 0.1, 0.25, 0.5])
    parser.add_argument("--clips", type=int, default=128, help="of the shortest length")
    args = common.arguments(parser)
    models = {Path(path).name: sampler.load_model(path)[0] for path in args.checkpoint}
    table = common.Table(args.out / "ideal.csv")
    for frames in args.frames:
        n = max(1, args.clips * min(args.frames) // frames)
        for t in args.times:
            row = errors(models, frames, t, n)
            table.add(frames=frames, t=t, **{name: round(value, 4) for name, value in row.items()})


if __name__ == "__main__":
    common.run(__file__, main)
