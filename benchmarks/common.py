"""What the benchmarks share: variants, models to time, processes of their own, tables, plots."""

import argparse
import csv
import gc
import io
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import sample as sampler
from lingen import LinGen, preset

# Each variant changes one field of LinGenConfig (table 2, figs. 11 and 12 of the paper).
VARIANTS = {
    "default": {},
    "without TESA": dict(tesa=False),
    "without RMS": dict(scan="spatial-row"),
    "zigzag for RMS": dict(scan="zigzag"),
    "without MA-branch": dict(ma=False),
    "without review": dict(review=False),
}
SHIPPED = str(Path(__file__).resolve().parent.parent / "assets" / "tiny.pt")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")


# ---------------------------------------------------------------- memory and time

# glibc returns large blocks to the system, which clears each page before it lends it again. Long
# sequences would be timed by that, so timings keep memory between calls, ours and the peers'.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**31),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
}


def keep_memory():
    """Start this script again with KEEP_MEMORY, which glibc reads at the start of a process."""
    if sys.platform == "linux" and KEEP_MEMORY.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)


def peak_mib():
    """The most memory that this process has held so far, in MiB."""
    if Path("/proc/self/status").exists():  # getrusage would count the parent's memory, too
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**10
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def seconds(run):
    """How long run() takes: on one thread processor time, which other programs do not stretch."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def timed(run, device):
    """Milliseconds of run() on a device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return 1000 * (time.perf_counter() - start)


def measure(add, run, device, runs=5, **row):
    """Add a row with the time of run() and all memory on the GPU. An error becomes its note.

    Runs after the first are counted: at least one, and no more than take 5 seconds."""
    result = dict(first_ms=None, ms=None, runs=0, peak_mib=None, note="")
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first, taken = timed(run, device), [timed(run, device)]
        while len(taken) < runs and sum(taken) < 5000:
            taken.append(timed(run, device))
        median = statistics.median(taken)
        result |= dict(first_ms=round(first, 3), ms=round(median, 3), runs=len(taken))
        if device.type == "cuda":
            result["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    except Exception as error:
        result["note"] = f"{type(error).__name__}: {error}".split("\n")[0][:150]
    free_memory()
    add(**row, **result)


def free_memory():
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def in_fresh_process(script, threads=None, keep=False, **request):
    """What a script's child(**request) returns, run in a process of its own. See `arguments`."""
    env = {name: value for name, value in os.environ.items() if name not in KEEP_MEMORY}
    env |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    env |= KEEP_MEMORY if keep else {}
    command = [sys.executable, script, "--child", json.dumps(request)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
    if run.returncode:
        raise ChildProcessError(f"{request} failed with exit code {run.returncode}")
    return json.loads(run.stdout.splitlines()[-1])


# ---------------------------------------------------------------- models and clips


def build(name, device="cpu", **changes):
    with torch.device(device):
        return LinGen(preset(name, **changes)).eval()


def clip_shape(config, length, pixels=512):
    """(frames, height, width) of `length` seconds at 16 frames a second.

    Clips of pixels are the toy's, 24 x 24. Latents are 8 times smaller along each axis.
    """
    if config.channels == 3:
        return 16 * length, 24, 24
    return 2 * length, pixels // 8, pixels // 8


def count_tokens(config, shape):
    return math.prod(size // patch for size, patch in zip(shape, config.patch))


def model_inputs(config, shape, batch=1, words=8):
    """Random (clip, t, text) for a model of this config."""
    clip, t = torch.randn(batch, config.channels, *shape), torch.full((batch,), 0.5)
    if config.vocab_size:
        return clip, t, torch.ones(batch, words, dtype=torch.long)
    return clip, t, torch.randn(batch, words, config.text_dim)


def denoising_step(model, shape):
    """A function that runs the model once, as one step of the sampler does."""
    weight, inputs = next(model.parameters()), []
    for part in model_inputs(model.config, shape):
        dtype = weight.dtype if part.is_floating_point() else part.dtype
        inputs.append(part.to(weight.device, dtype))

    def step():
        with torch.inference_mode():
            model(*inputs)

    return step


# ---------------------------------------------------------------- arguments, tables, plots


def parser_of(doc):
    """A parser with the script's docstring as help, and with --out."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder (default runs/)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def arguments(parser, child=None):
    """Parse the command line. In a process of `in_fresh_process`, run child and stop."""
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(**json.loads(args.child))))
        sys.exit()
    return args


class Table:
    """Rows that are printed and written to a CSV as they come, so that Ctrl-C keeps them.

    resume: begin with the rows that stand in the file. ValueError if one has other settings.
    """

    def __init__(self, path, resume=False, **settings):
        self.path, self.rows, self.widths = Path(path), [], None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume and self.path.exists():
            with open(self.path, newline="") as file:
                self.rows = list(csv.DictReader(file))
        if len(self.find(**settings)) < len(self.rows):
            raise ValueError(f"{self.path} holds rows of other settings; give another --out")

    def find(self, **values):
        """The rows with these values."""
        pairs = [(name, str(value)) for name, value in values.items()]
        return [row for row in self.rows if all(row.get(name) == value for name, value in pairs)]

    def add(self, **row):
        cells = {name: "" if value is None else str(value) for name, value in row.items()}
        if self.widths is None:
            wide = [max(len(name), len(cell), 8) + 2 for name, cell in cells.items()]
            self.widths = [max(wide[0], 20), *wide[1:]]
            self.write_line(cells)
        self.rows.append(cells)
        self.write_line(cells.values())
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        sampler.replace_file(self.path, text.getvalue().encode())

    def write_line(self, words):
        first, *others = zip(words, self.widths)
        line = f"{first[0]:<{first[1]}}" + "".join(f"{word:>{width}}" for word, width in others)
        tqdm.write(line)


def plot(path, draw, panels=1, width=4.5):
    """draw(*axes) on a row of panels -> a PNG; without matplotlib a line says so."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path} is not drawn: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "axes.prop_cycle": plt.cycler(color=COLOURS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#E5E5E5",
        "font.size": 9,
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        size = (width * panels, 3.3)
        figure, axes = plt.subplots(1, panels, figsize=size, squeeze=False, layout="constrained")
        draw(*axes[0])
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110)
        plt.close(figure)
    sampler.replace_file(path, out.getvalue())
    print(f"wrote {path}")


def run(script, main):
    sampler.run_command(Path(script).name, main)
