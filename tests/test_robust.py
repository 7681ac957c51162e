"""Nothing lost, nothing cryptic: kills, full disks, damaged files, dead workers, bad calls by the hundred, and fuzzing.

    python -m pytest tests/test_robust.py                 some of the kills, all of the bad calls
    python -m pytest tests/test_robust.py -m slow         60 kills, and what torchrun does when a worker dies
"""
import ast
import contextlib
import errno
import io
import json
import math
import os
import pickle
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import popen

import lingen
import mamba2_ref as M
import sample as S
import scan
import tesa
import train_tiny as toy
from benchmarks.common import KEEP_MEMORY
from benchmarks import judge as ruler

ROOT = Path(__file__).resolve().parent.parent
UNIX = os.name == "posix"
TINY = dict(d_model=32, depth=1, nheads=2, headdim=16, d_state=8)
STAGES = ((1, 4, 0.2), (4, 2, 0.3), (8, 2, 0.5))
# The real trainer with a small model and small stages; the argument is what to run.
SMALL = f"""
import lingen, torch, train_tiny as t
torch.set_num_threads(1)
lingen.PRESETS["tiny"] = {{**lingen.PRESETS["tiny"], **{TINY}}}
t.STAGES = tuple(t.Stage(*stage) for stage in {STAGES})
t.SAMPLING = {{**t.SAMPLING, "steps": 1}}
"""


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setitem(lingen.PRESETS, "tiny", {**lingen.PRESETS["tiny"], **TINY})
    monkeypatch.setattr(toy, "STAGES", tuple(toy.Stage(*stage) for stage in STAGES))
    monkeypatch.setattr(toy, "SAMPLING", {**toy.SAMPLING, "steps": 1})
    torch.set_num_threads(1)
    return tmp_path / "run.pt"


def train(out, *more, steps=6):
    return toy.main(["--steps", str(steps), "--save-every", "0", "--device", "cpu", "--out", str(out), *more])


def same(a, b):
    """Bit for bit, through tensors, lists and dicts: a NaN would be unequal, and so it should."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def load(path):
    return torch.load(path, weights_only=True)


# ---- killed ----------------------------------------------------------------------------------------------

# One process imports torch, and each attempt is a fork of it, so that sixty kills take no sixty imports. Every second kill
# comes from outside, at a random moment of a random step; the others come from inside, at the worst moments: while the
# checkpoint is written, before it is flushed, before it takes the place of the old one, and right after that.
KILLER = SMALL + """
import json, os, random, signal, sys, time
import sample
out, kills, steps, seed = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
make, done, seen = random.Random(seed), [], set()

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def fork(path, trap=None):
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)
    if trap:
        where, after, share = trap
        calls, fsync, replace = [0], os.fsync, os.replace
        def counted(here, do=None):
            calls[0] += here == where
            if here == where and calls[0] > after:
                die()
        class File:
            def __init__(self, *args): self.file = open(*args)
            def __enter__(self): return self
            def __exit__(self, *_): self.file.close()
            def __getattr__(self, name): return getattr(self.file, name)
            def write(self, data):
                self.file.write(data[: int(share * len(data))]); self.file.flush()
                counted("write")
                self.file.write(data[int(share * len(data)):])
        sample.open = lambda name, mode="r": File(name, mode) if "w" in mode else open(name, mode)
        os.fsync = lambda fd: (counted("fsync"), fsync(fd))
        os.replace = lambda a, b: (counted("before"), replace(a, b), counted("after"))
    os._exit(t.main(["--steps", steps, "--save-every", "0", "--device", "cpu", "--out", path, *(["--resume"] if os.path.exists(path) else [])]))

def stamp():
    try:
        return os.stat(out).st_mtime_ns
    except FileNotFoundError:
        return 0

began = time.monotonic()
assert os.waitpid(fork(out + ".whole"), 0)[1] == 0
step = (time.monotonic() - began) / int(steps)
while len(done) < kills:
    if len(done) % 2:
        trap = make.choice(("write", "fsync", "before", "after")), make.randrange(3), make.random()
        status = os.waitpid(fork(out, trap), 0)[1]
    else:
        pid, saves, wait = fork(out), make.randrange(3), make.random() * step * 1.5
        last = stamp()
        while saves and not os.waitpid(pid, os.WNOHANG)[0]:
            saves, last = saves - (stamp() != last), stamp()
            time.sleep(0.0005)
        time.sleep(wait)
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    if status == 0:                                                 # it was done before the kill came: from the beginning
        os.remove(out)
        continue
    assert status == signal.SIGKILL, (status, done)
    if os.path.exists(out):
        seen.add(len(sample.load_checkpoint(out)["training"]["losses"]))      # whole after every kill
    done.append(status)
assert os.waitpid(fork(out), 0)[1] == 0
print(json.dumps([len(done), sorted(seen)]))
"""


def survive(tmp_path, kills, steps, seed):
    out = tmp_path / "killed.pt"
    done = subprocess.run([sys.executable, "-c", KILLER, out, str(kills), str(steps), str(seed)], cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    survived, seen = json.loads(done.stdout)
    whole, killed = load(f"{out}.whole"), load(out)
    assert same(whole, killed) and killed["training"]["step"] == steps
    assert not list(tmp_path.glob(".*.part"))
    return survived, seen


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks, which this system has not")
def test_killed_it_ends_with_the_same_bits(tmp_path):
    assert survive(tmp_path, 4, 12, 0)[0] == 4


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks, which this system has not")
def test_killed_sixty_times_it_ends_with_the_same_bits(tmp_path):
    survived, seen = survive(tmp_path, 60, 100, 1)
    print(f"{survived} kills survived, at {len(seen)} different steps of 100")
    assert survived == 60 and len(seen) >= 20


# ---- asked to stop, cut off, poisoned ----------------------------------------------------------------------

def interfere(monkeypatch, at, do):
    """Call do(run) before step `at`."""
    advance = toy.Run.advance

    def meddled(self, *args):
        if self.step == at:
            do(self)
        return advance(self, *args)
    monkeypatch.setattr(toy.Run, "advance", meddled)


@contextlib.contextmanager
def begun_with(number, handler):
    """As a process begins that was started so: these tests themselves may have been started by nohup, or not."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.skipif(not UNIX, reason="Windows has other signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_asked_to_stop_it_finishes_the_step_and_saves(small, monkeypatch, capsys, name):
    number = getattr(signal, name)
    whole = small.with_name("whole.pt")
    assert train(whole) == 0
    with monkeypatch.context() as patch, begun_with(number, signal.SIG_DFL):
        interfere(patch, 2, lambda run: os.kill(os.getpid(), number))
        assert train(small) == 128 + number
    said = capsys.readouterr().err
    assert "stopped at step 3 of 6" in said and "--resume" in said and load(small)["training"]["step"] == 3
    assert train(small, "--resume") == 0 and same(load(whole), load(small))


@pytest.mark.skipif(not UNIX, reason="Windows has other signals")
def test_asked_twice_it_stops_at_once(small, monkeypatch, capsys):
    interfere(monkeypatch, 2, lambda run: [os.kill(os.getpid(), signal.SIGINT) for _ in "ab"])
    assert train(small) == 130
    assert "checkpoint of step 2 is whole" in capsys.readouterr().err and load(small)["training"]["step"] == 2


def test_nohup_keeps_its_promise(small, monkeypatch):
    if not UNIX:
        pytest.skip("Windows has no SIGHUP")
    interfere(monkeypatch, 2, lambda run: os.kill(os.getpid(), signal.SIGHUP))
    with begun_with(signal.SIGHUP, signal.SIG_IGN):
        assert train(small) == 0


