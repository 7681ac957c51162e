"""A training run: its loss, stage by stage, and how right its clips are, as CSV and picture.

    python benchmarks/progress.py runs/tiny.pt                  the loss of a run, finished or not
    python benchmarks/progress.py runs/tiny.pt --watch          beside a run: judges it every twentieth of its steps

Each stage has its own scale of loss, since longer clips are trained nearer to the noise: compare within a stage.
"""
import argparse
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import sample  # noqa: E402
from benchmarks import common, pictures  # noqa: E402
from benchmarks.judge import score  # noqa: E402

JUDGED = ("colour_ok", "shape_ok", "direction_ok", "steady", "overlap_ok", "joint")


def training_of(checkpoint, path):
    """What a checkpoint says of its training; ValueError if its losses are gone, as in a published one."""
    training = checkpoint.get("training", {})
    if not training.get("losses"):
        raise ValueError(f"{path} holds no losses; take the file that train_tiny.py wrote")
    return training


def smooth(losses):
    """Means of 25 consecutive steps of one stage (of fewer, if it has no more): [(step, frames, loss)] -> the same, shorter."""
    rows = []
    for frames in sorted({f for _, f, _ in losses}):
        own = [row for row in losses if row[1] == frames]
        window = min(25, len(own))
        for i in range(0, len(own) - window + 1, window):
            part = own[i : i + window]
            rows.append((part[-1][0], frames, round(sum(loss for *_, loss in part) / window, 5)))
    return sorted(rows)


def of_run(rows, training):
    """The rows of accuracy.csv that belong to this run, also if it was made longer since: those with its loss at their step."""
    losses = {str(step): str(loss) for step, (_, loss) in enumerate(training["losses"], 1)}
    return [row for row in rows if losses.get(row["step"], "") == row.get("loss")]


def watch(path, target, captions):
    """Judge the checkpoint at `path` whenever it is a twentieth of its run further, until the run is over.

    Adds a row to the CSV `target` each time, and yields what the checkpoint says of its training. Judged is the average
    of the weights, by captions of combinations that training never shows, with as many objects as it shows.
    """
    table, done = common.Table(target, resume=True, quiet=True), 0
    while True:
        model, checkpoint = sample.load_model(path, "cpu")
        training = training_of(checkpoint, path)
        step, steps = training["step"], training["steps"]
        if step >= done + steps / 20 or step == steps > done:
            done = step
            _, result = score(model, captions, 16, sample.steps_for(checkpoint["sampling"]), training["objects"], held_out_only=True)
            table.rows = [row for row in of_run(table.rows, training) if int(row["step"]) < step]
            table.add(step=step, loss=training["losses"][-1][1], **{name: round(result[name], 4) for name in JUDGED})
            print(f"step {step}: " + ", ".join(f"{name.removesuffix('_ok').replace('_', ' ')} {100 * result[name]:.0f} %" for name in JUDGED), flush=True)
            yield training
        if step >= steps:
            return
        time.sleep(20)


def panel(page, box, steps, lines, ticks, height):
    """One diagram: lines {label: [(step, value)]} in box (left, top, wide, high); height maps a value to 0 ... 1."""
    left, top, wide, high = box
    at = lambda step, value: (left + wide * step / steps, top + high * (1 - height(value)))
    for label, tick in ticks:
        page.line([at(0, tick), at(steps, tick)], pictures.GREY, 1)
        page.text(left - 8, at(0, tick)[1], label, "rm")
    for k in range(5):
        page.text(left + wide * k / 4, top + high + 8, str(steps * k // 4), "ma")
    for k, (label, line) in enumerate(lines.items()):
        colour, x, y = common.COLOURS[k], left + 120 * (k % 4), top - 38 + 20 * (k // 4)
        if len(line) > 1:
            page.line([at(*point) for point in line], colour, 2.5)
        page.line([(x, y), (x + 24, y)], colour, 2.5)
        page.text(x + 30, y, label, "lm")


def draw(losses, accuracy, steps):
    """The loss per number of frames on a logarithmic axis; on the right, where there is any, the judge's shares."""
    page = pictures.Page(1180 if accuracy else 660, 380)
    low, span = math.log10(min(r[2] for r in losses) * 0.9), math.log10(max(r[2] for r in losses) / min(r[2] for r in losses) * 1.25)
    lines = {f"{n} frame{'s' * (n > 1)}": [(step, loss) for step, f, loss in losses if f == n] for n in sorted({r[1] for r in losses})}
    ticks = [(str(t), t) for t in (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5) if low < math.log10(t) < low + span]
    panel(page, (60, 60, 540, 260), steps, lines, ticks, lambda loss: (math.log10(loss) - low) / span)
    page.text(60, 372, "loss over steps (cross-entropy of the predicted clip)", "ls")
    if accuracy:
        lines = {name.removesuffix("_ok").replace("_", " "): [(int(r["step"]), float(r[name])) for r in accuracy] for name in JUDGED}
        panel(page, (670, 60, 480, 260), steps, lines, [(f"{100 * t:.0f} %", t) for t in (0, 0.25, 0.5, 0.75, 1)], lambda share: share)
        page.text(670, 372, "clips that are right in every frame, over steps", "ls")
    return page.done()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", help="as train_tiny.py wrote it; a published one has lost its losses")
    parser.add_argument("--watch", action="store_true", help="judge the checkpoint again and again while it is trained; see accuracy.csv")
    parser.add_argument("--captions", type=int, default=64, help="to judge with --watch (default 64)")
    parser.add_argument("--results", default=str(ROOT / "benchmarks" / "results"), help="folder of training.csv and accuracy.csv")
    parser.add_argument("--out", default=str(ROOT / "assets" / "training.png"))
    args = parser.parse_args()
    folder = Path(args.results)
    folder.mkdir(parents=True, exist_ok=True)
    runs = watch(args.checkpoint, folder / "accuracy.csv", args.captions) if args.watch else [training_of(sample.load_checkpoint(args.checkpoint), args.checkpoint)]
    for training in runs:
        rows = smooth([(step, frames, loss) for step, (frames, loss) in enumerate(training["losses"], 1)])
        table = common.Table(folder / "training.csv", quiet=True)
        table.rows = [dict(zip(("step", "frames", "loss"), row, strict=True)) for row in rows]
        table.write()
        accuracy = of_run(common.Table(folder / "accuracy.csv", resume=True).rows, training)
        pictures.write(draw(rows, accuracy, training["steps"]), args.out)
    print(f"wrote {folder / 'training.csv'} and {args.out}")


if __name__ == "__main__":
    common.run(main, "progress.py")
