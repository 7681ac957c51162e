"""How near is the model to the best denoiser there can be? In the toy world that one can be computed.

    python benchmarks/bayes.py                          the shipped checkpoint, 5 minutes of one core
    python benchmarks/bayes.py runs/tiny.pt             one that you have trained

A caption that names everything leaves one thing open: where the shape is. Of a noisy clip x = (1 - t) noise + t clip, Bayes'
rule says how likely each place is, and the mean of all clips, so weighted, misses by less than any other answer; flow
matching asks the network for nothing else. Noise is Gaussian, so the logarithm of a place's weight is how well the
clip drawn there correlates with x. Frames are rolls of the first one: roll them back, add them up, and one correlation with the
shape (by FFT) gives the weights of all places, a quarter of a pixel apart.

Of two objects the second's place follows from the first's (`train_tiny.random_starts`). `best` knows that; `best_apart` weighs each
one's places by itself. Overlaps of the two are not reckoned with. Shown: squared error of the brightness, per frame.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import sample  # noqa: E402
import train_tiny  # noqa: E402
from benchmarks import common  # noqa: E402

TIMES = (0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5)
FINE = 4                # places in a pixel, along each axis
SIZE = 32


def shapes(spec, fine):
    """The shape of spec (5,) in colour, its centre a fraction of a pixel beside (0, 0): (fine, fine, 3, h, w), the fraction of y first."""
    colour, shape, _, _, big = spec.tolist()
    y, x = torch.cartesian_prod(torch.arange(fine), torch.arange(fine)).T / fine
    cover = train_tiny.draw_shapes(train_tiny.HALF[big].expand(len(x)), torch.stack([x, y], 1), SIZE)[:, shape]
    return (cover[:, None] * train_tiny.RGB[colour][:, None, None]).unflatten(0, (fine, fine))


def moved(spec, frames):
    """How far spec (5,) has moved since frame 0, for each colour channel: (3, frames, 2)."""
    return (torch.arange(frames)[:, None] * train_tiny.STEPS[spec[2], spec[3]]).expand(3, -1, -1)


def weights(noisy, t, spec, fine):
    """Logarithms of the weights of all places, (fine h, fine w): noisy (3, frames, h, w) at time t, spec (5,)."""
    signal, drawn = (noisy + t) / 2, shapes(spec, fine)             # t brightness + (1 - t) / 2 noise
    added = train_tiny.roll(signal, -moved(spec, signal.shape[1])).sum(1)     # (3, h, w)
    match = torch.fft.ifft2(torch.fft.fft2(added) * torch.fft.fft2(drawn).conj()).real.sum(2)               # (fine, fine, h, w)
    power = signal.shape[1] * drawn.square().sum((2, 3, 4))[..., None, None]
    log = (t * match - t * t * power / 2) / ((1 - t) / 2) ** 2
    return log.permute(2, 0, 3, 1).flatten(2).flatten(0, 1)         # row y fine + its fraction, column likewise


def mean_clip(share, spec, frames):
    """The mean of the clips of spec (5,), whose places have these shares (fine h, fine w): brightness (3, frames, h, w)."""
    fine = len(share) // SIZE
    share = share.view(SIZE, fine, SIZE, fine).permute(1, 3, 0, 2)                                          # (fine, fine, h, w)
    first = torch.fft.ifft2((torch.fft.fft2(share)[:, :, None] * torch.fft.fft2(shapes(spec, fine))).sum((0, 1))).real
    return train_tiny.roll(first[:, None].expand(-1, frames, -1, -1), moved(spec, frames))


def best(noisy, t, specs, together=True, fine=FINE):
    """The prediction of least squared error: noisy (3, frames, h, w), specs (k, 5) -> brightness (3, frames, h, w). together: see the top."""
    frames, logs = noisy.shape[1], [weights(noisy, t, spec, fine) for spec in specs]
    ways = [(0, 0)] * len(specs)
    if len(specs) == 2 and together:
        first, second = train_tiny.random_starts(specs[None], frames, torch.Generator().manual_seed(0))[0]
        x, y = (fine * (second - first)).round().long().tolist()
        ways[1] = (y, x)
        logs = [sum(log.roll((-dy, -dx), (0, 1)) for log, (dy, dx) in zip(logs, ways))] * 2                 # by the first one's place
    return sum(mean_clip(log.flatten().softmax(0).view(log.shape).roll(way, (0, 1)), spec, frames) for log, way, spec in zip(logs, ways, specs))


def measure(model, objects, n, seed, times=TIMES):
    """Rows of the table: the squared error per frame at each time, of the model from 1, 2 and 8 places and of the best."""
    generator = torch.Generator().manual_seed(seed)
    specs = train_tiny.random_specs(n, generator, objects)
    clips = train_tiny.render(specs, train_tiny.random_starts(specs, 16, generator), 16)
    text = sample.encode([train_tiny.caption(spec, plain=True) for spec in specs], model.vocabulary)
    for t in tqdm(times, leave=False, disable=None):
        noisy = (1 - t) * torch.randn(clips.shape, generator=generator) + t * clips
        answers = []
        with torch.inference_mode():
            for place in torch.randint(SIZE, (8, 2), generator=generator).tolist():
                rolled = noisy.roll(place, (3, 4))
                out = torch.cat([model(x, torch.full((len(x),), t), words) for x, words in zip(rolled.split(16), text.split(16))])
                answers.append((1 + out.roll([-p for p in place], (3, 4))) / 2)
        missed = lambda guess: round((guess - (1 + clips) / 2).square().sum((1, 2, 3, 4)).mean().item() / 16, 2)
        found = {f"views_{k}": missed(sum(answers[:k]) / k) for k in (1, 2, 8)}
        for name, together in (("best_apart", False), ("best", True)):
            found[name] = missed(torch.stack([best(x, t, spec, together) for x, spec in zip(noisy, specs)])) if together or objects == 2 else None
        yield dict(objects=objects, t=t, **found)


def draw(rows):
    """Two panels, one object and two: the error over the time."""
    names = {"views_1": "the model", "views_2": "mean of 2 views", "views_8": "of 8", "best_apart": "best, each place by itself", "best": "the best there can be"}

    def panels(*axes):
        for axis, objects in zip(axes, ("1", "2")):
            own = [row for row in rows if row["objects"] == objects]
            for colour, (name, label) in zip(common.COLOURS, names.items()):
                if own[0][name]:
                    axis.loglog([float(row["t"]) for row in own], [float(row[name]) for row in own], color=colour, label=label)
            axis.minorticks_off()
            axis.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5], ["0.02", "0.05", "0.1", "0.2", "0.5"])
            axis.set(title=("one object", "two objects")[objects == "2"], xlabel="time t: 0 noise, 1 clip", ylabel="squared error per frame")
        axes[1].legend()
    return panels


def main():
    _, args, model = common.of_checkpoint(__doc__, "bayes", 128, "the picture: the error over the time")
    table = common.Table(args.out)
    for objects in (1, 2):
        for row in measure(model, objects, args.captions, args.seed):
            table.add(**row)
    table.wrote()
    common.plot(args.plot, draw(table.rows), panels=2)


if __name__ == "__main__":
    common.run(main, "bayes.py")
