"""What each part buys (LinGen figs. 11 and 12): the tiny model trained with one part taken out, and judged.

    python benchmarks/ablations.py --workers 2                        all variants, three seeds: over two hours of two cores
    python benchmarks/ablations.py --steps 150 --captions 8 --seeds 1 --out runs/ablations --plot runs/ablations.png       for a class: a quarter of an hour
    python benchmarks/ablations.py --minutes 20                       as much as fits; the next call goes on

Every variant is one field of the same LinGenConfig, trained by train_tiny's own recipe cut to --steps, on the same data for
the same seed. Measured on the average of the weights: the loss on clips of held-out combinations, of 16, 64 and 256 frames (the
recipe trains on all three) and of 1024 (longer than any it saw; review tokens are made for long clips), and the judge's verdict
on sampled clips of 16 frames. A row is one variant and seed, trained in a process of its own with one thread; seed 0 comes
first for all, so that whatever stands in the CSV compares whole sets. The DiT alone has position tables: MATE's branches
know places by themselves, but full attention without tables would not know one token from the next. Nor has it TESA's
drift, which is the toy's own: "without drift" is LinGen as the paper has it.
"""
import argparse
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import sample  # noqa: E402
import train_tiny  # noqa: E402
from benchmarks import common, judge  # noqa: E402
from lingen import preset  # noqa: E402

VARIANTS = {**common.VARIANTS, "without drift": dict(travel=False), "DiT": dict(mixer="attention", grid=(16, 8, 8))}
LENGTHS = (16, 64, 256, 1024)
JUDGED = ("joint", "colour_ok", "shape_ok", "size_ok", "direction_ok", "speed_ok", "one_object", "steady", "flicker")
# Fig. 11 in words: both TESA and RMS are best, RMS as good as zigzag. Fig. 12: people prefer the default over any variant.


def begin(variant, steps, seed):
    """The run of train_tiny.py, for a variant: only the config differs."""
    torch.set_float32_matmul_precision("medium")
    config = preset("tiny", vocab_size=len(train_tiny.VOCABULARY), **VARIANTS[variant])
    return train_tiny.Run(config, dict(steps=steps, seed=seed, objects=1, rate=2e-3), torch.device("cpu"))


def validation_loss(model, frames, tokens=2**14):
    """The training loss on clips that no training has seen: the same clips, times and noise for every model."""
    make = torch.Generator().manual_seed(20_000_003 + frames)
    clips, captions, _ = train_tiny.make_batch(max(4, tokens // (16 * frames)), frames, make, held_out_only=True, speeds=True)
    t, noise = train_tiny.draw_times(len(clips), frames, make), torch.randn(clips.shape, generator=make)
    with torch.no_grad():
        return train_tiny.flow_matching_loss(model, clips, sample.encode(captions, train_tiny.VOCABULARY), t, noise).item()


def child(variant, seed, steps, captions):
    """Train and judge one row, in this process."""
    train_tiny.PERIOD = 0       # every frame has noise of its own: far-off frames must come to agree by the network alone
    began, run = time.process_time(), begin(variant, steps, seed)
    for _ in tqdm(range(steps), desc=f"{variant}, seed {seed}", leave=False, disable=None):
        run.advance()
    trained = time.process_time() - began
    model = run.averaged()
    model.vocabulary, model.choices = train_tiny.VOCABULARY, train_tiny.SAMPLING["choices"]
    row = {f"loss_{frames}": round(validation_loss(model, frames), 5) for frames in LENGTHS}
    _, result = judge.score(model, captions, 16, sample.steps_for(train_tiny.SAMPLING) | {"views": 1})
    row |= {name.removesuffix("_ok"): round(result[name], 3) for name in JUDGED}
    return {**row, "cpu_seconds": round(trained)}


def summarise(rows, path):
    """One row per variant: mean and spread (standard deviation over the seeds) of what was measured."""
    table = common.Table(path)
    for variant in VARIANTS:
        own = [row for row in rows if row["variant"] == variant]
        if not own:
            continue
        show = {}
        for name in (*(f"loss_{frames}" for frames in LENGTHS), *(name.removesuffix("_ok") for name in JUDGED)):
            values = [float(row[name]) for row in own]
            digits = 4 if name.startswith("loss") else 2
            show[name] = f"{statistics.mean(values):.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")
        table.add(variant=variant, seeds=len(own), **show)
    table.wrote()


def draw(rows):
    def panels(*axes):
        for axis, name in zip(axes, ("loss_16", "loss_256", "loss_1024", "direction")):
            for place, variant in enumerate(VARIANTS):
                values = [float(row[name]) for row in rows if row["variant"] == variant]
                axis.plot(values, [place] * len(values), "o", color=common.COLOURS[0], alpha=0.6)
                if values:
                    axis.plot([statistics.mean(values)], [place], "|", color=common.COLOURS[1], markersize=16, markeredgewidth=2)
            axis.set(title=name.replace("_", ", ") + (" frames" if "loss" in name else " right"), yticks=range(len(VARIANTS)),
                     yticklabels=VARIANTS)
            axis.invert_yaxis()
            if axis is not axes[0]:
                axis.set_yticklabels([])
    return panels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=650, help="of training, for each row (default 650)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--captions", type=int, default=64, help="sampled and judged for each row (default 64)")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="VARIANT",
                        help=f"of: {', '.join(VARIANTS)} (default all)")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no row after so many minutes; rows in the CSV are not made again")
    parser.add_argument("--workers", type=int, default=1, help="rows at a time, each on one thread (default 1)")
    parser.add_argument("--plot", default=str(common.ASSETS / "ablations.png"))
    args = common.arguments(parser, child)
    if min(args.steps, args.seeds, args.captions, args.workers) < 1:
        parser.error("--steps, --seeds, --captions and --workers must be at least 1")
    settings = dict(steps=args.steps, captions=args.captions)
    table = common.going_on(parser, Path(args.out) / "ablations.csv", settings)
    done = {(row["variant"], int(row["seed"])) for row in table.rows}
    wanted = [(variant, seed) for seed in range(args.seeds) for variant in args.variants if (variant, seed) not in done]
    until, stop, writing = time.monotonic() + 60 * args.minutes, threading.Event(), threading.Lock()
    bar = tqdm(total=len(wanted), unit="row", leave=False, disable=None)

    def work(variant, seed):
        if stop.is_set() or time.monotonic() > until:
            return
        try:
            row = common.in_fresh_process(__file__, threads=1, variant=variant, seed=seed, **settings)
        except BaseException:
            stop.set()                                              # Ctrl-C reaches all workers; none begins another row
            raise
        with writing:
            table.add(variant=variant, seed=seed, **settings, **row)
            bar.update()
    with ThreadPoolExecutor(args.workers) as pool:
        try:
            for row in [pool.submit(work, *row) for row in wanted]:
                row.result()
        except BaseException:
            stop.set()
            raise
    bar.close()
    table.wrote()
    summarise(table.rows, Path(args.out) / "ablations_summary.csv")
    common.plot(args.plot, draw(table.rows), panels=4)


if __name__ == "__main__":
    common.run(main, "ablations.py")
