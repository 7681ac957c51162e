"""Claim: cost grows linearly with pixels (LinGen figs. 1b and 6). Operations counted, not timed.

    python benchmarks/cost.py                 LinGen-4B and DiT-4B, 256p to 1024p, 17 to 68 s, and what the ratio depends on

Counted on the meta device, where nothing is computed and 140,000 tokens cost no memory. Clips are square (512p is
512 x 512 pixels) at 16 frames a second; latents are 8x smaller along t, y and x, patches 1 x 2 x 2: 512p and 68 s are
136 x 32 x 32 = 139,264 tokens. One multiply-add counts as two operations, as torch.utils.flop_counter does it; masked
halves of products are counted in full, in the scan as in attention. tests/test_benchmarks.py holds the counter against
a count by hand.
"""
import argparse
import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks import common  # noqa: E402
from lingen import LinGen, preset  # noqa: E402

PIXELS, SECONDS = (256, 512, 1024), (17, 34, 68)
# The DiT differs in the mixer, and in the depth that gives it as many parameters as LinGen has.
MODELS = {"LinGen-4B": dict(), "DiT-4B": dict(mixer="attention", depth=36)}
# What the ratio at 512p and 68 s depends on: fields of LinGen, fields of the DiT, and how many times as many tokens. The
# depth follows, so that both keep about 4 billion parameters.
DEPENDS = {"as above": ({}, {}, 1), "expand=1": (dict(expand=1.0, depth=31), {}, 1), "d_state=64": (dict(d_state=64), {}, 1),
           "without review": (dict(review=False), {}, 1), "DiT of 28 blocks too": ({}, dict(depth=28), 1),
           "16:9": ({}, {}, 16 / 9), "autoencoder 4x in time": ({}, {}, 2),
           "3072 wide": (dict(d_model=3072, nheads=24, depth=16), dict(d_model=3072, nheads=24, depth=20), 1),
           "1536 wide": (dict(d_model=1536, nheads=12, depth=62), dict(d_model=1536, nheads=12, depth=81), 1),
           "1536 wide, expand=1, 16:9": (dict(d_model=1536, nheads=12, depth=70, expand=1.0), dict(d_model=1536, nheads=12, depth=81),
                                         16 / 9)}


def operations(config, latent, words=256):
    """Floating-point operations of one forward pass for a latent clip (frames, height, width), batch 1.

    All blocks cost the same (the scan's order and the windows' shift move tokens, they add no product), so one block is
    counted and multiplied: two models of one and two blocks tell what a block costs and what comes once.
    """
    counts = []
    for depth in (1, 2):
        with torch.device("meta"):
            model = LinGen(dataclasses.replace(config, depth=depth, backend="torch"))
            inputs = torch.empty(1, config.channels, *latent), torch.empty(1), torch.empty(1, words, config.text_dim)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*inputs)
        counts.append(counter.get_total_flops())
    return counts[0] + (config.depth - 1) * (counts[1] - counts[0])


def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in LinGen(config).parameters())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(common.RESULTS), help="folder of the CSV files")
    args = parser.parse_args()
    configs = {name: preset("4b", **change) for name, change in MODELS.items()}
    for name, config in configs.items():
        print(f"{name}: {parameters(config) / 1e9:.2f} billion parameters, {config.depth} blocks of {config.d_model}")
    print()
    table = common.Table(Path(args.out) / "cost.csv")
    for size, seconds in tqdm([(p, s) for p in PIXELS for s in SECONDS], leave=False, disable=None):
        latent = common.clip_shape(configs["LinGen-4B"], seconds, size)
        ours, dit = (operations(config, latent) / 1e12 for config in configs.values())
        table.add(pixels=size, seconds=seconds, tokens=common.tokens(configs["LinGen-4B"], latent), lingen_tflop=round(ours, 1),
                  dit_tflop=round(dit, 1), ratio=round(dit / ours, 2))
    table.wrote()
    print("What the ratio at 512p and 68 s depends on (paper: 15)\n")
    table = common.Table(Path(args.out) / "cost_depends.csv")
    for change, (ours, dit, more) in tqdm(DEPENDS.items(), leave=False, disable=None):
        ours, dit = preset("4b", **ours), preset("4b", **{**MODELS["DiT-4B"], **dit})
        frames, height, width = common.clip_shape(ours, 68, 512)
        latent = (2 * frames, height, width) if more == 2 else (frames, height, round(width * more / 2) * 2)
        count = [operations(config, latent) / 1e12 for config in (ours, dit)]
        table.add(change=change, tokens=common.tokens(ours, latent), lingen_billion=round(parameters(ours) / 1e9, 2),
                  dit_billion=round(parameters(dit) / 1e9, 2),
                  lingen_tflop=round(count[0], 1), dit_tflop=round(count[1], 1), ratio=round(count[1] / count[0], 2))
    table.wrote()


if __name__ == "__main__":
    common.run(main, "cost.py")
