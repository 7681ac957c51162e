"""Claim: minute-long clips on one GPU. What is the longest clip that a card of 8 to 24 GiB can sample?

    python benchmarks/consumer.py                     a model of the memory, fitted to peaks measured on this CPU: a minute
    python benchmarks/consumer.py --device cuda       measured: a bigger GPU, its memory capped to each card's

The model: a forward pass holds the weights, plus so many bytes per token and width at its peak. How many, is measured
in fresh processes over several lengths and widths (bfloat16 on the CPU, with a preset's proportions; the torch scan works in
float32 inside) and fitted by least squares. Guidance doubles the batch, as sample.py does it. Set aside: one GiB of each
card for the driver and the screen. Left out: the text encoder and the autoencoder, which can run before and after.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks import common  # noqa: E402

CARDS, RESERVED, PRESETS, PIXELS = (8, 12, 16, 24), 1, ("small", "4b"), (256, 512)
POINTS = [(width, seconds) for width in (384, 768) for seconds in (16, 32)]       # of 256p clips, 512 tokens a second
MOST = 600                                                                         # seconds of clip; no search goes on beyond


def child_peak(preset, width, seconds):
    """What a forward pass in bfloat16 adds to this process on the CPU: (tokens x width, bytes held at its peak)."""
    model = common.build(preset, dtype=torch.bfloat16, d_model=width, nheads=width // (64 if preset == "small" else 128), depth=2)
    shape = common.clip_shape(model.config, seconds, 256)
    common.denoising_step(model, (1, 4, 4))()                                       # libraries load what they need
    before = common.peak_mib()
    common.denoising_step(model, shape)()
    return common.tokens(model.config, shape) * width, (common.peak_mib() - before) * 2**20


def child_longest(preset, pixels, card):
    """Seconds of the longest clip whose denoising step, with guidance, runs on this GPU capped to the card's memory."""
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    if card > total:
        raise ValueError(f"this GPU has {total:.0f} GiB: it cannot stand for one of {card}")
    torch.cuda.set_per_process_memory_fraction((card - RESERVED) / total)
    try:
        model = common.build(preset, "cuda", torch.bfloat16)
    except torch.OutOfMemoryError:
        return 0

    def fits(seconds):
        torch.cuda.empty_cache()
        try:
            common.denoising_step(model, common.clip_shape(model.config, seconds, pixels), batch=2)()
            torch.cuda.synchronize()
            return True
        except torch.OutOfMemoryError:
            return False
    return longest(fits)


def longest(fits):
    """The largest whole number up to MOST for which fits(n) holds, if it holds up to some number and not beyond."""
    low, high = 0, 1
    while high <= MOST and fits(high):
        low, high = high, 2 * high
    high = min(high, MOST + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fit(points):
    """Least squares of peak = each x (tokens x width): how many bytes each, and the worst relative miss."""
    each = sum(size * peak for size, peak in points) / sum(size * size for size, _ in points)
    return each, max(abs(each * size / peak - 1) for size, peak in points)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: the model; cuda: measured")
    args = common.arguments(parser, lambda **request: (child_longest if "card" in request else child_peak)(**request))
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    held = {}
    if args.device == "cpu":
        peaks = common.Table(Path(args.out) / "consumer_peaks.csv")
        for name in tqdm(PRESETS, unit="preset", leave=False, disable=None):
            points = []
            for width, seconds in POINTS:
                size, peak = common.in_fresh_process(__file__, preset=name, width=width, seconds=seconds)
                points.append((size, peak))
                peaks.add(preset=name, width=width, tokens=size // width, mib=round(peak / 2**20), bytes_per_token_width=round(peak / size, 1))
            held[name], miss = fit(points)
            tqdm.write(f"{name}: {held[name]:.0f} bytes per token and width; the fit misses a peak by {100 * miss:.0f} % at most\n")
        peaks.wrote()
    table = common.Table(Path(args.out) / f"consumer_{args.device}.csv")
    for card in tqdm(CARDS, unit="card", leave=False, disable=None):
        for name in PRESETS:
            model = common.build(name, "meta")
            weights = 2 * sum(p.numel() for p in model.parameters())
            found = {}
            for pixels in PIXELS:
                if args.device == "cuda":
                    found[pixels] = common.in_fresh_process(__file__, preset=name, pixels=pixels, card=card)
                else:
                    size = common.tokens(model.config, common.clip_shape(model.config, 1, pixels)) * model.config.d_model
                    per_second = 2 * size * held[name]                              # two clips
                    found[pixels] = max(0, min(MOST, int(((card - RESERVED) * 2**30 - weights) / per_second)))
            table.add(card_gib=card, preset=name, weights_gib=round(weights / 2**30, 1), **{f"longest_{p}p_s": found[p] for p in PIXELS},
                      source="measured" if args.device == "cuda" else "model")
    table.wrote()


if __name__ == "__main__":
    common.run(main, "consumer.py")
