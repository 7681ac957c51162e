"""What the scripts that check the paper's claims share: variants, models to time, tables that outlive Ctrl-C, plots."""
import argparse
import csv
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import sample
from benchmarks import pictures
from lingen import LinGen, preset

ROOT = Path(__file__).resolve().parent.parent
RESULTS, ASSETS = ROOT / "benchmarks" / "results", ROOT / "assets"
COLOURS = (pictures.BLUE, pictures.RED, pictures.GREEN, pictures.ORANGE, pictures.PINK, pictures.SKY, "#000000")     # for all eyes
# Each variant changes one field of the same LinGenConfig. Table 2 and figs. 11 and 12 of the paper argue with them.
VARIANTS = {"default": {}, "without TESA": dict(tesa=False), "without RMS": dict(scan="spatial-row"), "zigzag for RMS": dict(scan="zigzag"),
            "without MA-branch": dict(ma=False), "without review": dict(review=False)}


# ---- memory ------------------------------------------------------------------------------------------

# glibc gives big blocks back to the system after every call, and the system then clears each page anew: long sequences
# would be timed by that. So the timings keep memory, ours and theirs alike; `--give-back` shows the difference.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**31), "MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_TOP_PAD_": str(2**28)}


def keep_memory():
    """Begin this script anew with an allocator that keeps memory between calls: it reads its settings as a process begins."""
    if sys.platform == "linux" and KEEP_MEMORY.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)


def most_memory():
    """The most memory this process has held so far, in MiB. On Linux, getrusage would count the parent's, too."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    except (OSError, StopIteration):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---- models and clips ---------------------------------------------------------------------------------


def build(name, device="cpu", dtype=torch.float32, **changes):
    """A preset with random weights, made where it is to run, to be timed. Captions: 40 words, or embeddings."""
    config = preset(name, **({"vocab_size": 40} if name == "tiny" else {}), **changes)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)                          # so that 4 billion numbers never stand there in float32
    try:
        with torch.device(device):
            return LinGen(config).eval()
    finally:
        torch.set_default_dtype(default)


def clip_shape(config, seconds, pixels=512):
    """(frames, height, width) as the model takes them, at 16 frames a second: the toy's own 32 x 32 pixels, or square
    latents, 8 times smaller than the clip along each axis."""
    return (16 * seconds, 32, 32) if config.channels == 3 else (2 * seconds, pixels // 8, pixels // 8)


def tokens(config, shape):
    return (shape[0] // config.patch[0]) * (shape[1] // config.patch[1]) * (shape[2] // config.patch[2])


def denoising_step(model, shape, batch=1):
    """A function that runs the model once on noise of this shape, as one step of the sampler does."""
    config, like = model.config, model.patch_in.weight
    clip, t = like.new_empty(batch, config.channels, *shape).normal_(), like.new_full((batch,), 0.5)
    text = (torch.ones(batch, 8, dtype=torch.long, device=like.device) if config.vocab_size
            else like.new_empty(batch, config.text_length, config.text_dim).normal_())

    def step():
        with torch.inference_mode():
            model(clip, t, text)
    return step


def seconds(run, device="cpu"):
    """How long a call takes. A GPU is waited for; on one CPU thread it is processor time, which nobody else's work stretches."""
    gpu = torch.device(device).type == "cuda"
    wait = torch.cuda.synchronize if gpu else lambda: None
    clock = time.process_time if not gpu and torch.get_num_threads() == 1 else time.perf_counter
    wait()
    start = clock()
    run()
    wait()
    return clock() - start


