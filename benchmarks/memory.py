"""How many tokens the states of a trained model remember.

    python benchmarks/memory.py                                    the shipped checkpoint
    python benchmarks/memory.py --checkpoint runs/long.pt --frames 256

A head's state decays by exp(dt A) from token to token, so 1 / (-dt A) tokens later a part 1/e of it
is left. The table has this number for each head of each layer, ascending, beside the number of
tokens that the layer reads (of the clip, and review tokens twice). dt A is the mean over the tokens
of one clip, noised to the time t.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import sample as sampler
from benchmarks import common
from mamba2_ref import Mamba2
from toy import shapes


def memories(model, *inputs):
    """For each Mamba2 layer: its number of tokens, and how many each head remembers, ascending."""
    found = []

    def look(layer, linear, inputs, projected):  # the last columns are dt, one for each head
        dt = F.softplus(projected[..., -layer.nheads :] + layer.dt_bias)
        decay = (dt * layer.A_log.exp()).mean((0, 1))
        found.append([projected.shape[1], *(1 / decay).sort().values.round().long().tolist()])

    layers = [module for module in model.modules() if isinstance(module, Mamba2)]
    hooks = [ma.in_proj.register_forward_hook(functools.partial(look, ma)) for ma in layers]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return found


def main():
    parser = common.parser_of(__doc__)
    parser.add_argument("--checkpoint", default=common.SHIPPED)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--t", type=float, default=0.1, help="time of the flow: 0 noise, 1 clean")
    args = common.arguments(parser)
    model, _ = sampler.load_model(args.checkpoint)
    generator = torch.Generator().manual_seed(0)
    clips, captions, _ = shapes.make_batch(1, args.frames, generator)
    noisy = torch.randn(clips.shape, generator=generator).lerp(clips, args.t)
    text = sampler.encode(captions, shapes.WORDS)
    table = common.Table(args.out / "memory.csv")
    rows = memories(model, noisy, torch.tensor([args.t]), text)
    for layer, (tokens, *heads) in enumerate(rows):
        table.add(layer=layer, tokens=tokens, **{f"head_{i}": n for i, n in enumerate(heads)})


if __name__ == "__main__":
    common.run(__file__, main)
