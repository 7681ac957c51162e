"""All that needs a GPU, in eight minutes on one card: checks, time, memory, training.

    python benchmarks/gpu.py                                 every part, into runs/gpu
    python benchmarks/gpu.py --part scan                     one part, without a time limit
    python benchmarks/gpu.py --device cpu --tiny             tries the script without a GPU

A part is a process of its own and is killed at its limit. Rows are written as they come, so a part
that fails or is killed loses only what it has not measured. The folder of --out gets summary.txt
(card, versions, seconds), and PART.csv and PART.txt (all it printed) of each part. ms is the median
of the runs after a first one. peak_mib counts all tensors, the weights too.

Without a network, `--wheels FOLDER` names a folder of unpacked packages, used where the machine
has none of its own. PyTorch and Triton are the machine's. Made for Python 3.12, less what it has:

    pip install --target FOLDER --no-deps --only-binary=:all: --python-version 3.12 \\
        einops tqdm pillow numpy packaging pytest pluggy iniconfig pygments
    MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \\
        pip install --target FOLDER --no-deps --no-build-isolation mamba-ssm==2.3.2.post1
"""

import functools
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if "--wheels" in sys.argv[:-1]:  # before the first import that may need it
    sys.path.append(str(Path(sys.argv[sys.argv.index("--wheels") + 1]).resolve()))

import torch

import mamba2_ref
import sample as sampler
import train_tiny
from benchmarks import ablations, common, cost, gpu_checks, minute, parts, progress
from mamba2_ref import ssd_chunked

OFFICIAL_CHUNK = 256  # the chunk size that the official kernels are made for


def official_scan(device):
    """The official kernels, or None where they cannot run."""
    scan, why = mamba2_ref.official_scan() if device.type == "cuda" else (None, "there is no GPU")
    if scan is None:
        print(f"no official kernels: {why}")
    return scan


# ---------------------------------------------------------------- the parts


def scan_inputs(length, device, grad):
    """x, dt, A, B, C of mamba2-130m: 24 heads of 64, d_state 128; bfloat16, dt and A float32."""
    with torch.device(device):
        x = torch.randn(1, length, 24, 64, dtype=torch.bfloat16)
        B, C = torch.randn(2, 1, length, 1, 128, dtype=torch.bfloat16)
        dt, A = 0.1 * torch.rand(1, length, 24), -8 * torch.rand(24)
    return [t.requires_grad_(grad) for t in (x, dt, A, B, C)]


def run_scan(scan, inputs, chunk):
    y = scan(*inputs, chunk)
    if y.requires_grad:
        torch.autograd.grad(y, inputs, y.detach())


def tune(add, device, tiny):
    """The first call of the official kernels compiles each some ten times, to choose the fastest.
    Done here, for the sizes of step, scan and table2, which find the results on the disk."""
    for backward in (False, True) if official_scan(device) else ():
        inputs = scan_inputs(4096, device, backward)
        run = functools.partial(run_scan, official_scan(device), inputs, OFFICIAL_CHUNK)
        common.measure(add, run, device, backward=backward)


def step(add, device, tiny):
    """A denoising step of the 4B preset at 512p, bfloat16: MATE against the DiT's attention."""
    models = {"DiT": cost.MODELS["DiT-4B"], "LinGen, torch": dict(backend="torch")}
    if official_scan(device):
        models["LinGen, official"] = dict(backend="mamba_ssm", chunk_size=OFFICIAL_CHUNK)
    for name, changes in models.items():
        model = common.build("tiny" if tiny else "4b", device, **changes).bfloat16()
        for seconds in (1,) if tiny else (17, 68):
            shape = common.clip_shape(model.config, seconds)
            tokens = common.count_tokens(model.config, shape)
            run = common.denoising_step(model, shape)
            common.measure(add, run, device, 2, model=name, seconds=seconds, tokens=tokens)
        del model, run
        common.free_memory()


