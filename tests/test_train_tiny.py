"""The training recipe, a step of it, and the command: resumed, extended, stopped and published."""

import copy
import functools
import io
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
import test_sample
from test_sample import ROOT, assert_one_line

import lingen
import sample as sampler
import train_tiny
from toy import preview, shapes

call = test_sample.call
TINY = dict(vocab_size=21, d_model=32, depth=1, nheads=2, headdim=16, d_state=8, backend="torch")
STAGES = (1, 4, 0.2), (4, 2, 0.3), (8, 2, 0.5)
SETTINGS = dict(steps=1000, seed=0, rate=train_tiny.RATE, frames=None)
# The real command with a small model on short clips, for subprocesses.
SMALL = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, lingen, sample, train_tiny
torch.set_num_threads(1)
lingen.PRESETS["tiny"] = {TINY}
train_tiny.STAGES = tuple(train_tiny.Stage(*stage) for stage in {STAGES})
"""


def use_small(patch):
    """A small model on short clips. Previews are blank: to sample them takes longer than a step."""
    patch.setitem(lingen.PRESETS, "tiny", TINY)
    patch.setattr(train_tiny, "STAGES", tuple(train_tiny.Stage(*stage) for stage in STAGES))
    blank = torch.zeros(8, 3, 1, 24, 24)
    patch.setattr(train_tiny, "sample_captions", lambda m, texts, *rest: blank[: len(texts)])
    patch.setattr(preview, "side_by_side", lambda *args: np.zeros((1, 8, 8, 3), np.uint8))


@pytest.fixture
def command(call, monkeypatch):
    """Run train_tiny.py in an empty folder -> (exit code, stdout, stderr)."""
    use_small(monkeypatch)
    return functools.partial(call, train_tiny)


@pytest.fixture
def run(monkeypatch):
    use_small(monkeypatch)
    return train_tiny.Run(lingen.preset("tiny"), SETTINGS, torch.device("cpu"))


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Equal bit for bit, through dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def before_step(monkeypatch, step, action):
    """Call action(run) before this step."""
    advance = train_tiny.Run.advance

    def act_and_advance(run):
        if run.step == step:
            action(run)
        return advance(run)

    monkeypatch.setattr(train_tiny.Run, "advance", act_and_advance)


def test_stages_follow_their_shares_and_every_eighth_step_is_on_pictures():
    frames = [train_tiny.stage_at(step, 800).frames for step in range(800)]
    assert set(frames[::8]) == {1}
    assert [f for step, f in enumerate(frames) if step % 8] == 70 * [1] + 70 * [4] + 560 * [16]
    in_turn = [train_tiny.stage_at(step, 800, [16, 64])[:2] for step in range(10)]
    assert in_turn == [(1, 32), *3 * [(64, 2), (16, 8)], (64, 2), (1, 32), (16, 8)]


def test_the_data_of_a_step_come_from_seed_and_step_alone(run):
    first = train_tiny.training_batch(9, 20, seed=3)
    torch.manual_seed(1)
    assert same(first, train_tiny.training_batch(9, 20, seed=3))
    for step, seed in ((10, 3), (9, 4)):
        assert not any(map(torch.equal, first, train_tiny.training_batch(step, 20, seed)))


def read_specs(text):
    """The specs (n, 3) of captions given as word numbers (b, words); empty captions are dropped."""
    words = [""] + sum(shapes.WORDS.values(), [])
    captions = [" ".join(words[i] for i in row) for row in text.tolist() if any(row)]
    return torch.stack([shapes.parse_caption(caption) for caption in captions])


def test_each_clip_is_as_its_caption_says(monkeypatch):
    monkeypatch.setattr(train_tiny, "NO_CAPTION", 0)
    clips, text, t, noise = train_tiny.training_batch(1500, 1600, seed=0)
    assert clips.shape == noise.shape == (8, 3, 16, 24, 24)
    for clip, (colour, _, direction) in zip(clips, read_specs(text), strict=True):
        assert torch.equal(clip.amax((1, 2, 3)), 2 * shapes.RGB[colour] - 1)
        dx, dy = shapes.STEPS[direction].tolist()
        assert torch.equal(clip[:, 5], clip[:, 0].roll((5 * dy, 5 * dx), (1, 2)))


def test_held_out_combinations_are_never_trained_on(monkeypatch):
    shown = []

    def render(specs, starts, frames, size):
        shown.append(specs)
        return torch.zeros(len(specs), 3, frames, 1, 1)

    monkeypatch.setattr(shapes, "render", render)
    for step in range(60):
        train_tiny.training_batch(step, 100, seed=0)
    assert not shapes.held_out(torch.cat(shown)).any()
    assert len(torch.cat(shown).unique(dim=0)) == 192 - 19


def test_some_captions_are_empty_and_the_others_name_everything(monkeypatch):
    monkeypatch.setattr(train_tiny, "STAGES", (train_tiny.Stage(4, 3000, 1.0),))
    specs = read_specs(train_tiny.training_batch(1, 10, seed=0)[1])
    assert 1 - len(specs) / 3000 == pytest.approx(train_tiny.NO_CAPTION, abs=0.015)
    assert (specs >= 0).all()


@pytest.mark.parametrize("frames, mean", [(1, -0.114), (4, -0.807), (16, -1.5), (64, -2.193)])
def test_times_are_logit_normal_and_a_fifth_uniform(frames, mean):
    t = train_tiny.draw_times(100_000, frames, torch.Generator().manual_seed(0))
    assert t.shape == (100_000,) and t.min() >= 0 and t.max() <= 1
    for x in (0.02, 0.1, 0.2, 0.4, 0.7, 0.95):
        normal = (1 + math.erf((math.log(x / (1 - x)) - mean) / 1.2 / math.sqrt(2))) / 2
        assert (t < x).float().mean().item() == pytest.approx(0.8 * normal + 0.2 * x, abs=0.006)


@pytest.mark.parametrize("predicts", ["clean", "velocity"])
def test_the_loss_is_the_squared_error_of_the_velocity_by_hand(predicts):
    clips, noise = torch.randn(2, 4, 3, 2, 4, 4)
    t, text = torch.tensor([0.0, 0.5, 0.7, 1.0]), torch.ones(4, 1)
    model = test_sample.Stub(lambda x, t, mask: 0.5 + model.anchor + 0 * x, predicts)
    loss = train_tiny.flow_matching_loss(model, clips, text, t, noise)
    x, given_t, given_text = model.given
    assert given_t is t and given_text is text
    errors = []
    for i, time in enumerate(t.tolist()):
        torch.testing.assert_close(x[i], (1 - time) * noise[i] + time * clips[i])
        if predicts == "velocity":
            error = 0.5 - (clips[i] - noise[i])
        elif time < 1 - train_tiny.CLAMP:
            error = (0.5 - x[i]) / (1 - time) - (clips[i] - noise[i])
        else:  # late times would count hundreds of times more
            error = (0.5 - clips[i]) / train_tiny.CLAMP
        errors.append(error.square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    loss.backward()
    assert model.anchor.grad.abs() > 0


def test_every_parameter_has_one_optimizer_and_muon_has_the_matrices_on_tokens(run):
    names = {weight: name for name, weight in run.model.named_parameters()}
    muon, adamw = ([names[p] for p in o.param_groups[0]["params"]] for o in run.optimizers)
    assert sorted(muon + adamw) == sorted(names.values())
    assert isinstance(run.optimizers[0], torch.optim.Muon)
    assert {"patch_in.weight", "patch_out.weight", "blocks.0.mlp.0.weight"} <= set(muon)
    assert {"patch_in.bias", "words.weight", "blocks.0.modulation.1.weight"} <= set(adamw)


def test_the_average_follows_the_weights_with_a_memory_that_grows(run):
    for step in range(3):
        before = copy.deepcopy(run.average.state_dict())
        run.advance()
        for name, value in run.model.state_dict().items():
            by_hand = ((step + 1) * before[name] + 9 * value) / (step + 10)
            torch.testing.assert_close(run.average.state_dict()[name], by_hand)


def test_the_learning_rate_warms_up_stays_and_falls_to_0(run):
    for step, rate in {0: 0.02, 24: 0.5, 49: 1, 600: 1, 800: 0.5, 999: 0.0025}.items():
        run.step = step
        run.advance()
        rates = [optimizer.param_groups[0]["lr"] for optimizer in run.optimizers]
        assert rates == pytest.approx([rate * train_tiny.RATE] * 2)


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """A folder with the checkpoints after each step of a run of six steps."""
    folder = tmp_path_factory.mktemp("six")
    with pytest.MonkeyPatch.context() as patch:
        use_small(patch)
        run = train_tiny.Run(lingen.preset("tiny"), {**SETTINGS, "steps": 6}, torch.device("cpu"))
        for step in range(1, 7):
            run.advance()
            train_tiny.write_checkpoint(folder / f"{step}.pt", run.state())
    return folder


@pytest.fixture
def files(six, command):
    """The folder has 1.pt ... 6.pt."""
    shutil.copytree(six, ".", dirs_exist_ok=True)


def test_resumed_after_any_step_a_run_ends_in_the_same_bits_and_can_be_made_longer(files, command):
    for step in range(1, 6):
        assert command("--resume", "--steps", 6, "--out", f"{step}.pt")[0] == 0
        assert same(load("6.pt"), load(f"{step}.pt")), step
    assert command("--resume", "--steps", 8, "--out", "6.pt")[0] == 0
    training = load("6.pt")["training"]
    assert (training["step"], training["settings"]["steps"]) == (8, 8)
    assert [frames for frames, *_ in training["losses"]] == [1, 4, 4, 8, 8, 8, 8, 8]


def test_a_run_begins_with_the_weights_of_init_and_goes_on_with_clips_of_frames(files, command):
    assert command(*"--init 6.pt --rate 0 --frames 2 4 --steps 3 --out run.pt".split())[0] == 0
    old, new = load("6.pt"), load("run.pt")
    assert same(old["weights"], new["weights"]) and new["trained"]["frames"] == [1, 2, 4]
    assert [frames for frames, *_ in new["training"]["losses"]] == [1, 4, 2]
    assert new["sampling"] == old["sampling"]
    long = train_tiny.Run(lingen.preset("tiny"), {**SETTINGS, "frames": [16, 64]}, "cpu").state()
    assert long["sampling"] == {**old["sampling"], **train_tiny.LONG}  # more steps


def test_set_reaches_the_config_the_checkpoint_and_the_preview(command, monkeypatch):
    titles, page = [], preview.side_by_side
    monkeypatch.setattr(preview, "side_by_side", lambda *args: titles.append(args[2]) or page())
    argv = "--set tesa=False --set scan=zigzag --set pool=(1,2,2) --set mlp_ratio=2.0".split()
    assert command(*argv, "--steps", 1, "--out", "run.pt")[0] == 0
    model, checkpoint = sampler.load_model("run.pt")
    found = [checkpoint["config"][name] for name in ("tesa", "scan", "pool", "mlp_ratio")]
    assert found == [False, "zigzag", (1, 2, 2), 2.0] and model.blocks[0].mixer.tesa is None
    assert model.config == lingen.preset("tiny", **dict(map(train_tiny.setting, argv[1::2])))
    command("--steps", 1, "--out", "plain.pt")
    named = "tesa=False, scan=zigzag, pool=(1, 2, 2), mlp_ratio=2.0, step 1"
    assert titles == [named, "LinGen, step 1"]


def test_previews_and_the_loss_curve_are_renewed_at_each_save(command, monkeypatch):
    written, replace = [], sampler.replace_file
    spy = monkeypatch.setattr
    spy(sampler, "replace_file", lambda *args: written.append(str(args[0])) or replace(*args))
    assert command("--steps", 3, "--save-every", 0, "--out", "new/run.pt")[0] == 0
    assert written == 4 * ["new/run.pt", "new/run.gif", "new/run.png"]  # after each step, and last
    assert sorted(os.listdir("new")) == ["run.gif", "run.png", "run.pt"]


def test_the_preview_shows_clips_of_the_averaged_weights_between_title_and_captions(tmp_path):
    run = train_tiny.Run(lingen.LinGenConfig(**TINY), SETTINGS, torch.device("cpu"))
    run.average.patch_out.bias.fill_(1)  # says white
    for weight in run.model.parameters():
        weight.data.fill_(math.nan)
    run.save(tmp_path / "run.pt", "LinGen")
    with Image.open(tmp_path / "run.gif") as page:
        assert page.info["duration"] == 1000  # 16 equal frames are one in the file
        pixels = np.asarray(page.convert("L")).astype(int)
    assert (pixels[[14 + 48, 14 + 112 + 48], 93::186] > 250).all()  # the middles of eight clips
    assert (pixels[:14] > 100).any() and (pixels[14 + 98 : 14 + 112] > 100).any()  # texts


def test_the_loss_curve_of_three_steps_is_not_empty():
    losses = [(16, 0.9, 0.2), (1, 0.5, 0.2), (1, 0.4, 0.2)]
    page = Image.open(io.BytesIO(preview.loss_curve(losses, "LinGen"))).convert("RGB")
    pixels = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in np.asarray(page).reshape(-1, 3)]
    assert all(pixels.count(colour) >= 4 for colour in preview.COLOURS[:2])


def test_a_published_checkpoint_is_small_and_sample_reads_it(command, call):
    assert command(*"--out run.pt --steps 2 --renoise 0.5 --publish new/small.pt".split())[0] == 0
    checkpoint = sampler.load_checkpoint("new/small.pt")
    assert checkpoint["trained"] == {"frames": [1, 4, 8], "height": [24], "width": [24]}
    halves = {name: value.half() for name, value in load("run.pt")["weights"].items()}
    assert same(halves, checkpoint["weights"]) and not checkpoint["training"]
    assert call(sampler, "red", *"--checkpoint new/small.pt --frames 4 --steps 2".split())[0] == 0
    assert sampler.read_settings("clip.gif").items() >= {"height": 24, "renoise": 0.5}.items()
    code, _, said = command("--resume", "--out", "new/small.pt")
    assert code == 2 and "holds no training state" in said


def test_evaluate_judges_seen_and_held_out_captions_each_in_a_line(command, monkeypatch):
    seeds = []

    def perfect(model, text, shape, *, seed, **options):
        seeds.append(seed)
        specs = read_specs(text)
        assert shapes.held_out(specs).eq(len(seeds) > 2).all()
        return shapes.render(specs, torch.full((len(specs), 2), 9.0), 4)

    command("--steps", 1, "--out", "run.pt")
    monkeypatch.setattr(train_tiny, "sample_captions", sampler.sample_captions)
    monkeypatch.setattr(sampler, "sample", perfect)
    code, said, warned = command("--evaluate", "run.pt", "--captions", 18, "--seed", 5)
    assert (code, warned, seeds) == (0, "", [5, 21, 5, 21])  # each clip has a seed of its own
    assert [line[:9] for line in said.splitlines() if "100" in line] == ["seen     ", "held out "]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_a_run_ends_its_step_and_saves(files, command, monkeypatch, number):
    before_step(monkeypatch, 2, lambda run: os.kill(os.getpid(), number))
    code, _, said = command("--steps", 6, "--out", "run.pt")
    assert (code, said) == (130, "stopped at step 3 of 6; go on with --resume\n")
    assert same(load("3.pt"), load("run.pt"))


def test_nan_stops_with_step_and_module_and_keeps_the_checkpoint(files, command, monkeypatch):
    before_step(monkeypatch, 3, lambda r: r.model.blocks[0].mlp[0].weight.data[0, 0].mul_(math.nan))
    code, _, said = command("--steps", 6, "--save-every", 0, "--out", "run.pt")
    assert code == 1 and same(load("3.pt"), load("run.pt"))
    assert_one_line(said, "train_tiny.py", "step 3: ")
    assert said.endswith("blocks.0.mlp.0 not finite; try a lower --rate\n")


@pytest.mark.parametrize("bad, code", [(range(90), 0), (range(90, 100), 1)])
def test_a_run_diverged_if_at_last_it_is_worse_than_black(command, monkeypatch, bad, code):
    def advance(run):
        run.losses.append((1, 0.4 if run.step in bad else 0.1, 0.3))
        run.step += 1
        return 0.1

    monkeypatch.setattr(train_tiny.Run, "advance", advance)
    got, said, warned = command("--steps", 100, "--out", "run.pt")
    assert (got, "all-black" in warned) == (code, code == 1)
    assert said == "step 100 of 100, loss 0.100\nwrote run.pt, run.gif and run.png\n"


def test_two_processes_follow_the_curve_of_one(files, tmp_path):
    script = tmp_path / "small.py"
    check = "lambda module, given: sys.exit('4 clips') if given[0].shape[:2] == (4, 3) else None"
    hook = f"torch.nn.modules.module.register_module_forward_pre_hook({check})"
    script.write_text(SMALL + hook + '\nsample.run_command("train_tiny.py", train_tiny.main)')
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv += [script, "--steps", "6", "--device", "cpu", "--out", "two.pt"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert Path("two.pt").exists(), done.stderr
    one, two = load("6.pt"), load("two.pt")
    curves = [torch.tensor(each["training"]["losses"]) for each in (one, two)]
    torch.testing.assert_close(*curves, rtol=1e-3, atol=0)
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, atol=2e-3, rtol=0)


@pytest.mark.parametrize("world, device", [(2, "cpu:0"), (3, "cpu"), (2, "cpu --frames 16")])
def test_what_torchrun_cannot_share_is_refused(command, monkeypatch, world, device):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    code, _, said = command("--steps", 1, "--device", *device.split())
    assert code == 2 and f"{world} processes" in said and not os.listdir()


@pytest.mark.parametrize("argv, code, says", [
    ("--steps 6 --out 6.pt", 2, "6.pt exists: give other --out or --resume"),
    ("--steps 5 --out 6.pt --resume", 2, "steps 6, not 5"),
    ("--steps 9 --out 3.pt --resume", 2, "steps 6, not 9"),
    ("--steps 6 --out 6.pt --resume --set tesa=False", 2, "tesa True, not False"),
    ("--steps 0", 2, "--steps, --captions and --frames are at least 1"),
    ("--device tpu", 2, "the device 'tpu' is not available here"),
    ("--out run.gif", 2, "--out"),  # the preview would overwrite it
    (f"--evaluate {__file__}", 2, "is damaged or not a checkpoint"),
    ("--init 6.pt --set tesa=False", 2, "cannot build the model of 6.pt"),
    ("--set tesa=maybe", 2, "expected NAME=VALUE, as in tesa=True"),
    ("--set scan=spiral", 2, "unknown order 'spiral'; expected spatial-row"),
    ("--set ma=False --set tesa=False", 2, "keep ma or tesa"), ("--frames 5", 2, "multiple"),
    ("--set backend=mamba_ssm --steps 1", 2, "mamba_ssm"), ("--set pool=(1,.5,2)", 2, "pool=(2"),
])  # fmt: skip
def test_a_wrong_call_gets_one_line_and_touches_no_file(files, command, argv, code, says):
    before = {path: path.read_bytes() for path in Path().iterdir()}
    got, said, warned = command(*argv.split())
    assert (got, said) == (code, "")
    assert_one_line(warned, "train_tiny.py", says)
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
