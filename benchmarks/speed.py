"""How fast the scan is, against other plain-PyTorch scans, against itself in two directions, and against attention.

    python benchmarks/speed.py                     all tables, some ten minutes on two cores
    python benchmarks/speed.py peers linear        some of them: peers, linear, both, mate, floor, bf16, gpu (where there is one)

Times are medians of runs taken in turn (ours, theirs, ours, ...), since a shared machine drifts: read the ratios.
Peak memory is what a process of its own adds while it runs. The peers are functions that pip installs: mamba-ssm's
`ssd_minimal_discrete` and transformers' `mamba2_chunk_scan`; see tests/requirements-peers.txt.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402

from benchmarks import common  # noqa: E402
from mamba2_ref import BidirectionalMamba2, Mamba2, _official_scan, ssd, ssd_bidirectional, ssd_chunked, ssd_chunked_plain  # noqa: E402

HEADS, HEADDIM, D_STATE = 8, 32, 32


def inputs(length, dtype=torch.float32):
    """Batch 1, 8 heads of 32, one group, d_state 32: x, dt, A, B, C."""
    make = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=make).to(dtype)
    return (randn(1, length, HEADS, HEADDIM), torch.rand(1, length, HEADS, generator=make) * 0.1,
            -8 * torch.rand(HEADS, generator=make), randn(1, length, 1, D_STATE), randn(1, length, 1, D_STATE))


def scans():
    """name -> scan(x, dt, A, B, C, chunk_size): ours, and the peers that are installed."""
    found = {"ours": ssd_chunked, "ours, both directions": ssd_bidirectional}
    try:
        from tests import peers
        for name, scan in (("ssd_minimal", peers.minimal), ("transformers", peers.transformers)):
            scan(*inputs(64), 32)
            found[name] = scan
    except ImportError as error:
        print(f"peers are left out: {error}", file=sys.stderr)
    return found


def runner(scan, arguments, chunk, backward):
    """A function without arguments that runs the scan once, with its backward pass or without."""
    if not backward:
        def run():
            with torch.no_grad():
                scan(*arguments, chunk)
        return run
    arguments = [t.detach().requires_grad_() for t in arguments]
    weight = torch.randn_like(arguments[0])

    def run():
        torch.autograd.grad(scan(*arguments, chunk), arguments, weight)
    return run


def in_turn(runs, times):
    """Median milliseconds of each of several functions, run in turn after one warm-up each."""
    taken, wait = {name: [] for name in runs}, torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for round_ in range(times + 1):
        for name, run in runs.items():
            wait()                                              # a GPU is still at work when Python has gone on
            start = time.perf_counter()
            run()
            wait()
            if round_:
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def child(name, length, chunk, backward):
    """What one run of a scan adds to the memory of its process, in MiB."""
    scan, arguments = scans()[name], inputs(length)
    runner(scan, inputs(256), chunk, backward)()                 # libraries load what they need
    before = common.most_memory()
    runner(scan, arguments, chunk, backward)()
    return common.most_memory() - before


def peak_mib(name, length, chunk, backward):
    """`child` in a process of its own, which gives memory back."""
    return round(common.in_fresh_process(__file__, name=name, length=length, chunk=chunk, backward=backward))


def peers(add, quick):
    print("Against other plain-PyTorch scans: float32, batch 1, 8 heads of 32, one group, d_state 32; ms, MiB, ratio to ours")
    every, best = {name: scan for name, scan in scans().items() if "both" not in name}, {"ours": 32}
    for length in (4096, 16384) if quick else (4096, 16384, 131072):
        for backward in (False, True):
            for name in every.keys() - {"ours"}:                # each peer at its best chunk size for this length
                by_chunk = in_turn({chunk: runner(every[name], inputs(length), chunk, backward) for chunk in (32, 64, 128, 256)}, 3)
                best[name] = min(by_chunk, key=by_chunk.get)
            runs = {name: runner(scan, inputs(length), best[name], backward) for name, scan in every.items()}
            taken = in_turn(runs, 3 if length > 100_000 else 9)
            peaks = {name: peak_mib(name, length, best[name], backward) for name in every}
            for name in every:
                add(length=length, pass_="both" if backward else "forward", scan=name, chunk=best[name], ms=round(taken[name], 1),
                    peak_mib=peaks[name], slower=round(taken[name] / taken["ours"], 2), memory=round(peaks[name] / max(1, peaks["ours"]), 2))


def linear(add, quick):
    print("Linear: microseconds per token")
    lengths = (8192, 32768, 131072)
    for backward in (False, True):
        taken = in_turn({length: runner(ssd_chunked, inputs(length), 32, backward) for length in lengths}, 3 if quick else 7)
        for length in lengths:
            add(length=length, pass_="both" if backward else "forward", us_per_token=round(1e3 * taken[length] / length, 3),
                to_8192=round(taken[length] / length / (taken[8192] / 8192), 3), peak_mib=None, inputs_and_output_mib=None)
    length = 2**20
    taken = in_turn({0: runner(ssd_chunked, inputs(length), 32, False)}, 1)[0]
    size = 4 * length * (2 * HEADS * HEADDIM + HEADS + 2 * D_STATE) / 2**20
    add(length=length, pass_="forward", us_per_token=round(1e3 * taken / length, 3), to_8192=None,
        peak_mib=peak_mib("ours", length, 32, False), inputs_and_output_mib=round(size))


def both(add, quick):
    print("Both directions at once, over two scans (or layers) in one direction")
    for length in (4096, 16384):
        for backward in (False, True):
            arguments = inputs(length)
            taken = in_turn({"one": runner(ssd_chunked, arguments, 32, backward), "both": runner(ssd_bidirectional, arguments, 32, backward)}, 9)
            add(what="scan", length=length, pass_="both" if backward else "forward", one_ms=round(taken["one"], 1),
                both_ms=round(taken["both"], 1), of_two=round(taken["both"] / (2 * taken["one"]), 3))
    for backward in (False, True):
        u, layers = torch.randn(1, 4096, 256), {"one": Mamba2(256, 32, headdim=32, expand=1), "both": BidirectionalMamba2(256, 32, headdim=32, expand=1)}

        def step(layer):
            with torch.set_grad_enabled(backward):
                out = layer(u)
            if backward:
                out.sum().backward()
        taken = in_turn({name: (lambda layer=layer: step(layer)) for name, layer in layers.items()}, 9)
        add(what="layer", length=4096, pass_="both" if backward else "forward", one_ms=round(taken["one"], 1),
            both_ms=round(taken["both"], 1), of_two=round(taken["both"] / (2 * taken["one"]), 3))


def mate(add, quick):
    print("The tiny LinGen against the same model with full attention (DiT), one training step, batch 1")
    from lingen import LinGen, preset
    for tokens in (128, 512, 2048, 8192) if quick else (128, 512, 2048, 8192, 32768):
        frames = tokens // 64 * 4
        clip, t, text = torch.randn(1, 3, frames, 32, 32), torch.rand(1), torch.ones(1, 6, dtype=torch.long)
        models = {mixer: LinGen(preset("tiny", vocab_size=40, mixer=mixer)) for mixer in ("mate", "attention")}

        def step(model):
            model(clip, t, text).square().mean().backward()
        taken = in_turn({mixer: (lambda model=model: step(model)) for mixer, model in models.items()}, 2 if tokens > 10_000 else 7)
        add(tokens=tokens, frames=frames, mate_ms=round(taken["mate"], 1), dit_ms=round(taken["attention"], 1),
            mate_over_dit=round(taken["mate"] / taken["attention"], 3))


def floor(add, quick):
    print("How far from the floor: the scan's products over the measured matrix rate, its bytes over the measured bandwidth")
    from torch.utils.flop_counter import FlopCounterMode
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    big = torch.randn(2**25)
    out = torch.empty_like(big)
    taken = in_turn({"product": lambda: a @ b, "copy": lambda: out.copy_(big)}, 15)
    rate, bandwidth = 2 * 1024**3 / taken["product"] * 1e3, 8 * big.numel() / taken["copy"] * 1e3
    for length in (4096, 131072):
        arguments = inputs(length)
        with FlopCounterMode(display=False) as counter:
            ssd_chunked(*arguments)
        moved = 4 * (sum(t.numel() for t in arguments) + arguments[0].numel())
        ms = in_turn({0: runner(ssd_chunked, arguments, 32, False)}, 5)[0]
        by_rate, by_bandwidth = 1e3 * counter.get_total_flops() / rate, 1e3 * moved / bandwidth
        add(length=length, pass_="forward", ms=round(ms, 1), gflop_per_s=round(rate / 1e9), gb_per_s=round(bandwidth / 1e9, 1),
            products_ms=round(by_rate, 2), bytes_ms=round(by_bandwidth, 2), binds="products" if by_rate > by_bandwidth else "bytes",
            factor=round(ms / max(by_rate, by_bandwidth), 1))


def bf16(add, quick):
    print("bfloat16 inputs against float32, and float32 with products in bfloat16 (torch.set_float32_matmul_precision)")
    runs = {}
    for name, dtype, precision in (("float32", torch.float32, "highest"), ("bfloat16 inputs", torch.bfloat16, "highest"), ("float32, products bfloat16", torch.float32, "medium")):
        for backward in (False, True):
            run = runner(ssd_chunked, inputs(16384, dtype), 32, backward)

            def timed(run=run, precision=precision):
                torch.set_float32_matmul_precision(precision)
                run()
            runs[name, backward] = timed
    taken = in_turn(runs, 7)
    torch.set_float32_matmul_precision("highest")
    for (name, backward), ms in taken.items():
        add(what=name, length=16384, pass_="both" if backward else "forward", ms=round(ms, 1), to_float32=round(ms / taken["float32", backward], 2))


def gpu(add, quick, device="cuda"):
    print("On a GPU, x, B and C in bfloat16, chunks of 128: our scan, its plain twin, that compiled, the official kernel, and that as our backend;\n"
          "to_floor: time over that of moving the bytes once")
    if device == "cuda" and not torch.cuda.is_available():
        return print("left out: there is no CUDA GPU here")
    official, why = _official_scan()
    every = {"ours": ssd_chunked, "plain": ssd_chunked_plain, "plain, compiled": torch.compile(ssd_chunked_plain, dynamic=False)}
    if official:
        every |= {"official": official, "backend": lambda *arguments: ssd(*arguments, backend="mamba_ssm")}
    else:
        print(f"without the official kernel: {why}")
    big = torch.randn(2**27 if device == "cuda" else 2**20, device=device)
    bandwidth = 8 * big.numel() / in_turn({0: lambda: big.clone()}, 9)[0] * 1e3
    for length in (2**12, 2**14, 2**16) if quick else (2**12, 2**14, 2**16, 2**18):
        arguments = [t.to(device) for t in inputs(length, torch.bfloat16)]
        read, written = (sum(t.numel() * t.element_size() for t in tensors) for tensors in (arguments, arguments[:1]))
        for backward in (False, True):
            # Forward: inputs in, y out. Backward: inputs and dy in, as many gradients out as inputs.
            floor_ms = 1e3 * (3 * read + 2 * written if backward else read + written) / bandwidth
            taken = in_turn({name: runner(scan, arguments, 128, backward) for name, scan in every.items()}, 9)
            for name, ms in taken.items():
                add(length=length, pass_="both" if backward else "forward", scan=name, ms=round(ms, 3), to_floor=round(ms / floor_ms, 1),
                    to_official=round(ms / taken["official"], 3) if official else None)


TABLES = {"peers": peers, "linear": linear, "both": both, "mate": mate, "floor": floor, "bf16": bf16, "gpu": gpu}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="Each table is also written as CSV into --out.")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"which: {', '.join(TABLES)} (default all)")
    parser.add_argument("--quick", action="store_true", help="leave out the longest sequences")
    parser.add_argument("--give-back", action="store_true", help="let glibc give memory back after each call (Linux); slower")
    args = common.arguments(parser, child)
    if unknown := set(args.tables) - set(TABLES):
        parser.error(f"there is no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    if not args.give_back:
        common.keep_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}\n")
    for name in args.tables or TABLES:
        table = common.Table(Path(args.out) / f"speed_{name}.csv")
        TABLES[name](table.add, args.quick)
        if table.rows:
            table.wrote()


if __name__ == "__main__":
    common.run(main, "speed.py")