def peak_mib(device="cpu"):
    """The most memory so far, in MiB: of this process, or on the GPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.device(device).type == "cuda" else most_memory()


def arguments(parser, child):
    """The arguments of a script that measures in processes of its own, --out among them.

    In such a process, see `in_fresh_process`, its part is done here, child(**REQUEST), and the script ends.
    """
    parser.add_argument("--out", default=str(RESULTS), help="folder of the CSV files")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(**json.loads(args.child))))
        sys.exit()
    return args


def of_checkpoint(doc, name, captions, picture):
    """(parser, arguments, model) of a script that measures a checkpoint, on so many captions if not told, and writes NAME.csv and NAME.png."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default=str(ASSETS / "tiny.pt"), help="default: the shipped one")
    parser.add_argument("--captions", type=int, default=captions, help=f"clips to average over (default {captions})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(RESULTS / f"{name}.csv"), help="the table")
    parser.add_argument("--plot", default=str(ASSETS / f"{name}.png"), help=picture)
    args = parser.parse_args()
    if not 1 <= args.captions <= 1000:
        parser.error(f"--captions {args.captions}: choose 1 to 1000")
    pictures.check_out(parser, args.plot, "--plot")
    return parser, args, sample.load_model(args.checkpoint)[0]


def in_fresh_process(script, threads=None, keep=False, **request):
    """What `script --child REQUEST` prints as its last line, JSON: only in a process of its own is a peak its own.

    threads: of torch, if not as here. keep: memory between calls, as in `keep_memory`; else it is given back, even if kept here.
    """
    env = {name: value for name, value in os.environ.items() if name not in KEEP_MEMORY}
    env |= ({"OMP_NUM_THREADS": str(threads)} if threads else {}) | (KEEP_MEMORY if keep else {})
    run = subprocess.run([sys.executable, script, "--child", json.dumps(request)], stdout=subprocess.PIPE, text=True, env=env)
    if run.returncode == 130:
        raise KeyboardInterrupt
    if run.returncode:
        why = "the system ended it, perhaps for want of memory" if run.returncode < 0 else "see above"
        raise ChildProcessError(f"{request} failed with exit code {run.returncode}: {why}")
    return json.loads(run.stdout.splitlines()[-1])


# ---- tables, plots, ends ------------------------------------------------------------------------------


class Table:
    """Rows that are printed as they come and stand in the CSV at once: whatever ends the script, they are kept."""

    def __init__(self, path, resume=False, quiet=False):
        self.path, self.rows, self.quiet, self.widths = Path(path), [], quiet, None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume and self.path.exists():
            with open(self.path, newline="") as file:
                self.rows = list(csv.DictReader(file))

    def add(self, **row):
        cells = {key: "" if value is None else str(value) for key, value in row.items()}
        self.rows.append(cells)
        if not self.quiet:
            lines = [cells.values()]
            if not self.widths:
                self.widths = [max(len(key), len(text), 8 if i else 24) + 2 for i, (key, text) in enumerate(cells.items())]
                lines = [row, *lines]
            for texts in lines:
                tqdm.write("".join(f"{text:{'>' if i else '<'}{width}}" for i, (text, width) in enumerate(zip(texts, self.widths))))
        self.write()

    def write(self):
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in self.rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        sample.replace_file(self.path, text.getvalue().encode())

    def wrote(self):
        print(f"wrote {self.path}\n")


def plot(path, draw, panels=1):
    """draw(*axes) on a row of panels, saved as PNG; without matplotlib a line says so, and that is all."""
    try:
        import matplotlib
    except ImportError:
        return print("no plot: matplotlib is not installed")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    with plt.rc_context({"axes.prop_cycle": plt.cycler(color=COLOURS), "axes.spines.top": False, "axes.spines.right": False,
                         "axes.grid": True, "grid.color": "#E5E5E5", "font.size": 9, "legend.frameon": False}):
        figure, axes = plt.subplots(1, panels, figsize=(4.5 * panels, 3.3), squeeze=False, layout="constrained")
        draw(*axes[0])
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110)
        plt.close(figure)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sample.replace_file(path, out.getvalue())
    print(f"wrote {path}")


def going_on(parser, path, settings, quiet=False):
    """The table at `path`, with its rows: the parser's error where they were made with other settings than these."""
    table = Table(path, resume=True, quiet=quiet)
    if any(row.get(name) != str(value) for row in table.rows for name, value in settings.items()):
        parser.error(f"{table.path} holds rows made with other settings than {settings}: give the same, or another --out")
    return table


def run(main, name):
    """main() with a plain end: one line instead of a traceback, and after Ctrl-C the finished rows are there."""
    try:
        if code := main():
            sys.exit(code)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; the rows that were printed are in the CSV", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sys.exit(sample.complain(name, error, 1))