def test_a_closed_terminal_stops_no_training(small, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    monkeypatch.setattr(sys, "stderr", Gone())
    assert train(small) == 0 and load(small)["training"]["step"] == 6
    monkeypatch.setattr(sys, "stderr", None)                        # as under pythonw
    assert train(small, "--resume", steps=7) == 0 and load(small)["training"]["step"] == 7


def test_nan_names_what_to_do_and_keeps_the_checkpoint(small, monkeypatch, capsys):
    def poison(run):
        with torch.no_grad():
            run.model.blocks[0].mlp[0].weight[0, 0] = float("nan")
    interfere(monkeypatch, 3, poison)
    assert train(small) == 1
    said = capsys.readouterr().err
    assert "step 3" in said and "blocks.0.mlp.0" in said and "lower --rate" in said and "checkpoint of step 3 stays" in said
    saved = load(small)
    assert saved["training"]["step"] == 3 and all(p.isfinite().all() for p in saved["training"]["model"].values())


@pytest.mark.parametrize("error, says", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB of which 0.50 GiB is free."), "2.00 GiB more asked for, 0.50 GiB free"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes."), "8 GiB more asked for"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB). Tried to allocate 2.00 GB on private pool."), "2.00 GB more asked for"), (MemoryError(), "out of memory at step 4")])
def test_out_of_memory_says_what_to_make_smaller(small, monkeypatch, capsys, error, says):
    def fail(run):
        raise error
    interfere(monkeypatch, 4, fail)
    assert train(small) == 1
    said = capsys.readouterr().err
    assert says in said and "on 2 clips of 8 frames" in said and "half of `batch`" in said and "checkpoint of step 4 is whole" in said


def test_out_of_memory_on_one_clip_asks_for_shorter_ones(small, monkeypatch, capsys):
    monkeypatch.setattr(toy, "STAGES", (*toy.STAGES[:-1], toy.Stage(8, 1, 0.5)))

    def fail(run):
        raise MemoryError
    interfere(monkeypatch, 5, fail)
    assert train(small) == 1
    said = capsys.readouterr().err
    assert "on 1 clip of 8 frames" in said and "leave out the last of STAGES" in said and "half of" not in said


# ---- no room, no folder, no permission -----------------------------------------------------------------------

def no_room(monkeypatch, while_):
    fsync = os.fsync

    def full(fd):
        if while_():
            raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(fd)
    monkeypatch.setattr(os, "fsync", full)


def test_room_is_made_again_and_nothing_is_lost(small, monkeypatch, capsys):
    whole = small.with_name("whole.pt")
    assert train(whole) == 0
    tries = []
    no_room(monkeypatch, lambda: tries.append(1) or 2 < len(tries) < 5)
    assert train(small) == 0 and same(load(whole), load(small))
    said = capsys.readouterr().err
    assert said.count("could not be saved") == 2 and "make room" in said and "checkpoint of step 2 is whole" in said


@pytest.mark.parametrize("limit", [False, True])
def test_a_full_disk_leaves_the_checkpoint_before(small, monkeypatch, capsys, limit):
    assert train(small, steps=3) == 0
    before = small.read_bytes()
    if limit:                                                       # a real limit of the system, not a pretended one
        resource = pytest.importorskip("resource")
        had = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, had[1]))
    else:
        no_room(monkeypatch, lambda: True)
    try:
        assert train(small, "--resume", steps=6) == 1
    finally:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, had)
    said = capsys.readouterr().err
    assert "step 6 could not be saved" in said and "make room there" in said and "checkpoint of step 3 is whole" in said and "Traceback" not in said
    assert small.read_bytes() == before and sorted(p.name for p in small.parent.iterdir()) == ["run.gif", "run.pt"]


def test_a_folder_that_goes_away_comes_back(small, monkeypatch):
    out = small.parent / "runs" / "run.pt"
    interfere(monkeypatch, 3, lambda run: shutil.rmtree(out.parent))
    assert train(out) == 0 and load(out)["training"]["step"] == 6


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_pipe_of_output_is_said(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, ROOT / "sample.py", "--read", ROOT / "assets" / "hero.gif"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.skipif(not UNIX, reason="pipes as Unix has them")
@pytest.mark.parametrize("script, args", [("sample.py", ["--help"]), ("scan.py", ["--grid", "2", "3", "3"]), ("train_tiny.py", ["--help"])])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_goes_is_no_error(script, args, buffered, tmp_path):
    read, write = os.pipe()
    os.close(read)                                                  # `| head` that has ended already
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"} | ({} if buffered else {"PYTHONUNBUFFERED": "1"})
    done = subprocess.run([sys.executable, ROOT / script, *args], stdout=write, stderr=subprocess.PIPE, cwd=tmp_path, env=env)
    os.close(write)
    assert done.stderr == b"" and done.returncode in (0, 141, -signal.SIGPIPE)


# ---- damaged files -----------------------------------------------------------------------------------------

class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def little(**changes):
    return {"format": S.FORMAT, "config": {}, "vocabulary": [], "weights": {"w": torch.arange(3.0)}, "sampling": {}, **changes}


def test_truncated_at_every_length_and_flipped_at_every_byte(tmp_path):
    path = tmp_path / "little.pt"
    torch.save(little(), path)
    whole, make, caught = path.read_bytes(), random.Random(0), 0
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="copy or download it again"):
            S.load_checkpoint(path)
    for n in range(len(whole)):
        path.write_bytes(whole[:n] + bytes([whole[n] ^ 1 << make.randrange(8)]) + whole[n + 1 :])
        try:
            got = S.load_checkpoint(path)
            assert same({key: got[key] for key in little()}, little())      # in the padding or a time stamp: no harm
        except ValueError as error:
            assert "little.pt" in str(error)
            caught += 1
    assert caught > len(whole) / 4


def test_a_damaged_run_is_not_resumed_and_not_touched(small, capsys):
    assert train(small, steps=2) == 0
    whole, make = small.read_bytes(), random.Random(1)
    assert train(small, "--resume", steps=3) == 0
    went_on, harmless = load(small), 0
    for n in (0, 1, len(whole) - 1, *(make.randrange(len(whole)) for _ in range(12))):
        for damaged in (whole[:n], whole[: n - 1] + bytes([whole[n - 1] ^ 16]) + whole[n:] if n else whole[:100]):
            small.write_bytes(damaged)
            code, said = train(small, "--resume", steps=3), capsys.readouterr().err
            if code == 0 and len(damaged) == len(whole):            # in the padding or a time stamp: it must go on as the whole one does
                assert same(load(small), went_on)
                harmless += 1
            else:
                assert code == 2 and "run.pt" in said and small.read_bytes() == damaged, said
    assert harmless < 10


def test_checkpoints_from_elsewhere(small, tmp_path, capsys):
    assert train(small, steps=2) == 0
    capsys.readouterr()
    good, trap, name = load(small), tmp_path / "trap", tmp_path / "odd.pt"
    odd = {"code": {**good, "training": Code(str(trap))}, "format": {**good, "format": "lingen-tiny-0"}, "list": [1], "vocabulary": {**good, "vocabulary": ["a"]},
           "model": {**good, "config": {**good["config"], "depth": 3}}, "no training": {**good, "training": 3},
           "no step": {**good, "training": {key: value for key, value in good["training"].items() if key != "losses"}},
           "optimizer": {**good, "training": {**good["training"], "optimizers": [{}, {}]}}, "optimizers": {**good, "training": {**good["training"], "optimizers": []}},
           "shapes": {**good, "training": {**good["training"], "model": {key: p[:1] for key, p in good["training"]["model"].items()}}},
           "average": {**good, "weights": {}}}
    for what, content in odd.items():
        torch.save(content, name)
        before = name.read_bytes()
        assert train(name, "--resume", steps=3) == 2, what
        said = capsys.readouterr().err
        assert said.startswith("train_tiny.py: error: ") and said.count("\n") == 1 and name.read_bytes() == before, (what, said)
    name.write_bytes(pickle.dumps(Code(str(trap))))
    for args in (["--resume", "--out", str(name)], ["--evaluate", str(name)], ["--publish", str(name), str(tmp_path / "p.pt")]):
        assert toy.main(args) == 2 and "odd.pt" in capsys.readouterr().err
    assert not trap.exists()


