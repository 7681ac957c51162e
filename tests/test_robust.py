"""Kills, full disks, damaged files and wrong calls: nothing is lost, and no traceback is shown."""

import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import test_sample
import test_train_tiny
import torch
from test_sample import ROOT, assert_one_line, make_checkpoint, random_frames
from test_train_tiny import SMALL, load, same

import sample as sampler

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("PYTHONUNBUFFERED", None)
call, command = test_sample.call, test_train_tiny.command

# One process imports torch, and each attempt at the training is a fork of it. Half of the kills
# come from outside, at any moment. The others come from inside, at the worst moments of saving:
# with a part of the file written, before it takes its place, and right after that.
KILLER = """
import os, random, signal, time
from pathlib import Path

out, kills, steps, seed = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
chance, fsync, replace = random.Random(seed), os.fsync, os.replace
train_tiny.sample_captions = lambda *args: torch.zeros(8, 3, 1, 24, 24)
train_tiny.Run(lingen.preset("tiny"), {"seed": 0, "rate": 0.1}, torch.device("cpu"))  # imports

def die_at(countdown):
    def reached(file=None):
        nonlocal countdown
        countdown -= 1
        if countdown < 0:
            if file is not None:
                os.ftruncate(file, chance.randrange(os.fstat(file).st_size))
            os.kill(os.getpid(), signal.SIGKILL)
    def fsync_or_die(file):
        reached(file)
        fsync(file)
    def replace_or_die(part, path):
        reached()
        replace(part, path)
        reached()
    os.fsync, os.replace = fsync_or_die, replace_or_die

def train(path, *trap):
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = 1
    try:
        if trap:
            die_at(*trap)
        sys.argv = ["train_tiny.py", "--steps", steps, "--save-every", "0", "--device", "cpu"]
        sys.argv += ["--out", str(path), *(["--resume"] if path.exists() else [])]
        code = train_tiny.main()
    finally:
        os._exit(code)

begun = time.monotonic()
assert os.waitpid(train(out.with_name("whole.pt")), 0)[1] == 0
took = time.monotonic() - begun
done = 0
while done < kills:
    if done % 2:
        child = train(out, chance.randrange(30))
    else:
        child = train(out)
        time.sleep(took * chance.random())
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    done += status != 0
    if status == 0:  # it had ended before the kill came
        out.unlink()
    elif out.exists():
        sample.load_checkpoint(out)  # raises where it is not whole
assert os.waitpid(train(out), 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("kills, steps", [(6, 6), pytest.param(60, 60, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(tmp_path, kills, steps):
    argv = [sys.executable, "-c", SMALL + KILLER, tmp_path / "run.pt", str(kills), str(steps), "0"]
    done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert same(load(tmp_path / "whole.pt"), load(tmp_path / "run.pt"))


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_leaves_the_checkpoint_before_and_no_part(command, monkeypatch, fails):
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    assert command("--steps", 1, "--out", "run.pt")[0] == 0
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    monkeypatch.setattr(os, fails, full)
    code, _, said = command("--steps", 2, "--out", "run.pt", "--resume")
    assert (code, said) == (1, "train_tiny.py: error: [Errno 28] No space left on device\n")
    assert before == {path.name: path.read_bytes() for path in Path().iterdir()}


@pytest.mark.parametrize("option", ["--help", "--read=clip.png"])
def test_a_reader_that_goes_away_is_no_error(tmp_path, option):
    sampler.write_clip(tmp_path / "clip.png", random_frames(2), settings={"a": 1})
    read, write = os.pipe()
    os.close(read)  # `| head` that has ended already
    options = dict(cwd=tmp_path, env=ENVIRONMENT, stdout=write, stderr=subprocess.PIPE)
    done = subprocess.run([sys.executable, ROOT / "sample.py", option], **options)
    os.close(write)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what is damaged
@pytest.mark.parametrize("ending", [".pt", ".gif", ".webp", ".png"])
def test_a_damaged_file_is_refused_in_one_line_or_read_without_harm(tmp_path, ending):
    """torch.load looks at no checksums, so a flipped bit in a weight alone may go unnoticed."""
    path, chance, read = tmp_path / f"damaged{ending}", random.Random(0), sampler.read_settings
    if ending == ".pt":
        torch.save(make_checkpoint(), path)
        read = sampler.load_model
    else:
        sampler.write_clip(path, random_frames(2, 2), settings={"caption": "a"})
    whole = path.read_bytes()
    for place in [*range(0, 400, 5), *(chance.randrange(len(whole)) for _ in range(120))]:
        place = -place % len(whole)  # from the end: the table of contents of a .pt
        flipped = bytes([whole[place] ^ 1 << chance.randrange(8)])
        for data in (whole[:place], whole[:place] + flipped + whole[place + 1 :]):
            path.write_bytes(data)
            try:
                read(path)
                assert ending != ".pt" or len(data) == len(whole)
            except (ValueError, OSError):
                pass


# What random calls are made of.
ODD = ["", " ", "-1", "1e9", "nan", "a red circle", "\u00e9\u2603", "--", "none"]
PATHS = ["new.gif", "folder", "folder/new.webp", "text.txt", "tiny.pt", "clip.gif", "clip.mp4"]
NUMBERS = ["0", "1", "4", "8", "7", "-4", "1.5", "10000"]
CHANGES = ["tesa=False", "ma=False", "scan=zigzag", "scan=", "=", "depth=2", "depth=0", "pool=(1,)"]
CHANGES += ["window=(4,3,3)", "d_model='wide'", "tesa=__import__('os')", "backend=torch"]
CAPTIONS = ["a red circle", "A BLUE square!", "red blue", "purple", "", "a\0b", "\u5186 circle"]
COMMON = {"--out": PATHS, "--device": ["cpu", "cuda:9", "tpu"], "--nonsense": PATHS}
SAMPLE = {**COMMON, "--checkpoint": PATHS, "--read": PATHS, "--backend": ["torch", "auto", "jax"]}
SAMPLE |= {f"--{name}": NUMBERS for name in vars(sampler.Settings())}
TRAIN = {**COMMON, "--publish": PATHS, "--evaluate": PATHS, "--init": PATHS, "--set": CHANGES}
TRAIN |= {f"--{name}": NUMBERS for name in ("seed", "rate", "save-every", "frames")}


def random_options(chance, options):
    for option in chance.sample(list(options), chance.choice([0, 1, 1, 2, 3])):
        yield option
        if chance.random() < 0.95:
            yield chance.choice(options[option] if chance.random() < 0.8 else ODD)


def test_random_calls_end_well_or_in_one_line_and_leave_no_half_a_file(command, call):
    Path("folder").mkdir()
    Path("text.txt").write_text("a red circle")
    torch.save(make_checkpoint(), "tiny.pt")
    sampler.write_clip("clip.gif", random_frames(2), settings={"a": 1})
    chance, fixed = random.Random(0), ["--checkpoint", "tiny.pt", "--steps", "1"]
    for i in range(100):
        if i % 3:
            captions = chance.choices(CAPTIONS, [5, 5] + 5 * [1], k=chance.choice([0, 1, 1, 2]))
            name, argv = "sample.py", [*captions, *fixed, *random_options(chance, SAMPLE)]
            code, _, said = call(sampler, *argv)
        else:
            name, argv = "train_tiny.py", ["--captions", "1", "--steps", "1", "--out", f"{i}.pt"]
            argv += [*random_options(chance, TRAIN), *chance.choice([[], [], ["--resume"]])]
            code, _, said = command(*argv)
        assert code in (0, 1, 2), (argv, said)
        if code:
            assert_one_line(said, name, "")
        assert not list(Path().rglob(".*.part")), argv
