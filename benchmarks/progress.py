"""The loss of a training run, stage by stage, as CSV and picture.

    python benchmarks/progress.py runs/tiny.pt

Each stage has its own scale of loss, since longer clips are trained nearer to the noise: compare within a stage.
"""
import argparse
import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from PIL import Image, ImageDraw, ImageFont  # noqa: E402

import sample  # noqa: E402

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00")


def smooth(losses, window=25):
    """Means of consecutive windows of one stage's steps: [(step, frames, loss)] -> the same, shorter."""
    rows = []
    for frames in sorted({f for _, f, _ in losses}):
        own = [row for row in losses if row[1] == frames]
        for i in range(0, len(own) - window + 1, window):
            part = own[i : i + window]
            rows.append((part[-1][0], frames, round(sum(loss for *_, loss in part) / window, 5)))
    return sorted(rows)


def draw(rows, steps):
    """Loss over steps, one line per number of frames, on a logarithmic axis."""
    import math
    s, wide, high, left, top = 2, 900, 320, 70, 40
    image = Image.new("RGB", (s * (wide + left + 40), s * (high + top + 60)), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=14 * s)
    low, top_loss = math.log10(min(r[2] for r in rows) * 0.9), math.log10(max(r[2] for r in rows) * 1.1)

    def at(step, loss):
        return s * (left + wide * step / steps), s * (top + high * (top_loss - math.log10(loss)) / (top_loss - low))
    for tick in (0.02, 0.05, 0.1, 0.2, 0.5):
        if low < math.log10(tick) < top_loss:
            pen.line([at(0, tick), at(steps, tick)], "#DDDDDD", s)
            pen.text((s * (left - 8), at(0, tick)[1]), str(tick), "#222222", font, anchor="rm")
    for k in range(5):
        step = steps * k // 4
        pen.text((at(step, 1)[0], s * (top + high + 8)), str(step), "#222222", font, anchor="ma")
    for k, frames in enumerate(sorted({r[1] for r in rows})):
        line = [at(step, loss) for step, f, loss in rows if f == frames]
        if len(line) > 1:
            pen.line(line, COLOURS[k % 4], 3 * s)
        pen.line([s * (left + 150 * k), s * 20, s * (left + 24 + 150 * k), s * 20], COLOURS[k % 4], 3 * s)
        pen.text((s * (left + 32 + 150 * k), s * 20), f"{frames} frame{'s' * (frames > 1)}", "#222222", font, anchor="lm")
    pen.text((s * (left + wide), s * (top + high + 30)), "step; loss (mean squared error of the predicted clip) upwards", "#222222", font, anchor="ra")
    return image.resize((image.width // s, image.height // s), Image.Resampling.LANCZOS)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", help="as train_tiny.py wrote it; a published one has lost its losses")
    parser.add_argument("--csv", default=str(ROOT / "benchmarks" / "results" / "training.csv"))
    parser.add_argument("--out", default=str(ROOT / "assets" / "training.png"))
    args = parser.parse_args()
    try:
        losses = sample.load_checkpoint(args.checkpoint).get("training", {}).get("losses", [])
        rows = smooth([(step, frames, loss) for step, (frames, loss) in enumerate(losses, 1)])
        if not rows:
            raise ValueError(f"{args.checkpoint} holds too few losses to draw; take the file that train_tiny.py wrote")
        Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, "w", newline="") as file:
            csv.writer(file).writerows([("step", "frames", "loss"), *rows])
        draw(rows, len(losses)).save(args.out)
    except (OSError, ValueError) as error:
        sys.exit(f"progress.py: error: {error}")
    print(f"wrote {args.csv} and {args.out}")


if __name__ == "__main__":
    main()