def test_odd_weights_and_packed_archives_are_refused(tmp_path):
    path, config = tmp_path / "odd.pt", lingen.preset("tiny", vocab_size=2, **TINY)
    weights = lingen.LinGen(config).state_dict()
    good = little(config=vars(config), vocabulary=["a", "b"], weights=weights)
    nothing = weights["nothing"]
    for value in (nothing * float("nan"), nothing.to(torch.complex64), nothing.int(), nothing.to("meta"), nothing.to_sparse()):
        torch.save({**good, "weights": {**weights, "nothing": value}}, path)
        with pytest.raises(ValueError, match="odd.pt"):
            S.load_model(path)
    for change in (dict(depth=10**9), dict(d_model=2**70), dict(grid=(10**18, 0, 0)), dict(vocab_size=10**15)):
        torch.save({**good, "config": {**vars(config), **change}}, path)
        with pytest.raises(ValueError, match="odd.pt"):
            S.load_model(path)
    torch.save(good, path)
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for record in plain.namelist():
            bomb.writestr(record, plain.read(record))
    assert S.load_model(path)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        S.load_checkpoint(tmp_path / "bomb.pt")


def test_publishing_destroys_no_run(small, tmp_path, capsys):
    other = tmp_path / "other.pt"
    assert train(small, steps=2) == 0 and train(other, steps=2) == 0
    before = small.read_bytes()
    for source in (small, other):
        assert toy.main(["--publish", str(source), str(small)]) == 2 and "would be lost" in capsys.readouterr().err
    assert small.read_bytes() == before
    published = tmp_path / "published.pt"
    assert toy.main(["--publish", str(small), str(published)]) == 0 == toy.main(["--publish", str(small), str(published)])


def test_memory_that_really_runs_out(tmp_path, monkeypatch, capsys):
    """Under a real limit of this process, sample.py says by how much the clip is too large."""
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").exists():
        pytest.skip("the limit is only kept on Linux")
    monkeypatch.chdir(tmp_path)
    config = lingen.preset("tiny", vocab_size=1, **TINY)
    torch.save(little(config=vars(config), vocabulary=["a"], weights=lingen.LinGen(config).state_dict()), "m.pt")
    had = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, had[1]))
    try:
        code = S.main(["a", "--checkpoint", "m.pt", "--frames", "1024", "--height", "256", "--width", "256", "--steps", "1", "--device", "cpu"])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, had)
    said = capsys.readouterr().err
    assert code == 1 and "out of memory" in said and "more asked for" in said and "times smaller" in said and [p.name for p in tmp_path.iterdir()] == ["m.pt"]


# ---- several processes -------------------------------------------------------------------------------------

LATER = "\nimport sys, sample; sample.command('train_tiny.py', t.main)"


def start(rank, port, *args):
    env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return popen([sys.executable, "-c", SMALL + LATER, *map(str, args)], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def two(*args):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(rank, port, *args) for rank in (0, 1)]


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


needs_distributed = pytest.mark.skipif(not (torch.distributed.is_available() and UNIX), reason="needs torch.distributed, and SIGKILL")


@needs_distributed
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_dead_worker_ends_the_run(tmp_path, victim):
    out = tmp_path / "two.pt"
    rows = two("--steps", 100000, "--save-every", 0, "--device", "cpu", "--out", out)
    until(out.exists)
    rows[victim].kill()
    began = time.monotonic()
    _, said = rows[1 - victim].communicate(timeout=60)
    took = time.monotonic() - began
    rows[victim].communicate()
    ended = rows[1 - victim].returncode == 1 and "another process of this run has ended" in said and "--resume" in said and "Traceback" not in said
    assert ended, (rows[1 - victim].returncode, said[-2000:])
    print(f"ended {took:.1f} s after the kill")
    assert S.load_checkpoint(out)["training"]["step"] > 0


@needs_distributed
@pytest.mark.slow
def test_ctrl_c_in_one_process_stops_both_at_the_same_step(tmp_path):
    out = tmp_path / "two.pt"
    rows = two("--steps", 100000, "--save-every", 10**6, "--device", "cpu", "--out", out)
    time.sleep(20)
    rows[1].send_signal(signal.SIGINT)
    for row in rows:
        _, said = row.communicate(timeout=60)
        assert row.returncode == 130 and "stopped at step" in said
    assert load(out)["training"]["step"] > 0


@needs_distributed
@pytest.mark.slow
def test_torchrun_ends_when_a_worker_dies(tmp_path):
    out, script = tmp_path / "two.pt", tmp_path / "small.py"
    script.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nopen({str(tmp_path)!r} + '/pid' + os.environ['RANK'], 'w').write(str(os.getpid()))\n" + SMALL + LATER)
    run = popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", script, "--steps", "100000",
                 "--save-every", "0", "--device", "cpu", "--out", out], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until(out.exists)
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
    said, _ = run.communicate(timeout=120)
    assert run.returncode and ("another process of this run has ended" in said or "stopped at step" in said or "SIGKILL" in said)
    assert S.load_checkpoint(out)["training"]["step"] > 0


# ---- bad calls: command lines --------------------------------------------------------------------------------

CHECKPOINT = str(ROOT / "assets" / "tiny.pt")
LONG = "red " * 2500                                                # 10 kB
INTS = ("", "x", "nan", "inf", "-1", "1.5", "99999999999999999999", "0x10", "1e3", "\u0663\u00b2")
FLOATS = ("", "x", "nan", "inf", "-inf", "-1", "1e999", "99999999999", "0,5")


