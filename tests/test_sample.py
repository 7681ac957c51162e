"""The sampler against closed forms, its files, and the command as a user calls it."""

import dataclasses
import functools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import nn

import lingen
import sample as sampler

ROOT = Path(__file__).resolve().parent.parent
WORDS = {"colour": ["red", "blue"], "shape": ["circle", "square"]}
WORDS |= {"direction": ["right", "up-left"], "other": ["a", "moving"]}
TINY = dict(d_model=32, depth=1, nheads=2, headdim=16, d_state=8, backend="torch")
SETTINGS = dict(frames=4, height=8, width=8, fps=8.0, steps=3, guidance=2.0, shift=3.0)
SHAPE = (2, 4, 4)
TEXT = torch.tensor([[1, 3], [2, 0]])
SCHEDULES = ("uniform", "linear-quadratic", "shifted")


def make_model(**config):
    """A small model whose output depends on the caption."""
    torch.manual_seed(0)
    model = lingen.LinGen(lingen.LinGenConfig(**TINY, **config))
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    return model


def make_checkpoint(**changes):
    model, sizes = make_model(vocab_size=8), {"frames": [4], "height": [8], "width": [8]}
    weights = {name: value.half() for name, value in model.state_dict().items()}
    sampling = dataclasses.asdict(sampler.Settings(**SETTINGS))
    parts = dict(format=sampler.FORMAT, config=dataclasses.asdict(model.config), weights=weights)
    return {**parts, "vocabulary": WORDS, "sampling": sampling, "trained": sizes, **changes}


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(module, *argv) runs its command in an empty folder -> (exit code, stdout, stderr)."""

    def run(module, *argv):
        name = f"{module.__name__}.py"
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            sampler.run_command(name, module.main)
        return stop.value.code or 0, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    numbers = signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGPIPE", signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def command(call):
    """Run sample.py on tiny.pt, the only file in the folder."""
    torch.save(make_checkpoint(), "tiny.pt")
    return functools.partial(call, sampler, "--device", "cpu", "--checkpoint", "tiny.pt")


class Stub(nn.Module):
    """A model given by a formula of x, t (b, 1, 1, 1, 1) and mask."""

    def __init__(self, formula, predicts="clean", channels=3):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(predicts=predicts, channels=channels)
        self.formula, self.masks, self.offsets = formula, [], []

    def forward(self, x, t, text, mask=None, offset=0):
        self.given, self.offsets = (x, t, text), [*self.offsets, offset]
        self.masks.append(mask)
        return self.formula(x, t.view(-1, 1, 1, 1, 1), mask)


def knows(value, **options):
    """A model that knows the clip, whatever the caption."""
    return Stub(lambda x, t, mask: torch.as_tensor(value).expand_as(x), **options)


def test_words_are_numbered_by_their_place_whatever_their_case_and_padded_with_0():
    text = sampler.encode(["a red circle", '"Blue  SQUARE,\tmoving up-left!"\n'], WORDS)
    assert text.tolist() == [[7, 1, 3, 0], [2, 4, 8, 6]] and text.dtype == torch.int64
    drawn = {tuple(sampler.encode(["a blue"], WORDS, seed)[0].tolist()) for seed in range(40)}
    assert drawn == {(7, 2, shape, direction, 8) for shape in (3, 4) for direction in (5, 6)}


@pytest.mark.parametrize("caption, says", [
    ("a red cirlce", "'cirlce'; did you mean 'circle'?"),
    ("a red circle moving up-lft", "did you mean 'up-left'?"),
    ("a purple circle", "'purple'; it knows colour: red, blue; shape: circle, square;"),
    ("two circle", "'two'; it knows colour: red"),
    ("a red blue circle", "one object, but ['red', 'blue'] each name a colour"),
    (" ., ", "the caption is empty"),
])  # fmt: skip
def test_a_caption_that_the_model_does_not_know_is_refused(caption, says):
    with pytest.raises(ValueError) as error:
        sampler.encode(["a red circle", caption], WORDS)
    assert says in str(error.value)


def test_times_by_hand():
    assert sampler.times(4).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert sampler.times(2, "shifted", 3.0).tolist() == [0, 0.25, 1]  # 0.5 / (0.5 + 3 * 0.5)
    # 0, 1 and 2 thousandths; then i / 1000 + (1 - 4 / 1000) ((i - 2) / 2)^2.
    by_hand = torch.tensor([0, 0.001, 0.002, 0.252, 1])
    torch.testing.assert_close(sampler.times(4, "linear-quadratic"), by_hand)
    with pytest.raises(ValueError, match="'cosine'; expected uniform, linear-quadratic, shifted"):
        sampler.times(4, "cosine")
    for schedule in SCHEDULES:
        ts = sampler.times(51, schedule, 4.0)
        assert (ts[0], ts[-1], len(ts)) == (0, 1, 52) and (ts.diff() > 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("renoise", [0.0, 1.0])
def test_a_model_that_knows_the_clip_gives_the_clip(schedule, renoise):
    seen, model = [], knows(clip := 2 * torch.rand(3, *SHAPE) - 1)
    options = dict(steps=7, schedule=schedule, shift=3.0, renoise=renoise, slide=2)
    out = sampler.sample(model, TEXT, SHAPE, callback=lambda *x: seen.append(x), **options)
    torch.testing.assert_close(out, clip.expand(2, 3, *SHAPE), atol=1e-5, rtol=0)
    assert [x1[0].equal(clip) for t, x1 in seen] == 7 * [True]
    assert model.offsets == [-12, -10, -8, -6, -4, -2, 0]  # last, as in training


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("predicts", ["clean", "velocity"])
def test_without_renoise_the_sampler_is_eulers_method_on_the_velocity(schedule, predicts):
    def formula(x, t, mask):
        velocity = 0.1 * t - 2 * x
        return x + (1 - t) * velocity if predicts == "clean" else velocity

    model = Stub(formula, predicts, channels=4)
    out = sampler.sample(model, TEXT, SHAPE, steps=7, schedule=schedule, shift=2.0, seed=5)
    ts = sampler.times(7, schedule, 2.0).tolist()
    for i in range(2):
        x = torch.randn(4, *SHAPE, generator=torch.Generator("cpu").manual_seed(5 + i))
        for t, t_next in zip(ts[:-1], ts[1:], strict=True):
            x = x + (t_next - t) * (0.1 * t - 2 * x)
        torch.testing.assert_close(out[i], x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("renoise", [0.0, 0.6, 1.0])
def test_renoise_says_how_much_of_the_noise_is_fresh(renoise):
    clip, noises = torch.full((3, 4, 32, 32), 0.5), []

    def keeps_noise(x, t, mask):
        noises.append(((x - t * clip) / (1 - t)).flatten())
        return clip.expand_as(x)

    sampler.sample(Stub(keeps_noise), TEXT[:1], (4, 32, 32), steps=5, renoise=renoise)
    for before, after in zip(noises[:-1], noises[1:], strict=True):
        alike = torch.corrcoef(torch.stack([before, after]))[0, 1].item()
        assert alike == pytest.approx(math.sqrt(1 - renoise**2), abs=0.03)
        assert after.std().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 3.0])
def test_guidance_counts_what_the_caption_adds(guidance):
    def by_caption(x, t, mask):
        return torch.zeros_like(x) + 0.02 + 0.1 * mask.sum(1).view(-1, 1, 1, 1, 1)

    model = Stub(by_caption)
    out = sampler.sample(model, TEXT, SHAPE, text_mask=TEXT > 0, steps=2, guidance=guidance)
    for i, words in enumerate((2, 1)):
        torch.testing.assert_close(out[i], torch.full((3, *SHAPE), 0.02 + guidance * 0.1 * words))
    with_caption = [bool(mask.any()) for mask in model.masks]
    assert with_caption == ([True] * 2 if guidance == 1 else [True, False] * 2)


def test_a_clip_depends_on_its_seed_and_caption_but_not_on_its_batch():
    model = make_model(vocab_size=8)
    text = sampler.encode(["a red circle", "blue square", "a circle moving right"], WORDS)
    options = dict(shape=(4, 8, 8), steps=3, guidance=2.0, renoise=0.7)
    batch = sampler.sample(model, text, seed=7, **options)
    for i in range(3):
        torch.manual_seed(i)
        alone = sampler.sample(model, text[i : i + 1], seed=7 + i, **options)
        torch.testing.assert_close(alone[0], batch[i], atol=1e-4, rtol=0)
    assert sampler.sample(model, text, **{**options, "shape": (1, 8, 8)}).shape[2] == 1  # a picture
    for other, seed in ((text[1:2], 7), (text[:1], 8)):
        assert (sampler.sample(model, other, seed=seed, **options)[0] - batch[0]).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_gives_nearly_the_same_clip(dtype):
    model = make_model(vocab_size=8)
    clip = sampler.sample(model, TEXT, (4, 8, 8), steps=3)
    half = sampler.sample(model.to(dtype), TEXT, (4, 8, 8), steps=3)
    assert half.dtype == torch.float32 and half.shape == (2, 3, 4, 8, 8)
    assert (half - clip).square().mean().sqrt() < 0.05


def test_the_caption_may_be_embeddings_whose_masked_words_do_not_count():
    model, options = make_model(text_dim=5), dict(shape=(4, 8, 8), steps=2, guidance=2.0)
    text, mask = torch.randn(1, 3, 5), torch.tensor([[1, 1, 0]])
    clip = sampler.sample(model, text, text_mask=mask, **options)
    torch.testing.assert_close(clip, sampler.sample(model, text[:, :2], **options))
    assert (clip - sampler.sample(model, text, **options)).abs().max() > 1e-3


@pytest.mark.parametrize("renoise", [0.0, 1.0])
def test_the_given_part_is_noised_at_every_step_and_exact_at_the_end(renoise):
    """With the noise of the place: without `renoise` always the same."""
    known, mask, noises = torch.rand(1, 3, *SHAPE), torch.rand(1, *SHAPE) < 0.5, []

    def look(x, t, words):
        noises.append(((x - t * known) / (1 - t))[mask[:, None].expand_as(x)])
        return 0 * x + 0.25

    options = dict(known=known, mask=mask, steps=6, renoise=renoise)
    out = sampler.sample(Stub(look), TEXT[:1], SHAPE, **options)
    assert torch.equal(out, known.where(mask[:, None], torch.tensor(0.25))) and len(noises) == 6
    alike = [torch.corrcoef(torch.stack([noises[0], noise]))[0, 1] for noise in noises[1:]]
    assert min(alike) > 0.999 if not renoise else max(alike) < 0.5
    with pytest.raises(ValueError, match=r"known is \(1, 3, 2, 4, 4\); expected"):
        sampler.sample(Stub(look), TEXT[:1], (4, 4, 4), **options)
    with pytest.raises(ValueError, match="known if below 1 or masked"):
        sampler.sample(Stub(look), TEXT[:1], SHAPE, mask=mask)


def test_the_made_part_is_corrected_by_the_gradient_of_the_error_in_the_given_part():
    known, mask, seen = torch.rand(1, 3, *SHAPE), torch.rand(1, *SHAPE) < 0.5, []
    model = Stub(lambda x, t, words: seen.append(x.detach()) or x.flip(2))
    options = dict(known=known, mask=mask, steps=1, callback=lambda t, x1: seen.append(x1))
    sampler.sample(model, TEXT[:1], SHAPE, **options)
    x1 = seen[0].flip(2)
    gradient = (2 * (x1 - known) * mask[:, None]).flip(2)
    torch.testing.assert_close(seen[1], known.where(mask[:, None], x1 - gradient))


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.8])
def test_an_edit_begins_at_time_1_minus_strength(strength):
    known, seen = torch.rand(1, 3, 4, 32, 32), []
    model = Stub(lambda x, t, words: seen.append((t.item(), x - t * known)) or known)
    out = sampler.sample(model, TEXT[:1], (4, 32, 32), known=known, strength=strength, steps=9)
    torch.testing.assert_close(out, known, atol=1e-5, rtol=0)
    times = [1 - strength, *(t for t in sampler.times(9).tolist() if t > 1 - strength)]
    assert [t for t, noise in seen] == pytest.approx(times[:-1])
    assert not seen or seen[0][1].std().item() == pytest.approx(strength, rel=0.05)


def test_clips_are_clamped_latents_are_not_and_nan_is_an_error():
    assert sampler.sample(knows(3.0), TEXT, SHAPE, steps=2).unique().tolist() == [1]
    out = sampler.sample(knows(3.0, channels=16), TEXT, SHAPE, steps=2)
    torch.testing.assert_close(out, torch.full((2, 16, *SHAPE), 3.0))
    with pytest.raises(FloatingPointError, match="not finite"):
        sampler.sample(knows(math.nan), TEXT, SHAPE)


def test_a_checkpoint_in_float16_gives_back_its_model_in_float32(tmp_path):
    saved = make_checkpoint()
    assert saved["sampling"].pop("slide") == 1  # an older file lacks it
    torch.save(saved, tmp_path / "tiny.pt")
    model, got = sampler.load_model(tmp_path / "tiny.pt")
    assert not model.training and dataclasses.asdict(model.config) == saved["config"]
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32 and value.equal(saved["weights"][name].float())
    assert (got["vocabulary"], got["sampling"]["slide"], len(got["sha256"])) == (WORDS, 1, 64)


@dataclasses.dataclass
class Code:
    """Pickled, it makes a folder when it is read."""

    path: Path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_other_files_are_refused_and_code_in_them_never_runs(tmp_path):
    path, trap = tmp_path / "file.pt", tmp_path / "trap"
    files = [b"", b"a red circle", pickle.dumps(Code(trap), protocol=2)]
    for content in ([1], make_checkpoint(format="old"), make_checkpoint(trained=Code(trap))):
        torch.save(content, path)
        files.append(path.read_bytes())
    for data in files:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="file.pt is damaged or not a checkpoint"):
            sampler.load_model(path)
    assert not trap.exists()


@pytest.mark.parametrize("part, name, value", [
    ("config", "d_model", 2**20),  # would have 13 trillion parameters
    ("config", "unknown", 1), ("config", "grid", (4, 6, 6)), ("sampling", "unknown", 3),
    ("weights", "patch_in.bias", torch.zeros(3)), ("weights", "one_more", torch.zeros(1)),
])  # fmt: skip
def test_a_checkpoint_that_does_not_fit_its_config_is_refused(tmp_path, part, name, value):
    checkpoint = make_checkpoint()
    checkpoint[part][name] = value
    torch.save(checkpoint, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="cannot build the model of .*odd.pt"):
        sampler.load_model(tmp_path / "odd.pt")


def random_frames(n, colours=256):
    return np.random.default_rng(0).integers(0, colours, (n, 6, 9, 3)).astype(np.uint8)


def test_npy_webp_and_png_keep_every_value(tmp_path):
    frames = random_frames(11)
    clip = torch.from_numpy(frames).permute(3, 0, 1, 2) / 127.5 - 1
    assert np.array_equal(sampler.to_frames(clip), frames)
    sampler.write_clip(tmp_path / "clip.npy", frames)
    assert np.array_equal(np.load(tmp_path / "clip.npy"), frames)
    for ending in ("webp", "PNG"):
        sampler.write_clip(tmp_path / f"clip.{ending}", frames)
        pictures = ImageSequence.Iterator(Image.open(tmp_path / f"clip.{ending}"))
        read = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
        assert np.array_equal(read, frames.repeat(28, 1).repeat(28, 2))  # 252 pixels wide


@pytest.mark.parametrize("ending, tick", [(".gif", 10), (".webp", 1), (".png", 1)])
@pytest.mark.parametrize("fps", [1, 12, 16, 30, 60, 100])
def test_the_durations_of_the_frames_add_up(tmp_path, ending, tick, fps):
    path = tmp_path / f"clip{ending}"
    sampler.write_clip(path, random_frames(31, colours=2), fps=fps)
    pictures = ImageSequence.Iterator(Image.open(path))
    durations = [picture.convert("RGB").info["duration"] for picture in pictures]
    assert len(durations) == 31 and max(durations) - min(durations) <= tick
    assert sum(durations) == pytest.approx(31 * 1000 / fps, abs=tick / 2)


@pytest.mark.parametrize("ending", sampler.ENDINGS)
def test_one_caption_makes_one_file_with_its_settings_inside(command, ending):
    out = Path("new/folder") / f"clip{ending}"
    code, said, warned = command("a red circle", "--out", out, "--seed", 5)
    assert (code, warned, os.listdir("new/folder")) == (0, "", [out.name])
    assert said.startswith(f"wrote {out}: 'a red circle', seed 5\n")
    code, said, warned = command("--read", out)
    if ending == ".npy":
        assert (code, said) == (2, "") and "holds no settings" in warned
    else:
        expected = {**SETTINGS, "caption": "a red circle", "seed": 5}
        assert (code, warned) == (0, "") and json.loads(said).items() >= expected.items()


def test_options_override_the_checkpoint_and_a_clip_is_made_again_from_its_settings(command):
    command("a red circle", "--seed", 5, "--steps", 2, "--schedule", "uniform", "--out", "1.gif")
    found = sampler.read_settings("1.gif")
    assert (found["steps"], found["schedule"], found["guidance"]) == (2, "uniform", 2.0)
    options = [f"--{name}={found[name]}" for name in dataclasses.asdict(sampler.Settings())]
    assert command(found["caption"], *options, "--out", "2.gif")[0] == 0
    assert Path("1.gif").read_bytes() == Path("2.gif").read_bytes()


@pytest.mark.parametrize("out, ending", [("clips", ".gif"), (".", ".gif"), ("new/x.png", ".png")])
def test_several_captions_make_a_folder_of_the_same_clips_as_one_by_one(command, out, ending):
    assert command("a red circle", "blue square!", "--seed", 5, "--out", out)[0] == 0
    folder = Path(out.removesuffix(ending))
    names = [f"000-a-red-circle{ending}", f"001-blue-square-{ending}"]
    assert sorted(path.name for path in folder.iterdir() if path.name != "tiny.pt") == names
    command("blue square!", "--seed", 6, "--out", f"alone{ending}")
    assert Path(f"alone{ending}").read_bytes() == (folder / names[1]).read_bytes()


@pytest.mark.parametrize("argv, given", [
    ("--image clip.npy", np.s_[:1]), ("--extend clip.npy", np.s_[:4]),
    ("--extend clip.npy --before", np.s_[4:]), ("--extend clip.npy --loop", np.s_[:4]),
    ("--inpaint clip.npy --box 2,3,8,8", np.s_[:, :3]),
    ("--inpaint clip.npy --mask mask.png", np.s_[:, :, :5]),
    ("--edit clip.npy --strength 0", np.s_[:]),
])  # fmt: skip
def test_what_a_command_is_given_stays_to_the_bit(command, argv, given):
    clip = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    np.save("clip.npy", clip)
    Image.fromarray(np.uint8([[0] * 5 + [255] * 3] * 8)).save("mask.png")
    frames = 4 if "--inpaint" in argv or "--edit" in argv else 8
    assert command("red", "--frames", frames, "--out", "out.npy", *argv.split())[0] == 0
    out, clip = np.load("out.npy"), np.concatenate([clip] * (frames // 4))
    assert out.shape == (frames, 8, 8, 3) and (out[given] == clip[given]).all()
    out[given] = clip[given] = 0
    assert "--edit" in argv or (out != clip).mean() > 0.2
    for argv, says in (("--inpaint clip.npy", "not all of it"), ("--extend clip.npy", "be more")):
        code, _, warned = command("red", "--frames", 4, "--out", "none.npy", *argv.split())
        assert code == 2 and says in warned and not Path("none.npy").exists()


@pytest.mark.parametrize("option, value", [("frames", 8), ("height", 12), ("width", 16)])
def test_one_line_warns_of_a_size_the_model_was_not_trained_for(command, option, value):
    code, _, warned = command("a red circle", f"--{option}", value)
    assert (code, warned) == (0, f"warning: {option} is {value}; trained on [{SETTINGS[option]}]\n")


def assert_one_line(said, name, says):
    """stderr is one error line, after lines of argparse's usage or warnings."""
    *others, line = said.splitlines()
    assert line.startswith(f"{name}: error: ") and says in line
    assert all(other.startswith(("usage:", "warning:", " ")) for other in others)


