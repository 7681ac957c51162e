"""What keeps a long clip of one colour? The MA-branch, or review tokens (fig. 12)?

    python benchmarks/agree.py                                    three variants, three seeds
    python benchmarks/agree.py --seeds 5 --variants default "without review"

A task of long range: captions do not name the colour, so all frames of a clip have to agree on one,
although each begins with noise of its own. Training is that of ablations.py, in its small world,
with clips of up to 256 frames. Then clips are sampled, longer ones, too.

    agree   of the frames that show a shape: the share of the most frequent colour
    found   share of the frames that show a shape
    same    share of the clips that have the most frequent colour of all clips: 1 if the model has
            settled on one colour. Six clips of colours drawn at random have 0.40 on average.

Rows in the CSV are not made again; agree_summary.csv has the means.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import sample as sampler
from benchmarks import ablations, common
from toy import judge, shapes

VARIANTS = ("default", "without review", "without MA-branch")


def agreement(clip):
    """A clip (3, frames, h, w) -> (agree, found, its most frequent colour)."""
    parts = clip.transpose(0, 1).split(256)
    colour = torch.cat([judge.read_frames(part)[0] for part in parts])  # -1: no shape is found
    count = torch.bincount(colour + 1, minlength=7)[1:]
    agree, found = count.max() / count.sum().clamp(min=1), count.sum() / len(colour)
    return agree.item(), found.item(), count.argmax().item()


def train_and_measure(variant, seed, steps, captions, lengths):
    """The numbers of a row, with a new model. Of clips beyond 1000 frames a third is sampled."""
    model = ablations.train(variant, seed, steps, named=False).average
    names = ("steps", "schedule", "shift", "renoise", "slide")
    how = {name: ablations.SAMPLING[name] for name in names}
    row, size = {}, ablations.WORLD["size"]
    for frames in lengths:
        specs = ablations.small_specs(captions if frames < 1000 else -(-captions // 3))
        told = sampler.encode([shapes.caption(spec) for spec in specs], shapes.WORDS)
        results = []
        for i, text in enumerate(ablations.without_colour(told)):
            how["seed"] = 1000 * seed + i
            clip = sampler.sample(model, text[None], (frames, size, size), **how)[0]
            results.append(agreement(clip))
        agree, found, colours = zip(*results)
        row[f"agree_{frames}"] = round(statistics.mean(agree), 3)
        row[f"found_{frames}"] = round(statistics.mean(found), 3)
        row[f"same_{frames}"] = round(colours.count(statistics.mode(colours)) / len(colours), 3)
    return row


def main():
    parser = common.parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=500, help="of training (default 500)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--captions", type=int, default=6, help="sampled (default 6)")
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 256, 1024])
    names = list(ablations.VARIANTS)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=names, metavar="VARIANT")
    args = common.arguments(parser)
    how = {"steps": args.steps, "captions": args.captions}
    how["frames"] = " ".join(map(str, args.frames))
    table = common.Table(args.out / "agree.csv", resume=True, **how)
    for seed in range(args.seeds):
        for variant in args.variants:
            if not table.find(variant=variant, seed=seed):
                row = train_and_measure(variant, seed, args.steps, args.captions, args.frames)
                table.add(variant=variant, seed=seed, **how, **row)
    print()
    columns = [f"{name}_{frames}" for frames in args.frames for name in ("agree", "found", "same")]
    ablations.summarise(table.rows, args.out / "agree_summary.csv", columns)


if __name__ == "__main__":
    common.run(__file__, main)