def lines():
    """(program, arguments, what the message must say) of command lines that are wrong."""
    for name in ("frames", "height", "width", "steps", "seed", "scale"):
        yield from (("sample.py", ["a red circle", f"--{name}={value}"], name) for value in INTS)
    for name in ("fps", "guidance"):
        yield from (("sample.py", ["a red circle", f"--{name}={value}"], name) for value in FLOATS)
    for name in ("steps", "seed", "objects", "captions", "frames"):
        yield from (("train_tiny.py", [f"--{name}={value}"], name) for value in INTS)
    for name in ("rate", "save-every"):
        yield from (("train_tiny.py", [f"--{name}={value}"], name) for value in FLOATS if (name, value) != ("save-every", "99999999999"))
    for caption, says in (("", "empty"), (" \t\n", "empty"), (LONG, "2500 words"), ("x" * 10_000, "does not know"), ("a\x1b[2Jb", r"\x1b"), ("red\0circle", r"\x00"),
                          ("a \u202ered circle", r"\u202e"), ("\u05e2\u05d9\u05d2\u05d5\u05dc \u05d0\u05d3\u05d5\u05dd", r"\u05e2"), ("\U0001f534 circle", r"\U0001f534"),
                          ("a red\x1fcircle", r"\x1f"), ("a red\x85circle", r"\x85"), ("red\u2028circle", r"\u2028"), ("\udcff", r"\udcff"), ("B\u0130G", r"\u0307"), ("a <b>red</b>", "'<'"),
                          ("a red circel", "did you mean 'circle'"), ("rm -rf $HOME", "'$'")):
        yield "sample.py", [caption], says
    for args, says in (([], "no caption"), (["a", "--out", "clip"], "choose one of"), (["a", "--out", "clip.mp4"], ".mp4"), (["a", "--out", "none/clip.gif"], "make it first"),
                       (["a", "--out", "folder.gif/none/x.gif"], "make it first"), (["a", "--out", "a\0.gif"], "NUL"), (["a", "--out", "n" * 300 + ".gif"], "shorter name"),
                       (["a", "--out", "file.txt/clip.gif"], "make it first"), (["a", "--out", "\u5186/\u00e9.gif"], r"\u5186"), (["a", "--emerge", "folder.png"], "is a folder"),
                       (["a", "--emerge", "same.png", "--out", "same.png"], "two files"), (["a", "--emerge", "e.gif"], ".png"), (["a", "the", "--emerge", "e.png"], "one caption"),
                       (["a", "the", "--out", "clip.gif"], "make it first"), (["--captions", "binary"], "UTF-8"), (["--captions", "latin.txt"], "UTF-8"), (["--captions", "blank.txt"], "no caption"),
                       (["--captions", "."], "cannot read"), (["--captions", "none.txt"], "cannot read"), (["--captions", "a\0"], "not text"), (["--captions", "million.txt"], "million"),
                       (["--captions", "\u00e9t\u00e9 folder/none.txt"], r"\xe9"), (["a", "--checkpoint", "none.pt"], "train one"), (["a", "--checkpoint", "."], "is a folder"),
                       (["a", "--checkpoint", "binary"], "no whole checkpoint"), (["a", "--checkpoint", "blank.txt"], "no whole checkpoint"), (["a", "--checkpoint", "file.txt/x.pt"], "cannot read"),
                       (["a", "--checkpoint", "n" * 300], "name"), (["a", "--checkpoint", "code.pt"], "never run"), (["a", "--device", "toaster"], "not to be had"),
                       (["a", "--device", "meta"], "not to be had"), (["a", "--device", "cuda:77"], "not to be had"), (["a", "--backend", "jax"], "invalid choice"),
                       (["a", "--schedule", "cosine"], "invalid choice"), (["a", "--frames", "3"], "take 4"), (["a", "--height", "30"], "take 32"), (["a", "--width", "2"], "take 4"),
                       (["a", "--frames", "4096", "--height", "4096", "--width", "4096"], "times smaller"), (["a", "--height", "4096", "--scale", "64"], "a smaller scale"),
                       (["a", "--height", "1024", "--scale", "8", "--out", "c.png"], "a smaller scale"), (["--read", "none.gif"], "no file"), (["--read", "binary"], "no settings"),
                       (["--read", "."], "no settings"), (["--read", "a\0"], "no"), (["--read", "file.txt/x.gif"], "no file"), (["a", "--nonsense"], "unrecognized"),
                       (["a", "--frames"], "expected one argument"), (["a", "--fram", "4"], "unrecognized")):
        yield "sample.py", args, says
    if Path("/dev/zero").exists():
        yield from (("sample.py", ["a", "--checkpoint", "/dev/zero"], "not a file"), ("sample.py", ["--captions", "/dev/zero"], "million"), ("sample.py", ["--read", "/dev/zero"], "no file"),
                    ("train_tiny.py", ["--resume", "--out", "/dev/zero"], "not a file"))
    if Path("/proc/self").exists():                                 # writable to nobody, not even to root
        yield from (("sample.py", ["a", "--out", "/proc/clip.gif"], "nothing can be written"), ("train_tiny.py", ["--out", "/proc/run.pt"], "nothing can be written"),
                    ("train_tiny.py", ["--out", "/proc/runs/run.pt"], "/proc"), ("train_tiny.py", ["--publish", CHECKPOINT, "/proc/p.pt"], "nothing can be written"))
    for args, says in ((["--nonsense"], "unrecognized"), (["words"], "unrecognized"), (["--out"], "expected one argument"), (["--out", "run.gif"], ".gif"), (["--out", "."], "is a folder"), (["--out", ""], "is a folder"),
                       (["--out", "file.txt"], "exists"), (["--out", "file.txt/run.pt"], "file"), (["--out", "n" * 300], "shorter"), (["--out", "a\0"], "null"), (["--resume", "--out", "none.pt"], "none.pt"),
                       (["--resume", "--out", "binary"], "no whole checkpoint"), (["--resume", "--out", "code.pt"], "never run"), (["--resume", "--out", CHECKPOINT], "published"),
                       (["--resume", "--out", "new/none.pt"], "none.pt"), (["--evaluate", "none.pt"], "none.pt"), (["--evaluate", "."], "is a folder"), (["--evaluate", "binary"], "no whole checkpoint"),
                       (["--evaluate", CHECKPOINT, "--frames", "3"], "take 4"), (["--evaluate", CHECKPOINT, "--device", "toaster"], "not to be had"), (["--publish", "a"], "2 arguments"),
                       (["--publish", "none.pt", "p.pt"], "none.pt"), (["--publish", CHECKPOINT, "none/p.pt"], "make it first"), (["--publish", CHECKPOINT, "."], "is a folder"),
                       (["--publish", CHECKPOINT, "file.txt"], "file.txt"), (["--publish", "a", "b", "--evaluate", "c"], "not allowed with"), (["--examples", "none/e.png"], "make it first"),
                       (["--examples", "e.pt"], ".png"), (["--examples", "folder.png"], "is a folder"), (["--device", "toaster"], "not to be had"), (["--device", ""], "not to be had")):
        yield "train_tiny.py", args, says
    for program, options in (("scan.py", ("--grid", "--within")), ("tesa.py", ("--grid", "--window", "--shift")), ("mamba2_ref.py", ("--length",)), ("lingen.py", ("--size",))):
        for option in options:
            three = option not in ("--within", "--length")
            for value in ("x", "", "1.5", "-3", *(["0"] if option != "--shift" else []), *(["99999999999"] if option not in ("--within", "--window") else [])):
                yield program, [option, *([value] * (3 if three else 1))], option[2:]
            yield program, [option, "1", "2", "3", "4"], "arguments"
        yield program, ["--nonsense"], "unrecognized"
        yield program, ["--out", "picture"], "picture"
        yield program, ["--out", "picture.nonsense"], "picture"
        yield program, ["--out", "none/picture.png"], "none/picture"
        yield program, ["--out", "folder.png"], "folder.png"
    yield "lingen.py", ["--preset", "enormous"], "invalid choice"
    yield "lingen.py", ["--mixer", "blender"], "invalid choice"
    yield "lingen.py", ["--size", "3", "32", "32"], "multiple"
    yield "tesa.py", ["--window", "4", "4", "4", "--shift", "4", "4", "4"], "shift"
    for script in sorted((ROOT / "benchmarks").glob("*.py")):
        if "__main__" in script.read_text(encoding="utf-8"):
            yield f"benchmarks/{script.name}", ["--nonsense"], "error"
    yield from (("benchmarks/speed.py", ["nonsense"], "there is no table"), ("benchmarks/progress.py", ["none.pt"], "none.pt"), ("benchmarks/length.py", ["--seconds", "0"], "seconds"),
                ("benchmarks/length.py", ["--pixels", "15"], "pixels"), ("benchmarks/length.py", ["--preset", "huge"], "invalid choice"), ("benchmarks/parts.py", ["--rounds", "0"], "rounds"),
                ("benchmarks/parts.py", ["--depth", "-1"], "depth"), ("benchmarks/adjacency.py", ["--grid", "1", "1", "1"], "grid"), ("benchmarks/adjacency.py", ["--window", "0", "1", "1"], "window"),
                ("benchmarks/consumer.py", ["--device", "tpu"], "invalid choice"), ("benchmarks/pictures.py", ["--checkpoint", "none.pt"], "none.pt"),
                ("benchmarks/parts.py", ["--depth", "0"], "depth"))


