"""Claim: one sampler has five uses. The judge's verdict on clips of which a part was given.

    python benchmarks/uses.py                                the shipped checkpoint, 100 captions
    python benchmarks/uses.py --captions 16 --only image "edit 0.5"

Held-out captions, and ideal clips of the toy world. A use gives the sampler a part of such a clip,
and the whole result is judged: attributes, one object, form, no step off by half a pixel, also
where given and made parts meet. Edits have captions with a new colour and shape (seen ones),
guidance 2 and renoise 1; near says how many start within 3 pixels of the given clip.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import sample as sampler
from benchmarks import common
from toy import judge, shapes

STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
USES = ["plain", "fewer words", "image", "extend", "extend before", "inpaint", "loop"]
USES += [f"edit {strength}" for strength in STRENGTHS]


def given_part(use, specs, starts):
    """The options of `sample` for one use, and the specs that the result has to show."""
    kind, _, value = use.partition(" ")
    frames = 28 if kind == "loop" else 16
    known = shapes.render(specs, starts, frames)
    mask = torch.zeros(1, *known.shape[2:])
    if kind == "fewer":  # one or two of colour, shape and direction are not named
        unnamed = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]])
        return {}, specs.masked_fill(unnamed.bool()[torch.arange(len(specs)) % 6], -1)
    if kind == "edit":
        other = (specs + torch.tensor([1, 1, 0])) % torch.tensor([6, 4, 8])
        return dict(known=known, strength=float(value), guidance=2.0, renoise=1.0), other
    if kind == "image":
        mask[:, :1] = 1
    elif kind == "extend":
        mask[:, 8:] = 1  # the last 8 frames, as in each window of a longer clip
        mask = mask if value else mask.flip(1)
    elif kind == "inpaint":  # a quarter of each frame
        mask += 1
        mask[:, :, 6:18, 6:18] = 0
    elif kind == "loop":  # the same place after 24 frames, since the world is 24 pixels wide
        mask[:, :4] = mask[:, 24:] = 1
    return dict(known=known, mask=mask) if mask.any() else {}, specs


def make(model, checkpoint, use, specs, starts):
    """Clips of a use, 16 at a time, and the specs that they have to show."""
    clips, told = [], []
    for i in range(0, len(specs), 16):
        options, shown = given_part(use, specs[i : i + 16], starts[i : i + 16])
        frames = options["known"].shape[2] if options else 16
        settings = {**checkpoint["sampling"], "frames": frames, "seed": i, **options}
        captions = [shapes.caption(spec) for spec in shown]
        made = sampler.sample_captions(model, captions, checkpoint["vocabulary"], settings)
        if "mask" in options:
            kept = options["mask"][:, None].bool().expand_as(made)
            assert torch.equal(made[kept], options["known"][kept]), "a given pixel changed"
        clips.append(made)
        told.append(shown)
    return torch.cat(clips), torch.cat(told)


def main():
    parser = common.parser_of(__doc__)
    parser.add_argument("--checkpoint", default=common.SHIPPED)
    parser.add_argument("--captions", type=int, default=100, help="judged a use (default 100)")
    parser.add_argument("--only", nargs="+", choices=USES, default=USES, help="these uses")
    parser.add_argument("--seed", type=int, default=0, help="of captions and places")
    args = common.arguments(parser)
    model, checkpoint = sampler.load_model(args.checkpoint)
    generator = torch.Generator().manual_seed(args.seed)
    specs = shapes.random_specs(args.captions, generator, held_out_only=True)
    starts = shapes.SIZE * torch.rand(len(specs), 2, generator=generator)
    table = common.Table(args.out / "uses.csv")
    for use in args.only:
        verdict = judge.judge(*make(model, checkpoint, use, specs, starts))
        verdict["steady"] = verdict["lenient"] & (verdict["jump"] <= judge.JUMP)
        mean = judge.summary(verdict)
        keys = ("lenient", "steady", "strict", "colour", "shape", "direction")
        shares = {key: round(100 * mean[key]) for key in keys}
        apart = shapes.wrap(verdict["start"] - starts).norm(dim=1)  # the made start, the given one
        near = round(100 * (apart < 3).double().mean().item()) if use.startswith("edit") else None
        table.add(use=use, captions=len(specs), **shares, near=near,
                  overlap=round(mean["overlap"], 2), jump=round(mean["jump"], 2))  # fmt: skip


if __name__ == "__main__":
    common.run(__file__, main)