def scan(add, device, tiny):
    """The scan. floor_ms: to read the inputs and write the outputs, at the speed of a copy."""
    source = torch.empty(2**20 if tiny else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = functools.partial(target.copy_, source)
    copies = [common.timed(copy, device) for _ in range(11)]
    bandwidth = 2 * source.nbytes / statistics.median(copies)  # bytes per millisecond
    print(f"a copy reads and writes {bandwidth / 1e6:.1f} GB/s")
    compiled = torch.compile(ssd_chunked, backend="eager" if tiny else "inductor", dynamic=False)
    lengths = (64,) if tiny else (4096, 16384, 65536, 262144)
    plan = [("plain", ssd_chunked, chunk, length) for length in lengths for chunk in (64, 128)]
    if official_scan(device):
        official = official_scan(device)
        plan += [("official", official, OFFICIAL_CHUNK, length) for length in lengths]
    plan.append(("compiled", compiled, 64, lengths[-1] // 4))
    for name, function, chunk, length in plan:
        for backward in (False, True):
            inputs = scan_inputs(length, device, backward)
            read, written = sum(t.nbytes for t in inputs), inputs[0].nbytes
            moved = read + written  # backward reads dy and the inputs again, and writes gradients
            moved += 2 * read + written if backward else 0
            run, floor = functools.partial(run_scan, function, inputs, chunk), moved / bandwidth
            common.measure(add, run, device, scan=name, tokens=length, backward=backward,
                           chunk=chunk, floor_ms=round(floor, 4))  # fmt: skip
            del run, inputs


def sample(add, device, tiny):
    """A clip from the shipped checkpoint, as sample.py makes it; the first one loads libraries."""
    model, checkpoint = sampler.load_model(common.SHIPPED, device, backend="torch")
    checkpoint["sampling"] |= dict(steps=2) if tiny else {}
    for frames in (16,) if tiny else (16, 64, 272, 1088):
        caption = "a red circle moving right"
        run = functools.partial(minute.sample_one, model, checkpoint, caption, frames)
        common.measure(add, run, device, 2, frames=frames)


def train(add, device, tiny):
    """The default training: what the judge says of 32 held-out captions, by minutes of training."""
    steps, every, captions = (1, 1, 1) if tiny else (train_tiny.STEPS, 600, 32)
    batch = functools.partial(train_tiny.training_batch, steps - 1, steps, 0)
    drawn = min(common.timed(batch, device) for _ in range(3))
    print(f"a batch is drawn on the CPU in {drawn:.1f} ms")
    run = ablations.new_run(dict(backend="torch"), steps, 0, device)
    progress.train_and_judge(add, run, every, captions)


def fits(model, seconds):
    """Does a denoising step of a clip of some seconds, at 512p, fit in memory?"""
    try:
        common.denoising_step(model, common.clip_shape(model.config, seconds))()
        fit = True
    except torch.OutOfMemoryError:
        fit = False
    common.free_memory()
    return fit


def cards(add, device, tiny):
    """The longest clip whose denoising step fits on a small card, in bfloat16 by the torch backend.
    Lengths are powers of two, to 34 minutes. CUDA itself is given 0.75 GB of each card."""
    for name in ("tiny",) if tiny else ("small", "4b", "tiny"):
        model, seconds = common.build(name, device, backend="torch").bfloat16(), 1
        common.free_memory()
        for card in (8, 12, 16, 24):
            if device.type == "cuda":
                total = torch.cuda.get_device_properties(0).total_memory
                share = (card - 0.75) * 2**30 / total
                if share > 1:  # this card is smaller
                    break
                torch.cuda.set_per_process_memory_fraction(share)
            while seconds <= (1 if tiny else 2048) and fits(model, seconds):
                seconds *= 2
            add(preset=name, card_gb=card, longest_s=seconds // 2)
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
        del model


def table2(add, device, tiny):
    """What each part costs (table 2): a step of the 4B preset, cut to 8 blocks, at 512p, 17 s."""
    changes = dict(backend="torch")
    if official_scan(device):
        changes = dict(backend="mamba_ssm", chunk_size=OFFICIAL_CHUNK)
    for name, paper in parts.PAPER.items():
        every = changes | common.VARIANTS[name] | dict(depth=2 if tiny else 8)
        model = common.build("tiny" if tiny else "4b", device, **every).bfloat16()
        run = common.denoising_step(model, common.clip_shape(model.config, 1 if tiny else 17))
        relative = round(paper / parts.PAPER["default"], 2)
        common.measure(add, run, device, variant=name, paper=relative)
        del model, run


# ---------------------------------------------------------------- running them

# Seconds for parts that run side by side; in all 480. The first group times nothing that counts.
GROUPS = [
    ((gpu_checks.tests, gpu_checks.suite, gpu_checks.judge, gpu_checks.judge_official, tune), 110),
    ((step,), 110),
    ((scan,), 80),
    ((sample,), 20),
    ((train,), 85),
    ((cards,), 40),
    ((table2,), 35),
]


def run_group(names, limit, out, say):
    """Run parts side by side, each in a process of its own, and say what became of them."""
    begun, running = time.monotonic(), {}
    env = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // len(names))), **os.environ}
    # What "tune" finds is kept for the other parts; what a part has printed survives a kill.
    env |= {"TRITON_CACHE_AUTOTUNING": "1", "PYTHONUNBUFFERED": "1"}
    for name in names:
        (out / f"{name}.csv").unlink(missing_ok=True)
        command = [sys.executable, __file__, "--part", name, *sys.argv[1:]]
        with open(out / f"{name}.txt", "w") as log:
            running[name] = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    while running:
        time.sleep(0.05)
        for name, process in list(running.items()):
            code, seconds = process.poll(), time.monotonic() - begun
            if code is None and seconds < limit:
                continue
            running.pop(name).kill()
            process.wait()
            ends = {0: "done", None: f"killed at its limit of {limit} s"}
            report(name, out, seconds, ends.get(code, f"failed with exit code {code}"), say)


def report(name, out, seconds, how, say):
    """Say how a part ended; where it did not do all, with the last line that it printed."""
    rows = len(common.Table(out / f"{name}.csv", resume=True).rows)
    last = (out / f"{name}.txt").read_text(errors="replace").splitlines()[-1:]
    how += f": {last[0]:.200}" if last and how != "done" else ""
    say(f"{name}: {rows} rows in {seconds:.0f} s, {how}")


def main():
    all_parts = {part.__name__: part for group, _ in GROUPS for part in group}
    parser = common.parser_of(__doc__)
    parser.set_defaults(out=Path("runs/gpu"))
    parser.add_argument("--part", choices=all_parts, help="run this part alone, without a limit")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--wheels", type=Path, help="a folder of unpacked packages")
    args = parser.parse_args()
    device = sampler.choose_device(args.device)
    if args.part:
        add = common.Table(args.out / f"{args.part}.csv").add
        return all_parts[args.part](add, device, args.tiny)
    args.out.mkdir(parents=True, exist_ok=True)
    summary = open(args.out / "summary.txt", "w", buffering=1)

    def say(line):
        print(line, flush=True)
        print(line, file=summary)

    card = torch.cuda.get_device_properties(0) if device.type == "cuda" else platform.machine()
    say(f"{card}, torch {torch.__version__}, Python {platform.python_version()}")
    begun = time.monotonic()
    for group, limit in GROUPS:
        run_group([part.__name__ for part in group], limit, args.out, say)
    say(f"all parts: {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    common.run(__file__, main)