LINES = list(dict.fromkeys((program, tuple(args), says) for program, args, says in lines()))


def run_script(program, args):
    """What `python program args` would do, in this process. Returns its exit code, its messages on stderr."""
    if program in ("sample.py", "train_tiny.py"):
        return (S if program == "sample.py" else toy).main(list(args))
    argv, path = sys.argv, list(sys.path)
    sys.argv = [program, *args]
    try:
        runpy.run_path(str(ROOT / program), run_name="__main__")
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):                               # as Python itself does it
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        sys.argv, sys.path[:] = argv, path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder full of traps."""
    place = tmp_path_factory.mktemp("wrong calls")
    (place / "binary").write_bytes(bytes(range(256)) * 40)
    (place / "latin.txt").write_bytes("un cercle bleut\u00e9".encode("latin-1"))
    (place / "blank.txt").write_text("\n \n")
    (place / "file.txt").write_text("a red circle\n")
    (place / "million.txt").write_text("a red circle\n" * 80_000)
    for folder in ("folder.gif", "folder.png"):
        (place / folder).mkdir()
    torch.save({**little(), "training": Code(str(place / "trap"))}, place / "code.pt")
    return place


def listing(place):
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in place.rglob("*") if p.is_file()), sorted(map(str, place.rglob("*")))


@pytest.mark.parametrize("program, args, says", LINES, ids=lambda v: ascii(v)[:50])
def test_bad_command_lines(program, args, says, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in KEEP_MEMORY.items():                             # or a benchmark would begin anew, in place of pytest
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(S, "sample", lambda *_, **__: pytest.fail("sampled before checking"))
    monkeypatch.setattr(toy.Run, "advance", lambda *_: pytest.fail("trained before checking"))
    before, began = listing(place), time.process_time()
    if program == "sample.py" and "--device" not in args and "--checkpoint" not in args:
        args = (*args, "--device", "cpu")
    code = run_script(program, args)
    took, said = time.process_time() - began, capsys.readouterr().err
    message = said.strip().splitlines()[-1] if said.strip() else ""
    assert (code == 2 or code == 1 and program in ("benchmarks/progress.py", "benchmarks/pictures.py")) and message.startswith(f"{Path(program).name}: error: "), (code, said)
    assert says in said, said                                       # argparse's own may break a line
    assert "Traceback" not in said and len(said) < 6000 and all(c.isprintable() or c == "\n" for c in said)
    if program in ("sample.py", "train_tiny.py"):
        assert said.count("\n") == 1 and said.isascii()
    assert listing(place) == before and took < 2


# ---- bad calls: functions ------------------------------------------------------------------------------------

def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


def scan_inputs(**changes):
    b, l, h, p, g, n = 2, 5, 4, 3, 2, 6
    return {"x": zeros(b, l, h, p), "dt": zeros(b, l, h), "A": zeros(h), "B": zeros(b, l, g, n), "C": zeros(b, l, g, n), **changes}


MODEL = lingen.LinGen(lingen.preset("tiny", vocab_size=3, **TINY))
GRID, CLIP, TIME, TEXT = zeros(2, 4, 4, 4, 8), zeros(2, 3, 4, 32, 32), zeros(2), torch.ones(2, 3, dtype=torch.long)
SPECS, STARTS, FRAMES = torch.zeros(2, 1, 5, dtype=torch.long), zeros(2, 1, 2), np.zeros((2, 4, 4, 3), np.uint8)
NAN, INF = math.nan, math.inf


def functions():
    """(label, call) of functions called wrongly."""
    for form in (M.ssd_recurrent, M.ssd_quadratic, M.ssd_chunked_plain, M.ssd_chunked, M.ssd_bidirectional):
        for label, change in {
                "x a list": dict(x=[1.0]), "x of 3 axes": dict(x=zeros(2, 5, 4)), "x int": dict(x=zeros(2, 5, 4, 3, dtype=torch.long)), "x empty": dict(x=zeros(2, 0, 4, 3)), "dt shape": dict(dt=zeros(2, 5, 3)),
                "A shape": dict(A=zeros(3)), "A None": dict(A=None), "B groups": dict(B=zeros(2, 5, 3, 6)), "B no groups": dict(B=zeros(2, 5, 0, 6)), "C shape": dict(C=zeros(2, 5, 2, 7)), "D shape": dict(D=zeros(3)),
                "z shape": dict(z=zeros(2, 5, 4)), "bias a float": dict(dt_bias=0.1), "device": dict(dt=zeros(2, 5, 4, device="meta")), "complex": dict(A=zeros(4, dtype=torch.complex64)),
                "limit": dict(dt_limit=(1.0, 0.0)), "limit NaN": dict(dt_limit=(0.0, NAN)), "limit of one": dict(dt_limit=3.0)}.items():
            yield f"{form.__name__}: {label}", lambda form=form, change=change: form(**scan_inputs(**change))
    for size in (0, -1, 2.0, "8", True, None):
        yield f"chunk_size {size!r}", lambda size=size: M.ssd_chunked(**scan_inputs(), chunk_size=size)
    yield "initial_states", lambda: M.ssd_chunked(**scan_inputs(), initial_states=zeros(2, 4, 6, 3))
    yield "seq_idx of floats", lambda: M.ssd_chunked(**scan_inputs(), seq_idx=zeros(2, 5))
    yield "backend", lambda: M.choose_backend("jax", "cpu")
    for change in (dict(headdim=0), dict(headdim=7), dict(ngroups=0), dict(ngroups=3), dict(ngroups=-1), dict(d_state=0), dict(d_state=-4), dict(d_conv=0), dict(expand=0), dict(expand=NAN), dict(expand=INF),
                   dict(d_model=0), dict(d_model=-8), dict(d_model=8.5), dict(d_model="8"), dict(chunk_size=0), dict(backend="jax"), dict(headdim=2.0), dict(d_state=None)):
        yield f"Mamba2 {change}", lambda change=change: M.Mamba2(**{"d_model": 8, "headdim": 4, **change})
    for what, value in {"a list": [1], "2 axes": zeros(3, 8), "width": zeros(1, 3, 7), "dtype": zeros(1, 3, 8, dtype=torch.float64), "int": zeros(1, 3, 8, dtype=torch.long), "device": zeros(1, 3, 8, device="meta"),
                        "empty": zeros(1, 0, 8)}.items():
        yield f"Mamba2.forward: {what}", lambda value=value: M.Mamba2(8, headdim=4, expand=1)(value)
        yield f"BidirectionalMamba2.forward: {what}", lambda value=value: M.BidirectionalMamba2(8, headdim=4, expand=1)(value)

    for order in ("spiral", "", -1, 1.0, None, True, [0], b"zigzag"):
        yield f"to_sequence order {order!r}", lambda order=order: scan.to_sequence(GRID, order)
        yield f"to_grid order {order!r}", lambda order=order: scan.to_grid(zeros(2, 64, 8), order, (4, 4, 4))
    for what, grid in {"list": [[1]], "None": None, "4 axes": GRID[0], "empty": zeros(2, 0, 4, 4, 8), "array": np.zeros((1, 2, 2, 2, 3))}.items():
        yield f"to_sequence {what}", lambda grid=grid: scan.to_sequence(grid, "zigzag")
        yield f"review_tokens {what}", lambda grid=grid: lingen.review_tokens(grid, (2, 2, 2))
        yield f"TESA {what}", lambda grid=grid: tesa.TemporalSwinAttention(8, 2)(grid)
    for shape in ((4, 4), (4, 4, 5), (0, 4, 4), (-4, -4, 4), (4.0, 4, 4), "444", None, 64, (4, 4, None)):
        yield f"to_grid shape {shape!r}", lambda shape=shape: scan.to_grid(zeros(2, 64, 8), 0, shape)
    yield "to_grid of a list", lambda: scan.to_grid([1], 0, (1, 1, 1))
    for shape in ((4, 4), (-4, 4, 4), (0, 4, 4), (1.5, 4, 4), None, "abc"):
        yield f"places {shape!r}", lambda shape=shape: scan.places("zigzag", shape)
        yield f"distances {shape!r}", lambda shape=shape: scan.distances("rms", shape)
        yield f"windows {shape!r}", lambda shape=shape: tesa.windows(shape, (2, 2, 2), (0, 0, 0))

    for pool in ((0, 1, 1), (1, 1), (-1, 2, 2), (2.0, 2, 2), "222", None, 0, -2, (NAN, 1, 1)):
        yield f"review_tokens pool {pool!r}", lambda pool=pool: lingen.review_tokens(GRID, pool)
    yield "review_tokens of ints", lambda: lingen.review_tokens(GRID.long(), (2, 2, 2))
    for name, values in {"d_model": (0, -1, 1.5, "x", None, True, 10**18), "depth": (0, -1, None, 10**9), "nheads": (0, 3, "4", 10**6), "headdim": (0, 48, 2**40), "d_state": (0, -1, 10**12), "ngroups": (0, 3, -1),
                         "d_conv": (0, "4"), "chunk_size": (0, 1.0), "channels": (0, -3, 10**9), "text_length": (0, 10**10), "vocab_size": (-1, 1.5, "x", None, True, 10**12), "text_dim": (5, -5, "x"),
                         "mlp_ratio": (0, -1, NAN, INF, "4", None, 1e9), "expand": (0, -1, NAN, INF, "1", 0.3, 1e9), "patch": (4, (4, 4), (0, 4, 4), (4, 4, 4.0), "444", None, (10**7, 1, 1)),
                         "grid": ((-1, 0, 0), 3, (10**9, 0, 0)), "pool": ((0, 1, 1), (1,)), "window": ((0, 1, 1), None), "mixer": ("blender", None, []), "scan": ("spiral", 3, {}), "backend": ("jax", 1),
                         "predicts": ("noise", None), "ma": ("no", 1, None), "tesa": ("no", 0.5), "review": ("no", []), "torus": (1, None), "travel": (0, None)}.items():
        for value in values:
            yield f"LinGenConfig {name}={value!r}", lambda name=name, value=value: lingen.preset("tiny", **{"vocab_size": 9, name: value})
    yield "no branch", lambda: lingen.preset("tiny", vocab_size=9, ma=False, tesa=False)
    yield "unknown field", lambda: lingen.preset("tiny", vocab_size=9, colour="red")
    yield "preset", lambda: lingen.preset("enormous")
    yield "LinGen of a dict", lambda: lingen.LinGen({})
    for what, args in {"clip a list": ([1], TIME, TEXT), "clip of ints": (CLIP.long(), TIME, TEXT), "clip of doubles": (CLIP.double(), TIME, TEXT), "clip channels": (CLIP[:, :2], TIME, TEXT), "clip axes": (CLIP[0], TIME, TEXT),
                       "frames": (CLIP[:, :, :3], TIME, TEXT), "height": (CLIP[:, :, :, :30], TIME, TEXT), "clip empty": (CLIP[:0], TIME[:0], TEXT[:0]), "clip device": (CLIP.to("meta"), TIME, TEXT),
                       "t a number": (CLIP, 0.5, TEXT), "t count": (CLIP, zeros(3), TEXT), "t of ints": (CLIP, TIME.long(), TEXT), "t device": (CLIP, TIME.to("meta"), TEXT), "text a string": (CLIP, TIME, "a red circle"),
                       "text of floats": (CLIP, TIME, TEXT.float()), "text of bytes": (CLIP, TIME, TEXT.to(torch.uint8)), "text of bools": (CLIP, TIME, TEXT.bool()), "text count": (CLIP, TIME, TEXT[:1]), "unknown word": (CLIP, TIME, TEXT * 4),
                       "negative word": (CLIP, TIME, -TEXT), "text too long": (CLIP, TIME, TEXT.repeat(1, 30)), "text device": (CLIP, TIME, TEXT.to("meta"))}.items():
        yield f"LinGen.forward: {what}", lambda args=args: MODEL(*args)
    for args in ((0, 1), (8, 0), (8, 3), (8, -2), ("8", 2), (8, None), (8.5, 2), (8, 2, (0, 1, 1)), (8, 2, (4, 4)), (8, 2, (4, 4, 4), (4, 0, 0)), (8, 2, (4, 4, 4), (-1, 0, 0)), (8, 2, 4), (8, 2, (2.0, 2, 2)), (8, 2, "444")):
        yield f"TESA{args!r}", lambda args=args: tesa.TemporalSwinAttention(*args)
    yield "TESA width", lambda: tesa.TemporalSwinAttention(8, 2)(GRID[..., :7])
    for shape in ((2,), (2, 2, 3), (1, 2, 2), (2, 1, 2), (2, 2)):
        yield f"TESA drift {shape}", lambda shape=shape: tesa.TemporalSwinAttention(8, 2)(GRID, zeros(*shape))
    yield "TESA drift, a list", lambda: tesa.TemporalSwinAttention(8, 2)(GRID, [0, 0])
    yield "TESA drift, device", lambda: tesa.TemporalSwinAttention(8, 2)(GRID, zeros(2, 2, 2).to("meta"))
    yield "TESA dtype", lambda: tesa.TemporalSwinAttention(8, 2)(GRID.double())
    yield "TESA device", lambda: tesa.TemporalSwinAttention(8, 2)(GRID.to("meta"))

    for caption in ("", "...", None, 3, b"red", ["red"], "a\x07", "\u202e", "red_circle", "\ud800"):
        yield f"words {caption!r}", lambda caption=caption: S.words(caption)
        yield f"encode {caption!r}", lambda caption=caption: S.encode([caption], ["red", "a"])
        yield f"parse {caption!r}", lambda caption=caption: ruler.parse(caption)
    for args in (("a red", ["a", "red"]), ([], ["a"]), (["a"], "abc"), (["a"], [1, 2]), (None, ["a"]), (["a"], None), (["a"], []), (["b"], ["a"]), (["a a"], ["a"], 1), (["a"], ["a"], "x"), (3, ["a"])):
        yield f"encode{args!r}", lambda args=args: S.encode(*args)
    for args in ((0,), (-1,), (1001,), (2.5,), ("3",), (None,), (True,), (NAN,), (4, "cosine"), (4, None), (4, ["uniform"]), (4, "shifted", 0.5), (4, "shifted", NAN), (4, "shifted", INF), (4, "shifted", "x"), (10**12,)):
        yield f"times{args!r}", lambda args=args: S.times(*args)
    for change in (dict(text=TEXT.float()), dict(text=TEXT[0]), dict(text="a"), dict(text=TEXT * 4), dict(text=-TEXT), dict(shape=(4, 32)), dict(shape=None), dict(shape=(4, 32, "x")), dict(shape=(10**9, 32, 32)), dict(shape=(4, 32, -4)),
                   dict(steps=0), dict(guidance=NAN), dict(guidance=None), dict(seed=-1), dict(seed=2**32), dict(seed=0.5), dict(schedule="x"), dict(shift=0), dict(model=None), dict(model="tiny.pt")):
        yield f"sample {list(change.items())[0][0]} {list(change.values())[0]!r:.30}", lambda change=change: S.sample(**{"model": MODEL, "text": TEXT, "shape": (4, 32, 32), "steps": 1, **change})
    for clip in (None, [1], np.zeros((3, 1, 2, 2)), CLIP, zeros(1, 2, 2, 2), zeros(3, 1, 2, 2, dtype=torch.complex64), zeros(3, 1, 2, 2, device="meta")):
        yield f"to_frames {type(clip).__name__} {getattr(clip, 'shape', '')}", lambda clip=clip: S.to_frames(clip)
    for change in (dict(frames=None), dict(frames=FRAMES.tolist()), dict(frames=FRAMES / 255), dict(frames=FRAMES[0]), dict(frames=FRAMES[:0]), dict(frames=torch.tensor(FRAMES)), dict(fps=0), dict(fps=NAN), dict(fps="16"), dict(scale=0),
                   dict(scale=1.5), dict(scale=65), dict(path="c.mp4"), dict(path="c"), dict(path=None), dict(path=3), dict(settings={"a": {1}}), dict(settings={(1, 2): 3}), dict(scale=64, frames=np.zeros((1, 999, 1, 3), np.uint8))):
        yield f"write_clip {list(change.items())[0][0]} {list(change.values())[0]!r:.30}", lambda change=change: S.write_clip(**{"path": "new.gif", "frames": FRAMES, **change})
    for value in (None, 3, b"\0"):
        yield f"read_settings {value!r}", lambda value=value: S.read_settings(value)
    for value in (None, 3, []):
        yield f"load_checkpoint {value!r}", lambda value=value: S.load_checkpoint(value)
    for value in ("toaster", "meta", "", 3.5, []):
        yield f"choose_device {value!r}", lambda value=value: S.choose_device(value)

    for args in ((SPECS[:, 0], STARTS, 4), (SPECS, STARTS[..., :1], 4), (SPECS, STARTS, 0), (SPECS, STARTS, -1), (SPECS, STARTS, 2.5), (SPECS, STARTS, 4, 16), (SPECS.float(), STARTS, 4), (SPECS + 9, STARTS, 4), (SPECS - 1, STARTS, 4), (None, STARTS, 4),
                 (SPECS, None, 4), (SPECS, STARTS * NAN, 4)):
        yield f"render {[getattr(a, 'shape', a) for a in args]}", lambda args=args: toy.render(*args)
    for args in ((0, 4), (-1, 4), (2.5, 4), ("2", 4), (2, 0), (2, -4), (2, 1.5), (2, None), (2, 4, 16), (2, 4, 32, 3), (2, 4, 32, 0)):
        yield f"make_batch{args!r}", lambda args=args: toy.make_batch(args[0], args[1], torch.Generator(), *args[2:])
    for specs in (None, SPECS, SPECS[0] + 9, SPECS[0].float(), SPECS[0][:, :4], [[0, 0, 0, 0, 0]]):
        yield f"caption {getattr(specs, 'shape', specs)}", lambda specs=specs: toy.caption(specs, plain=True)
    for args in ((2, 0), (2, -1), (2, "x"), (None, 16)):
        yield f"draw_times{args!r}", lambda args=args: toy.draw_times(*args, torch.Generator())
    for text in ("a circle", "a red thing", "red blue circle", "a red circle moving left right", "a small big red circle", "a red circle and a red square", "circle " * 5000):
        yield f"parse {text[:40]!r}", lambda text=text: ruler.parse(text)
    clips = zeros(2, 3, 4, 32, 32)
    for args in ((clips, ["a red circle"]), (clips, "a red circle"), (clips, [1, 2]), (clips, None), (clips[:, :2], ["a red circle"] * 2), (clips[..., :31], ["a red circle"] * 2), (clips[:, :, :0], ["a red circle"] * 2), (clips[..., :8, :8], ["a red circle"] * 2),
                 (None, ["a red circle"]), (clips.numpy(), ["a red circle"] * 2), (clips.to("meta"), ["a red circle"] * 2), (clips.to(torch.complex64), ["a red circle"] * 2), (clips[:0], [])):
        yield f"judge {getattr(args[0], 'shape', args[0])} {args[1]!r:.20}", lambda args=args: ruler.judge(*args)
    for records in ([], None, [1], [{}]):
        yield f"summary {records!r}", lambda records=records: ruler.summary(records)
    for args in ((1, 0), (2, 1), (-1, 3), ("1", 2), (1, None)):
        yield f"wilson{args!r}", lambda args=args: ruler.wilson(*args)


FUNCTIONS = list(functions())


@pytest.mark.parametrize("call", [call for _, call in FUNCTIONS], ids=[ascii(label)[1:61] for label, _ in FUNCTIONS])
def test_bad_calls_of_functions(call, place, monkeypatch):
    monkeypatch.chdir(place)
    before, began = listing(place), time.process_time()
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    message = str(caught.value)
    assert 5 < len(message) < 4000 and listing(place) == before and time.process_time() - began < 2
    place_ = caught.traceback[-1].path
    assert ROOT in Path(place_).parents or isinstance(caught.value, TypeError) or Path(place_).parent.name == "json", f"said by {place_}, not by us: {message}"


def test_the_tables_are_long_and_nothing_is_run_from_a_checkpoint(place):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = f"{len(LINES)} command lines, {len(FUNCTIONS)} calls of functions"
    assert said in readme or sys.platform != "linux" and len(LINES) > 300, said    # some stand for files that others lack
    assert not (place / "trap").exists()


def test_reading_and_writing_where_it_is_forbidden(tmp_path, capsys, monkeypatch):
    """As an ordinary user meets it; root may write anywhere, so the system's refusal is played."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.pt").write_bytes(b"x")

    def refuse(name, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(name))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", refuse)
        assert S.main(["a red circle"]) == 2 and toy.main(["--out", "run.pt"]) == 2
    monkeypatch.setattr(S, "open", refuse, raising=False)
    assert S.main(["a red circle", "--checkpoint", "secret.pt"]) == 2 and S.main(["--captions", "secret.pt"]) == 2
    said = capsys.readouterr().err
    assert said.count("Permission denied") == 4 == said.count("\n") and said.count("take a place that you may read and write") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["secret.pt"]


