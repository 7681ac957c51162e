"""How fast the scan is: against other plain-PyTorch scans, by length, and in both directions.

    python benchmarks/speed.py                      all tables, some ten minutes on two cores
    python benchmarks/speed.py peers --quick        one of peers, linear, both, mate

Times are medians of runs taken in turn, since the speed of a shared machine drifts: read the
ratios. Peak memory is what a process of its own adds. Peers: mamba-ssm's ssd_minimal_discrete and
transformers' mamba2_chunk_scan, see tests/requirements-peers.txt. Memory is kept between calls.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import common
from mamba2_ref import BidirectionalMamba2, Mamba2, ssd_bidirectional, ssd_chunked

HEADS, HEADDIM, D_STATE, CHUNK = 8, 32, 32, 32
PASSES = {"no": False, "yes": True}


def scan_inputs(length):
    """x, dt, A, B, C: batch 1, 8 heads of 32, one group, d_state 32, float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, length, HEADS, HEADDIM, generator=generator)
    dt = 0.1 * torch.rand(1, length, HEADS, generator=generator)
    A = -8 * torch.rand(HEADS, generator=generator)
    B, C = torch.randn(2, 1, length, 1, D_STATE, generator=generator)
    return x, dt, A, B, C


def scans():
    """{name: scan(x, dt, A, B, C, chunk_size)}: ours, and the peers that are installed."""
    found = {"ours": ssd_chunked}
    try:
        from tests import peers

        for name, scan in (("ssd_minimal", peers.minimal), ("transformers", peers.transformers)):
            scan(*scan_inputs(64), 32)
            found[name] = scan
    except ImportError as error:
        print(f"peers are left out: {error}", file=sys.stderr)
    return found


def runner(scan, length, chunk, backward):
    """A function that runs a scan once, with its backward pass or without."""
    inputs = [t.requires_grad_(backward) for t in scan_inputs(length)]

    def run():
        with torch.set_grad_enabled(backward):
            y = scan(*inputs, chunk)
        if backward:
            torch.autograd.grad(y, inputs, torch.ones_like(y))

    return run


def layer_runner(layer, u, backward):
    def run():
        with torch.set_grad_enabled(backward):
            y = layer(u)
        if backward:
            y.sum().backward()

    return run


def in_turn(runs, times):
    """Median milliseconds of each function of {name: run}, run in turn after a warm-up."""
    taken = {name: [] for name in runs}
    for round_ in range(times + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_:
                taken[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def child(name, length, chunk, backward):
    """What one run of a scan adds to the memory of this process, in MiB."""
    scan = scans()[name]
    runner(scan, 256, chunk, backward)()  # loads the libraries
    run, before = runner(scan, length, chunk, backward), common.peak_mib()
    run()
    return common.peak_mib() - before


def peers(add, quick):
    """Against other scans, each at its best chunk size."""
    every, best = scans(), {"ours": CHUNK}
    for length in (4096, 16384) if quick else (4096, 16384, 131072):
        for pass_, backward in PASSES.items():
            for name in set(every) - {"ours"}:
                sizes = (32, 64, 128, 256)
                runs = {size: runner(every[name], length, size, backward) for size in sizes}
                taken = in_turn(runs, 3)
                best[name] = min(taken, key=taken.get)
            runs = {name: runner(every[name], length, best[name], backward) for name in every}
            taken = in_turn(runs, 3 if length > 100_000 else 9)
            peak = {}
            for name in every:
                request = dict(name=name, length=length, chunk=best[name], backward=backward)
                peak[name] = max(1, round(common.in_fresh_process(__file__, **request)))
            for name, ms in taken.items():
                add(length=length, scan=name, backward=pass_, chunk=best[name], ms=round(ms, 1),
                    peak_mib=peak[name], slower=round(ms / taken["ours"], 2),
                    memory=round(peak[name] / peak["ours"], 2))  # fmt: skip


def linear(add, quick):
    """Cost per token."""
    for pass_, backward in PASSES.items():
        lengths = (8192, 32768) if quick else (8192, 32768, 131072)
        runs = {length: runner(ssd_chunked, length, CHUNK, backward) for length in lengths}
        each = {length: ms / length for length, ms in in_turn(runs, 5).items()}
        for length, ms in each.items():
            us = round(1000 * ms, 3)
            add(length=length, backward=pass_, us_per_token=us, to_8192=round(ms / each[8192], 3))


def both(add, quick):
    """Both directions, over two scans or two layers in one direction."""
    length, u = 4096, torch.randn(1, 4096, 256)
    sizes = dict(d_model=256, d_state=32, headdim=32, expand=1, backend="torch")
    layers = {"one": Mamba2(**sizes), "both": BidirectionalMamba2(**sizes)}
    for pass_, backward in PASSES.items():
        runs = {"one": ssd_chunked, "both": ssd_bidirectional}
        runs = {name: runner(scan, length, CHUNK, backward) for name, scan in runs.items()}
        of_layers = {name: layer_runner(layer, u, backward) for name, layer in layers.items()}
        for what, functions in (("scan", runs), ("layer", of_layers)):
            taken = in_turn(functions, 3 if quick else 9)
            add(what=what, length=length, backward=pass_, one_ms=round(taken["one"], 1),
                both_ms=round(taken["both"], 1),
                of_two=round(taken["both"] / taken["one"] / 2, 3))  # fmt: skip


def mate(add, quick):
    """A training step of the tiny model, against the same model with full attention (DiT)."""
    models = {mixer: common.build("tiny", mixer=mixer) for mixer in ("mate", "attention")}
    for frames in (16, 64) if quick else (16, 64, 256, 1024):
        inputs, runs = common.model_inputs(models["mate"].config, (frames, 24, 24)), {}
        for mixer, model in models.items():
            runs[mixer] = lambda model=model, inputs=inputs: model(*inputs).sum().backward()
        taken = in_turn(runs, 5)
        add(tokens=9 * frames, frames=frames, mate_ms=round(taken["mate"], 1),
            dit_ms=round(taken["attention"], 1),
            ratio=round(taken["attention"] / taken["mate"], 2))  # fmt: skip


TABLES = {"peers": peers, "linear": linear, "both": both, "mate": mate}


def main():
    parser = common.parser_of(__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--quick", action="store_true", help="leave out the longest sequences")
    args = common.arguments(parser, child)
    if set(args.tables) - set(TABLES):
        parser.error(f"expected tables of {', '.join(TABLES)}")
    common.keep_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in args.tables or TABLES:
        print(f"\n{TABLES[name].__doc__}\n")
        TABLES[name](common.Table(args.out / f"speed_{name}.csv").add, args.quick)


if __name__ == "__main__":
    common.run(__file__, main)