@pytest.mark.parametrize("argv, code, says", [
    ("", 2, "in quotes"), ("a circle", 2, "in quotes"), ("red --image no.png", 1, "no.png"),
    ("circle --out new/clip.mp4", 2, "--out new/clip.mp4: expected a folder, or an ending of"),
    ("circle --frames 7", 2, "expected multiples of the patch"),
    ("circle --guidance nan", 2, "guidance is nan"), ("circle --loop", 2, "goes with --extend"),
    ("circle --device tpu", 2, "the device 'tpu' is not available here"),
    ("circle --checkpoint missing.pt", 1, "missing.pt"), ("--read missing.gif", 1, "missing.gif"),
    ("circle --backend mamba_ssm", 2, "mamba_ssm"), ("purple --out new/a.gif", 2, "does not know"),
    ("circle --edit tiny.pt", 2, "tiny.pt is not a picture or clip"),
    ("circle --box 1,2,3,4", 2, "--box goes with --inpaint"),
    ("circle --box 1,2,3", 2, "invalid box value: '1,2,3'"), ("red --schedule x --out n", 2, "'x'"),
])  # fmt: skip
def test_a_wrong_call_gets_one_line_and_makes_no_file_or_folder(command, argv, code, says):
    got, said, warned = command(*argv.split())
    assert (got, said) == (code, "")
    assert_one_line(warned, "sample.py", says)
    assert os.listdir() == ["tiny.pt"]


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (MemoryError(), 1)])
def test_ctrl_c_and_out_of_memory_get_one_line_and_make_no_file(command, monkeypatch, error, code):
    monkeypatch.setattr(sampler, "sample", Mock(side_effect=error))
    got, _, warned = command("a red circle")
    assert got == code and os.listdir() == ["tiny.pt"]
    assert_one_line(warned, "sample.py", "interrupted" if code == 130 else "out of memory; ask")


@pytest.mark.parametrize("script", ["sample.py", "train_tiny.py"])
@pytest.mark.parametrize("name", ["numpy", "torch", "einops", "PIL", "tqdm"])
def test_a_missing_package_says_what_to_install(tmp_path, script, name):
    for quick in ("numpy", "torch"):  # in place of the real ones, which take seconds
        (tmp_path / f"{quick}.py").write_text("")
    (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, ROOT / script], env=env, capture_output=True, text=True)
    says = f"No module named {name}. Run: python -m pip install -r requirements.txt\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", says)


def test_there_is_no_bar_where_there_is_no_terminal(tmp_path):
    torch.save(make_checkpoint(), tmp_path / "tiny.pt")
    argv = [sys.executable, ROOT / "sample.py", "a red circle", "--checkpoint", "tiny.pt"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"wrote clip.gif: ") and b"\r" not in done.stdout