# ---- fuzzing ---------------------------------------------------------------------------------------------------

with contextlib.suppress(ImportError):
    import hypothesis
    from hypothesis import strategies as st


def fuzz(**arguments):
    """@fuzz(name=strategy, ...), or skipped where hypothesis is missing (tests/requirements-peers.txt)."""
    def wrap(test):
        if "hypothesis" not in sys.modules:
            return pytest.mark.skip(reason="hypothesis is not installed: tests/requirements-peers.txt says how")(lambda: None)
        settings = hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck))
        return settings(hypothesis.given(**{name: make() for name, make in arguments.items()})(test))
    return wrap


def anything():
    simple = st.none() | st.booleans() | st.integers(-5, 70) | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=9)
    return simple | st.lists(simple, max_size=4) | st.tuples(simple, simple, simple)


def sizes():
    return st.tuples(*[st.integers(0, 5) | st.sampled_from([-1, 1.0, None])] * 3) | anything()


def caption():
    return st.text(max_size=60) | st.lists(st.sampled_from([*toy.VOCABULARY, "and a", "up-left", "\u00e9", "RED", ",", "\t", "\u200f", "\x00"]), max_size=14).map(" ".join)


def fine(function, *args, **kwargs):
    """The result, or None for ValueError and TypeError; whatever else is raised fails the test."""
    try:
        return function(*args, **kwargs)
    except (ValueError, TypeError) as error:
        assert str(error)


