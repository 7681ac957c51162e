"""Choice: captions are read by Mamba2. How soon does a reader know which shape and which motion belong to which colour?

    python benchmarks/reading.py                1000 steps with each reader: two minutes on one core

Captions of two objects, in train_tiny's own wording. What the tiny model's reader makes of the words is asked by the
colour of an object, through cross-attention as in a block, for the object's shape and direction, and learns from the right
answers alone: no clips, no noise. A reader that knows the words but not what belongs together gives the other object's
shape as often as the right one: by two objects of 4 shapes, it is right in 1/2 + 1/2 x 1/4 = 62.5 %.

Attention knows the places of words by a table that is added to them. It begins as large as the words themselves, or, "faint",
at a fiftieth of that, as the shipped checkpoint's did; Mamba2 needs no table.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

import sample  # noqa: E402
import train_tiny  # noqa: E402
from benchmarks import common  # noqa: E402
from lingen import LinGen, preset  # noqa: E402

READERS = ("attention (faint)", "attention", "mamba2")


def captions(n, seed):
    """n captions of two objects as word numbers (n, words), and their specs (n, 2, 5)."""
    generator = torch.Generator().manual_seed(seed)
    specs = train_tiny.random_specs(n, generator, 2)
    return sample.encode([train_tiny.caption(spec, generator) for spec in specs], train_tiny.VOCABULARY), specs


def learn(reader, steps, every, seed=0):
    """Train a reader and yield, every few steps, (captions seen, share of shapes right, share of directions right) of 512 new captions."""
    torch.manual_seed(seed)
    model = LinGen(preset("tiny", vocab_size=len(train_tiny.VOCABULARY), reader=reader.split()[0], depth=1))
    if "faint" in reader:
        model.word_positions.data *= 0.02
    d = model.config.d_model
    colour, ask, answer = nn.Embedding(6, d), model.blocks[0].cross, nn.Linear(d, 4 + 8)
    optimizer = torch.optim.AdamW([*model.parameters(), *colour.parameters(), *answer.parameters()], lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)

    def answers(text, specs):                                   # (n, objects, 4) and (n, objects, 8)
        return answer(ask(colour(specs[..., 0]), *model.read(text))).split([4, 8], -1)

    for step in tqdm(range(steps), desc=reader, leave=False, disable=None):
        for group in optimizer.param_groups:
            group["lr"] = train_tiny.learning_rate(step, steps, 2e-3)
        text, specs = captions(16, 1_000_003 * (seed + 1) + step)
        shape, direction = answers(text, specs)
        loss = F.cross_entropy(shape.flatten(0, 1), specs[..., 1].flatten()) + F.cross_entropy(direction.flatten(0, 1), specs[..., 2].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % every == 0:
            with torch.no_grad():
                text, specs = captions(512, seed)
                right = [(said.argmax(-1) == specs[..., column]).float().mean().item() for column, said in zip((1, 2), answers(text, specs))]
            yield 16 * (step + 1), *right


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of 16 captions each (default 1000)")
    parser.add_argument("--out", default=str(common.RESULTS), help="folder of the CSV file")
    args = parser.parse_args()
    if not 4 <= args.steps <= 10**6:
        parser.error(f"--steps {args.steps}: choose 4 to 1000000")
    table = common.Table(Path(args.out) / "reading.csv")
    for reader in READERS:
        for seen, shape, direction in learn(reader, args.steps, args.steps // 4):
            table.add(reader=reader, captions=seen, shape=round(shape, 3), direction=round(direction, 3))
    table.wrote()


if __name__ == "__main__":
    common.run(main, "reading.py")
