"""Claim: time and memory of a denoising step grow linearly with the clip (figs. 1b and 6).

    python benchmarks/length.py                    the tiny preset, 16 to 4352 frames: some minutes
    python benchmarks/length.py --preset small --seconds 1 4

MATE against full attention (the DiT), batch 1, random weights. Each point is measured in processes
of its own: the median of five steps after a warm-up, and the memory that a single step adds.
Attention stops where a step would take longer than --limit seconds.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common


def child(preset, mixer, seconds, pixels, repeats):
    """[seconds, MiB] of a step, in this process. The first of several steps is a warm-up."""
    model = common.build(preset, mixer=mixer, backend="torch")
    shape = common.clip_shape(model.config, seconds, pixels)
    common.denoising_step(model, (model.config.patch[0], *shape[1:]))()  # loads the libraries
    before, taken = common.peak_mib(), []
    step = common.denoising_step(model, shape)
    for _ in range(repeats):
        taken.append(common.seconds(step))
    return [statistics.median(taken[1:] or taken), common.peak_mib() - before]


def draw(rows):
    def panels(time, memory):
        for axis, unit, label in ((time, "s", "seconds per step"), (memory, "mib", "MiB")):
            for mixer, name in (("mate", "MATE (LinGen)"), ("attention", "attention (DiT)")):
                own = [row for row in rows if row[f"{mixer}_{unit}"]]
                values = [float(row[f"{mixer}_{unit}"]) for row in own]
                axis.loglog([int(row["tokens"]) for row in own], values, marker="o", label=name)
            axis.set(xlabel="tokens", ylabel=label)
        time.legend()

    return panels


def main():
    parser = common.parser_of(__doc__)
    parser.add_argument("--preset", choices=("tiny", "small", "4b"), default="tiny")
    parser.add_argument("--seconds", type=int, nargs="+", default=[1, 4, 17, 68, 272],
                        help="of video, at 16 frames a second")  # fmt: skip
    parser.add_argument("--pixels", type=int, default=512, help="side of the clip, for latents")
    parser.add_argument("--repeats", type=int, default=6, help="steps timed, the first a warm-up")
    parser.add_argument("--limit", type=float, default=120, help="seconds for attention's step")
    args = common.arguments(parser, child)
    config = common.build(args.preset, "meta").config
    table, last = common.Table(args.out / f"length_{args.preset}.csv"), None
    for length in args.seconds:
        tokens = common.count_tokens(config, common.clip_shape(config, length, args.pixels))
        measured = {"mate": None, "attention": None}
        for mixer in measured:
            if mixer == "attention" and last and last[1] * (tokens / last[0]) ** 2 > args.limit:
                continue
            point = dict(preset=args.preset, mixer=mixer, seconds=length, pixels=args.pixels)
            timed = common.in_fresh_process(__file__, keep=True, repeats=args.repeats, **point)
            _, memory = common.in_fresh_process(__file__, repeats=1, **point)
            measured[mixer] = timed[0], memory
        (mate, mate_mib), (dit, dit_mib) = measured["mate"], measured["attention"] or (None, None)
        last = last if dit is None else (tokens, dit)
        table.add(seconds=length, tokens=tokens, mate_s=f"{mate:.3g}",
                  attention_s=None if dit is None else f"{dit:.3g}",
                  ratio=None if dit is None else round(dit / mate, 2), mate_mib=round(mate_mib),
                  attention_mib=None if dit is None else round(dit_mib),
                  us_per_token=round(1e6 * mate / tokens, 1))  # fmt: skip
    common.plot(args.out / f"length_{args.preset}.png", draw(table.rows), panels=2)


if __name__ == "__main__":
    common.run(__file__, main)