@fuzz(text=lambda: caption() | anything())
def test_fuzz_words_and_parse(text):
    found = fine(S.words, text)
    if found is not None:
        assert found and all(word == word.lower() and word.isprintable() and " " not in word for word in found)
    things = fine(ruler.parse, text)
    if things is not None:
        assert 1 <= len(things) <= 2 and all(thing["colour"] in toy.COLOURS and thing["shape"] in toy.SHAPES for thing in things)


@fuzz(texts=lambda: st.lists(caption(), max_size=4) | anything(), vocabulary=lambda: st.just(list(toy.VOCABULARY)) | anything())
def test_fuzz_encode(texts, vocabulary):
    got = fine(S.encode, texts, vocabulary)
    if got is not None:
        assert got.dtype == torch.int64 and got.shape[0] == len(texts) and 0 <= got.min() <= got.max() <= len(vocabulary) and (got > 0).any(1).all()


@fuzz(text=lambda: caption() | anything(), seed=lambda: st.integers(0, 2**32 - 1))
def test_fuzz_complete(text, seed):
    choices = [["slowly", "slow"], ["quickly", "fast"]]
    told = fine(S.complete, text, choices, seed)
    if told is not None:
        assert S.complete(told, choices, seed + 1) == told and set(S.words(text)) <= set(S.words(told))
        assert told == text or len(S.words(told)) > len(S.words(text))


