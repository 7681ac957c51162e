"""Claim: cost grows linearly with pixels (LinGen figs. 1b and 6). Operations counted, not timed.

    python benchmarks/cost.py                 LinGen-4B and DiT-4B, 256p to 1024p, 17 to 68 s: under a minute

Counted on the meta device, where nothing is computed and 140,000 tokens cost no memory. Clips are square (512p is
512 x 512 pixels) at 16 frames a second; latents are 8x smaller along t, y and x, patches 1 x 2 x 2: 512p and 68 s are
136 x 32 x 32 = 139,264 tokens. One multiply-add counts as two operations, as torch.utils.flop_counter does it; masked
halves of products are counted in full, in the scan as in attention. tests/test_benchmarks.py holds the counter against
a count by hand.
"""
import argparse
import csv
import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from tqdm import tqdm  # noqa: E402

from lingen import LinGen, preset  # noqa: E402

PIXELS, SECONDS, FPS = (256, 512, 1024), (17, 34, 68), 16
# The DiT differs in the mixer, and in the depth that gives it as many parameters as LinGen has.
MODELS = {"LinGen-4B": dict(), "DiT-4B": dict(mixer="attention", depth=36)}


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
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "cost.csv"))
    args = parser.parse_args()
    configs = {name: preset("4b", **change) for name, change in MODELS.items()}
    for name, config in configs.items():
        print(f"{name}: {parameters(config) / 1e9:.2f} billion parameters, {config.depth} blocks of {config.d_model}")
    print(f"\n{'size':>6} {'seconds':>8} {'tokens':>9} {'LinGen, TFLOP':>15} {'DiT, TFLOP':>12} {'ratio':>7}   paper")
    rows = []
    for size, seconds in tqdm([(p, s) for p in PIXELS for s in SECONDS], leave=False):
        latent = (seconds * FPS // 8, size // 8, size // 8)
        tokens = latent[0] * latent[1] * latent[2] // 4
        ours, dit = (operations(config, latent) / 1e12 for config in configs.values())
        rows.append(dict(pixels=size, seconds=seconds, tokens=tokens, lingen_tflop=round(ours, 1), dit_tflop=round(dit, 1), ratio=round(dit / ours, 2)))
        tqdm.write(f"{size:>5}p {seconds:>8} {tokens:>9,} {ours:>15,.1f} {dit:>12,.1f} {dit / ours:>7.1f}" + ("   15" if (size, seconds) == (512, 68) else ""))
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
