"""Claim: a minute of film. Time, memory, and how much of it is right, from 16 frames to 1088.

    python benchmarks/minute.py                                     the shipped checkpoint, 8 captions of each length
    python benchmarks/minute.py --checkpoint runs/tiny.pt --captions 32
    python benchmarks/minute.py --period 0 --out runs --plot runs/minute.png         noise that never repeats (sample.white_noise)

For each length: the time and the peak memory of `sample.py` making one clip, in a fresh process; then captions of the
toy's own wording are sampled and judged (benchmarks/judge.py). A second of film is right if all its 16 frames are: every
attribute that the caption names, one object and nothing else, steady, and 0.85 of the ideal shape covered.
"""
import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import sample  # noqa: E402
from benchmarks import common, judge  # noqa: E402

CAPTION = "a small red circle moving slowly right"


def child(checkpoint, frames, period, views, device):
    """One clip by sample.py itself, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [CAPTION, "--frames", str(frames), "--period", str(period), "--views", str(views), "--checkpoint", checkpoint, "--device", device, "--out", f"{folder}/clip.gif"]
        codes = []
        with contextlib.redirect_stdout(sys.stderr):
            taken = common.seconds(lambda: codes.append(sample.main(arguments)), device)
    if codes != [0]:
        sys.exit(codes[0])
    return dict(seconds=taken, mib=common.peak_mib(device))


def draw(curve):
    def panel(axis):
        axis.step(range(1, len(curve) + 1), [100 * share for share in curve], where="mid")
        axis.set(xlabel="second of the film", ylabel="% of captions right", ylim=(0, 103))
    return panel


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(ROOT / "assets" / "tiny.pt"))
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 64, 272, 1088],
                        help="lengths, in whole seconds of 16 frames (default 16 64 272 1088)")
    parser.add_argument("--captions", type=int, default=8, help="how many to judge at each length (default 8)")
    parser.add_argument("--period", type=int, help="frames after which the noise repeats, 0: never (default: the checkpoint's)")
    parser.add_argument("--views", type=int, help="places from which each step asks (default: the checkpoint's)")
    parser.add_argument("--held-out", action="store_true", help="captions whose combination was kept from training")
    parser.add_argument("--seed", type=int, default=0, help="of captions and noise")
    parser.add_argument("--device", help="where clips are made: default cuda, else mps, else cpu")
    parser.add_argument("--plot", default=str(common.ASSETS / "minute.png"))
    args = common.arguments(parser, child)
    if any(frames % 16 or not 16 <= frames <= 4096 for frames in args.frames) or args.captions < 1:
        parser.error("--frames must be multiples of 16 up to 4096, --captions at least 1")
    asked = {name: getattr(args, name) for name in ("period", "views") if getattr(args, name) is not None}
    for name, value in asked.items():
        _, low, high = sample.LIMITS[name]
        if not low <= value <= high:
            parser.error(f"--{name} is {value}; expected {low} to {high}")
    torch.set_float32_matmul_precision("medium")                                    # as in training and in sample.py
    device = sample.choose_device(args.device)
    model, checkpoint = sample.load_model(args.checkpoint, device)
    options = sample.steps_for(checkpoint["sampling"]) | asked
    table = common.Table(Path(args.out) / "minute.csv")
    for frames in tqdm(args.frames, unit="length", leave=False, disable=None):
        one = common.in_fresh_process(__file__, checkpoint=args.checkpoint, frames=frames, period=options.get("period", 0), views=options.get("views", 1), device=str(device))
        records, result = judge.score(model, args.captions, frames, options, held_out_only=args.held_out, seed=args.seed)
        seconds = torch.stack([record["good"].view(-1, 16).all(1) for record in records])       # (captions, seconds)
        table.add(frames=frames, seconds_of_film=frames // 16, seconds_to_make=round(one["seconds"], 1), peak_mib=round(one["mib"]),
                  captions=args.captions, seconds_right=f"{100 * seconds.double().mean():.1f} %", all_right=f"{100 * result['joint']:.1f} %",
                  interval=f"{100 * result['low']:.0f} to {100 * result['high']:.0f}")
        curve = seconds.double().mean(0).tolist()
    table.wrote()
    by_second = common.Table(Path(args.out) / "minute_by_second.csv", quiet=True)
    for second, share in enumerate(curve, 1):
        by_second.add(frames=args.frames[-1], second=second, right=round(share, 3))
    by_second.wrote()
    common.plot(args.plot, draw(curve))


if __name__ == "__main__":
    common.run(main, "minute.py")