@fuzz(steps=lambda: st.integers(-2, 1002) | anything(), schedule=lambda: st.sampled_from(S.SCHEDULES) | anything(), shift=lambda: st.floats(0.5, 101) | anything())
def test_fuzz_times(steps, schedule, shift):
    ts = fine(S.times, steps, schedule, shift)
    if ts is not None:
        assert ts.shape == (steps + 1,) and ts[0] == 0 and ts[-1] == 1 and (ts.diff() > 0).all()


@fuzz(name=lambda: st.sampled_from(sorted(lingen.LinGenConfig.__dataclass_fields__)), value=lambda: anything(), other=lambda: st.sampled_from(["d_model", "nheads", "expand", "headdim"]), size=lambda: st.integers(-1, 70))
def test_fuzz_config(name, value, other, size):
    config = fine(lingen.preset, "tiny", **{"vocab_size": 3, other: size, name: value})
    if config is not None and max(config.d_model, config.depth, config.channels, config.d_state, config.text_length, config.vocab_size, *config.grid, *config.patch) < 100 and max(config.mlp_ratio, config.expand) < 9:
        with torch.device("meta"):
            model = lingen.LinGen(config)                           # whatever the config admits can be built, and runs
            text = TEXT.to("meta")[:1] if config.vocab_size else torch.empty(1, 3, config.text_dim)
            clip = torch.empty(1, config.channels, *(2 * p for p in config.patch))
            if config.text_length >= 3:
                assert model(clip, torch.empty(1), text).shape == clip.shape


@fuzz(shape=lambda: sizes(), order=lambda: st.sampled_from([*scan.SCANS, "zigzag", 0, 1, 2, 3, 6]) | anything(), pool=lambda: sizes())
def test_fuzz_grids(shape, order, pool):
    try:
        grid = torch.rand(1, *shape, 2)
        assert grid.dim() == 5
    except (TypeError, RuntimeError, AssertionError):
        grid = shape
    if (line := fine(scan.to_sequence, grid, order)) is not None:
        assert line.shape == (1, math.prod(shape), 2) and torch.equal(fine(scan.to_grid, line, order, shape), grid)
    if torch.is_tensor(grid):
        fine(scan.to_grid, grid.flatten(1, 3), order, pool)
    fine(scan.places, order, shape) if grid is not shape else None
    if (pooled := fine(lingen.review_tokens, grid, pool)) is not None:
        assert pooled.shape[1:4] == tuple(-(-s // min(s, p)) for s, p in zip(grid.shape[1:4], (pool,) * 3 if isinstance(pool, int) else pool))
        assert grid.min() <= pooled.min() + 1e-6 and pooled.max() <= grid.max() + 1e-6


@fuzz(data=lambda: st.binary(max_size=300) | st.tuples(st.sampled_from([b"PK\3\4", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"RIFF", b"\x80\x02}q"]), st.binary(max_size=200)).map(b"".join))
def test_fuzz_files(data):
    path = Path(os.environ.get("TMPDIR", "/tmp" if UNIX else ".")) / f"fuzz-{os.getpid()}.gif"
    path.write_bytes(data)
    try:
        assert fine(S.load_checkpoint, path) is None and fine(S.read_settings, path) is None
    finally:
        path.unlink()


# ---- platforms -------------------------------------------------------------------------------------------------

def test_every_file_is_python_3_10():
    files = [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/*.py")]
    assert len(files) >= 12
    for path in files:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))


def bare(*args, cwd=ROOT, **env):
    """A process with almost no environment: no HOME, no UTF-8, no colour, no terminal."""
    keep = {key: os.environ[key] for key in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH") if key in os.environ}
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=120,
                          env={**keep, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1", **env})


@pytest.mark.parametrize("program", ["sample.py", "train_tiny.py", "scan.py", "tesa.py", "mamba2_ref.py", "lingen.py"])
def test_help_in_a_bare_environment(program, tmp_path):
    done = bare(ROOT / program, "--help", cwd=tmp_path)
    assert done.returncode == 0 and "usage:" in done.stdout and done.stdout.isascii() and done.stderr == "" and not list(tmp_path.iterdir())


def test_wrong_calls_in_a_bare_environment_are_quick(tmp_path):
    (tmp_path / "captions.txt").write_bytes("a r\u00f6d circle".encode())
    for args, says in ((["a red circle", "--frames", "x"], "invalid int"), (["--captions", "none"], "cannot read"), (["\x1b"], r"\x1b"), (["a", "--out", "x.mp4"], "choose one of")):
        began = time.monotonic()
        done = bare(ROOT / "sample.py", *args, cwd=tmp_path)
        took = time.monotonic() - began
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1 and done.stdout == "" and took < 10      # not 2: this machine may be busy
    used = bare("-c", "import resource, subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], stderr=subprocess.DEVNULL);"
                "use = resource.getrusage(resource.RUSAGE_CHILDREN); print(use.ru_utime + use.ru_stime)", ROOT / "sample.py", "a", "--frames", "x")
    if used.returncode == 0:                                        # Windows has no resource
        assert float(used.stdout) < 2                               # seconds of the processor
    done = bare(ROOT / "sample.py", "--captions", "captions.txt", cwd=tmp_path)
    assert done.returncode == 2 and r"'r\xf6d'" in done.stderr      # read as UTF-8, said in ASCII


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody may write into")
def test_a_read_only_folder_is_no_trouble(tmp_path):
    done = bare(ROOT / "sample.py", "a red circle moving right", cwd="/proc")
    assert done.returncode == 2 and "nothing can be written" in done.stderr and done.stderr.count("\n") == 1
    done = bare(ROOT / "sample.py", "a red circle", "--frames", "4", "--steps", "1", "--device", "cpu", "--out", tmp_path / "\u00e9 clip.gif".encode().decode(), cwd="/proc")
    assert done.returncode == 0 and "wrote" in done.stdout and done.stdout.isascii(), done.stderr
