"""Claim: cost grows linearly with the number of pixels (LinGen figs. 1b and 6). Counted, not timed.

    python benchmarks/cost.py            LinGen-4B and DiT-4B, 256p to 1024p, 17 to 68 seconds

Operations are counted on the meta device, where nothing is computed. Clips are square, at 16 frames
a second, 8 times smaller along each axis as latents: 512p and 68 s are 136 x 32 x 32 = 139,264
tokens. A multiply-add is two operations. Masked halves count in full, in the scan as in attention.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from lingen import LinGen, preset

# The DiT's depth gives it as many parameters as LinGen has.
MODELS = {"LinGen-4B": dict(), "DiT-4B": dict(mixer="attention", depth=35)}
# What the ratio at 512p and 68 s depends on: fields of LinGen, fields of the DiT, times as many
# tokens. The depths follow the widths, so that both keep about 4 billion parameters.
DEPENDS = {
    "as above": ({}, {}, 1),
    "expand=1": (dict(expand=1.0, depth=30), {}, 1),
    "d_state=64": (dict(d_state=64), {}, 1),
    "without review": (dict(review=False), {}, 1),
    "DiT of 27 blocks": ({}, dict(depth=27), 1),
    "16:9": ({}, {}, 16 / 9),
    "latents 4x in time": ({}, {}, 2),
    "3072 wide": (
        dict(d_model=3072, nheads=24, depth=15), dict(d_model=3072, nheads=24, depth=19), 1,
    ),
    "1536 wide": (
        dict(d_model=1536, nheads=12, depth=61), dict(d_model=1536, nheads=12, depth=78), 1,
    ),
    "1536, expand=1, 16:9": (
        dict(d_model=1536, nheads=12, depth=68, expand=1.0),
        dict(d_model=1536, nheads=12, depth=78), 16 / 9,
    ),
}  # fmt: skip


def operations(config, shape, words=256):
    """Floating-point operations of one forward pass on latents (frames, height, width), batch 1.

    All blocks cost the same, so models of one and of two blocks tell the cost of any depth.
    """
    counts = []
    for depth in (1, 2):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model = LinGen(dataclasses.replace(config, depth=depth, backend="torch"))
            model(*common.model_inputs(config, shape, words=words))
        counts.append(counter.get_total_flops())
    return counts[0] + (config.depth - 1) * (counts[1] - counts[0])


def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in LinGen(config).parameters())


def draw(rows):
    def lines(axis):
        points = sorted(rows, key=lambda row: int(row["tokens"]))
        tokens = [int(row["tokens"]) for row in points]
        for name, label, colour in (("dit_tflop", "DiT", "C1"), ("lingen_tflop", "LinGen", "C0")):
            axis.plot(tokens, [float(row[name]) for row in points], "o-", color=colour, label=label)
        for row in rows:
            if (int(row["pixels"]), int(row["seconds"])) == (512, 68):
                place = int(row["tokens"]), float(row["dit_tflop"])
                axis.annotate("512p, 68 s  ", place, ha="right", va="bottom")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="TFLOP")
        axis.set_title("4B models, one denoising step")
        axis.legend()

    return lines


def main():
    args = common.arguments(common.parser_of(__doc__))
    ours, dit = (preset("4b", **change) for change in MODELS.values())
    table = common.Table(args.out / "cost.csv")
    for pixels in (256, 512, 1024):
        for seconds in (17, 34, 68):
            shape = common.clip_shape(ours, seconds, pixels)
            counts = [operations(config, shape) / 1e12 for config in (ours, dit)]
            table.add(pixels=pixels, seconds=seconds, tokens=common.count_tokens(ours, shape),
                      lingen_tflop=round(counts[0], 1), dit_tflop=round(counts[1], 1),
                      ratio=round(counts[1] / counts[0], 2))  # fmt: skip
    common.plot(args.out / "cost.png", draw(table.rows))
    print("\nWhat the ratio at 512p and 68 s depends on (the paper's is 15)\n")
    table = common.Table(args.out / "cost_depends.csv")
    for name, (of_ours, of_dit, more) in DEPENDS.items():
        configs = preset("4b", **of_ours), preset("4b", **{**MODELS["DiT-4B"], **of_dit})
        frames, height, width = common.clip_shape(ours, 68, 512)
        shape = (frames, height, 2 * round(width * more / 2))  # a multiple of the patch
        if more == 2:
            shape = (2 * frames, height, width)
        counts = [operations(config, shape) / 1e12 for config in configs]
        sizes = [round(parameters(config) / 1e9, 2) for config in configs]
        table.add(change=name, tokens=common.count_tokens(ours, shape), lingen_billion=sizes[0],
                  dit_billion=sizes[1], lingen_tflop=round(counts[0], 1),
                  dit_tflop=round(counts[1], 1), ratio=round(counts[1] / counts[0], 2))  # fmt: skip


if __name__ == "__main__":
    common.run(__file__, main)
