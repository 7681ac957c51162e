"""Claim: latency and memory grow linearly with the length of the clip (LinGen figs. 1b and 6). One denoising step, timed.

    python benchmarks/length.py                                  the tiny preset, 16 to 4352 frames: some minutes
    python benchmarks/length.py --preset 4b --device cuda        512p, 17 and 68 s, bfloat16, one card (paper: 11.5x, an H100)

MATE against full attention (the DiT) in its place, batch 1, random weights. Each point is measured in fresh processes: the
median of up to five runs after one warm-up, with memory kept between them; and the memory that a single run adds (on a GPU:
weights and all). Attention stops where it would take longer than --limit. The 4B model meets a DiT of as many parameters, 36 blocks instead of 28, as in cost.py;
on a GPU the scan takes mamba-ssm's kernels where they are installed, and attention is torch's flash attention.
"""
import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks import common, cost  # noqa: E402

SECONDS = {"tiny": (1, 4, 17, 68, 272), "small": (17, 68), "4b": (17, 68)}


def child(preset, mixer, seconds, pixels, device, repeats):
    """One point, in this process: (seconds, MiB at the peak). The first run only warms up, if there are more."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    change = {} if mixer == "mate" else cost.MODELS["DiT-4B"] if preset == "4b" else dict(mixer="attention")
    model = common.build(preset, device, dtype, **change)
    shape = common.clip_shape(model.config, seconds, pixels)
    common.denoising_step(model, (model.config.patch[0], *shape[1:]))()         # libraries load what they need
    before = 0 if device == "cuda" else common.peak_mib()
    step, taken = common.denoising_step(model, shape), []
    while len(taken) < repeats and sum(taken) < 60:
        taken.append(common.seconds(step, device))
    return statistics.median(taken[1:] or taken), common.peak_mib(device) - before


def draw(rows):
    def panels(time, memory):
        for axis, what, label in ((time, "s", "seconds per step"), (memory, "mib", "MiB")):
            for mixer, name in (("mate", "LinGen (MATE)"), ("attention", "DiT (full attention)")):
                points = [(int(r["tokens"]), float(r[f"{mixer}_{what}"])) for r in rows if r[f"{mixer}_{what}"]]
                axis.loglog(*zip(*points), marker="o", label=name)
            axis.set(xlabel="tokens", ylabel=label)
        time.legend()
    return panels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=SECONDS, default="tiny")
    parser.add_argument("--seconds", type=int, nargs="+",
                        help="lengths of the clips, at 16 frames a second (default: 1 4 17 68 272 for tiny, 17 68 for the others)")
    parser.add_argument("--pixels", type=int, default=512, help="height and width of the clip, for presets of latents (default 512)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: in bfloat16")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each point, at most (default 5)")
    parser.add_argument("--limit", type=float, default=120, help="no step of attention that would take more seconds (default 120)")
    parser.add_argument("--plot", help="the plot, a PNG (default: assets/length.png for the tiny preset on the CPU, else none)")
    args = common.arguments(parser, child)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.pixels % 16 or not 16 <= args.pixels <= 4096 or min(args.seconds or [1]) < 1 or args.repeats < 1:
        parser.error("--pixels must be a multiple of 16 up to 4096, --seconds and --repeats at least 1")
    table = common.Table(Path(args.out) / f"length_{args.preset}_{args.device}.csv")
    config = common.build(args.preset, "meta").config
    three = lambda value: float(f"{value:.3g}")                      # significant digits
    last = None                                                     # (tokens, seconds) of attention's longest run so far
    for length in tqdm(args.seconds or SECONDS[args.preset], unit="length", leave=False, disable=None):
        shape = common.clip_shape(config, length, args.pixels)
        n, time, memory = common.tokens(config, shape), {}, {}
        for mixer in ("mate", "attention"):
            if mixer == "attention" and last and last[1] * (n / last[0]) ** 2 > args.limit:
                continue
            point = dict(preset=args.preset, mixer=mixer, seconds=length, pixels=args.pixels, device=args.device)
            time[mixer], _ = common.in_fresh_process(__file__, keep=True, repeats=args.repeats + 1, **point)
            _, memory[mixer] = common.in_fresh_process(__file__, repeats=1, **point)
        if "attention" in time:
            last = n, time["attention"]
        mate, dit = time["mate"], time.get("attention")
        table.add(seconds=length, frames=16 * length, tokens=n, mate_s=three(mate), attention_s=dit and three(dit),
                  ratio=dit and round(dit / mate, 2), mate_mib=round(memory["mate"]), attention_mib=dit and round(memory["attention"]),
                  us_per_token=round(1e6 * mate / n, 1))
    table.wrote()
    picture = args.plot or (common.ASSETS / "length.png" if (args.preset, args.device) == ("tiny", "cpu") else None)
    if picture:
        common.plot(picture, draw(table.rows), panels=2)


if __name__ == "__main__":
    common.run(main, "length.py")
