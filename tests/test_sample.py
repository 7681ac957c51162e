"""The sampler against closed forms, and the command as a user calls it: rightly, wrongly, and interrupted."""
import dataclasses
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import lingen  # noqa: E402
import sample as S  # noqa: E402

WORDS = ["a", "red", "blue", "circle", "square", "moving", "up", "left", "right", "the"]


def tiny(**changes):
    return lingen.LinGenConfig(**{"patch": (2, 4, 4), "channels": 3, "vocab_size": len(WORDS), "text_length": 8,
                                  "d_model": 16, "depth": 2, "nheads": 2, "headdim": 8, "d_state": 8, "grid": (0, 2, 2),
                                  "predicts": "clean", "backend": "torch", **changes})


def contents(config=None, **changes):
    config = config or tiny()
    torch.manual_seed(0)
    model = lingen.LinGen(config)
    with torch.no_grad():  # untouched it says 0 of every clip; a model that ignores its caption would test nothing
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return {"format": "lingen-tiny-1", "config": dataclasses.asdict(config), "vocabulary": WORDS,
            "weights": {k: v.half() for k, v in model.state_dict().items()},
            "sampling": {"frames": 4, "height": 8, "width": 12, "steps": 2, "guidance": 3.0, "schedule": "shifted",
                         "shift": 3.0, "fps": 8}, **changes}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    torch.save(contents(), path)
    return path


@pytest.fixture
def call(checkpoint, capsys, tmp_path, monkeypatch):
    """main(argv) in an empty folder -> (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*argv, checkpoint=checkpoint):
        code = S.main([*map(str, argv), *(["--checkpoint", str(checkpoint), "--device", "cpu"] if checkpoint else [])])
        out, err = capsys.readouterr()
        return code, out, err
    return call


class Stub(nn.Module):
    """A model given by a formula f(x, t, text)."""

    def __init__(self, f, predicts="velocity", patch=(1, 1, 1), channels=3):
        super().__init__()
        self.f, self.config, self.calls = f, SimpleNamespace(predicts=predicts, patch=patch, channels=channels, torus=False, vocab_size=0), []
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, x, t, text):
        self.calls.append((len(x), t.tolist(), text.clone()))
        assert x.ndim == 5 and t.shape == (len(x),) and text.shape[0] == len(x) and not torch.is_grad_enabled()
        return self.f(x, t.view(-1, 1, 1, 1, 1), text)


def noise(seed, shape=(3, 2, 4, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TEXT = torch.tensor([[1, 2], [3, 0]])
SHAPE = (2, 4, 4)


# ---- words ------------------------------------------------------------------------------------------------

def test_words():
    assert S.words(" A Red\tcircle, moving up-left!\n") == ["a", "red", "circle", "moving", "up", "left"]
    assert S.words("(the) circle's \"x\"; a/b: c?") == ["the", "circle", "s", "x", "a", "b", "c"]
    assert S.words("2 K\u00f6nige") == ["2", "k\u00f6nige"]        # kept, so that encode can complain


@pytest.mark.parametrize("caption", ["", "   ", "...", "a\0b", "\x1b[31mred", "red \u202ecircle", "red_circle", "\udcff",
                                     "\U0001f534", "e\u0301", None, 3, b"red", ["red"], "a" * 9 + "\x07" * 10_000])
def test_words_refused(caption):
    with pytest.raises(ValueError) as error:
        S.words(caption)
    assert str(error.value).isascii() and str(error.value).isprintable() and len(str(error.value)) < 300


def test_encode():
    got = S.encode(["a red circle", "Up-left"], WORDS)
    assert got.dtype == torch.int64 and got.tolist() == [[1, 2, 4], [7, 8, 0]]
    with pytest.raises(ValueError, match=r"'circel'; did you mean 'circle'.*a, red, blue"):
        S.encode(["a red circel"], WORDS)
    with pytest.raises(ValueError, match=r"'2'; It knows"):
        S.encode(["2 circles"], WORDS)
    with pytest.raises(ValueError, match=r"'\\u5186'"):
        S.encode(["\u5186"], WORDS)
    assert S.encode(["red " * 5], WORDS, limit=5).shape == (1, 5)
    with pytest.raises(ValueError, match="6 words, the model reads 5"):
        S.encode(["red " * 6], WORDS, limit=5)
    with pytest.raises(ValueError, match="2500 words"):
        S.encode(["red " * 2500], WORDS)
    with pytest.raises(ValueError, match="no caption"):
        S.encode([], WORDS)


SPEEDS = [["slowly", "slow"], ["quickly", "fast"]]


def test_complete_names_what_each_object_leaves_open():
    open_both = "A red circle moving up and to the left, and a blue square moving right."
    got = {S.complete(open_both, SPEEDS, seed) for seed in range(40)}
    assert got == {f"a red circle moving up and to the left {one} and a blue square moving right {other}"
                   for one in ("slowly", "quickly") for other in ("slowly", "quickly")}
    assert all(S.complete(open_both, SPEEDS, seed) == S.complete(open_both, SPEEDS, seed) for seed in range(9))
    half = "a fast red circle moving up and a blue square moving right"
    assert {S.complete(half, SPEEDS, seed) for seed in range(20)} == {f"{half} slowly", f"{half} quickly"}
    one = "a red circle moving up and to the left"
    assert {S.complete(one, SPEEDS, seed) for seed in range(20)} == {f"{one} slowly", f"{one} quickly"}
    for said in ("a slow red circle moving up and to the left", "a red circle moving up slow and a blue square moving fast right"):
        assert S.complete(said, SPEEDS, 3) == said
    assert S.complete(open_both, [], 3) == open_both
    alone = [S.complete(open_both, SPEEDS, seed) for seed in range(400)]
    for word in ("left slowly", "right slowly"):             # evenly, and the one apart from the other
        assert 160 < sum(word in text for text in alone) < 240
    assert 60 < sum("left slowly" in text and "right slowly" in text for text in alone) < 140


def test_the_command_completes_captions_of_clips_and_says_so(call, tmp_path):
    path = tmp_path / "choosy.pt"
    found = contents(tiny(vocab_size=len(WORDS) + 3, text_length=12), vocabulary=WORDS + ["and", "slowly", "quickly"])
    torch.save({**found, "sampling": {**found["sampling"], "choices": [["slowly"], ["quickly"]]}}, path)
    asked = "a red circle moving up and a blue square"
    told = S.complete(asked, [["slowly"], ["quickly"]], 5)
    assert told != asked
    Path("open").mkdir()
    code, out, _ = call(asked, asked, "--seed", 4, "--out", "open", checkpoint=path)
    assert code == 0 and f"{told!a}, seed 5" in out
    first, second = sorted(Path("open").glob("*.gif"))
    assert S.read_settings(second)["caption"] == told and S.read_settings(first)["caption"] != asked
    code, out, _ = call(told, "--seed", 5, "--out", "named.gif", checkpoint=path)
    assert Path("named.gif").read_bytes() == second.read_bytes()
    code, out, _ = call(asked, "--frames", 1, "--out", "still.gif", checkpoint=path)      # a picture has no speed
    assert code == 0 and S.read_settings("still.gif")["caption"] == asked
    full = "a red circle" + 9 * " up"                       # as many words as the model reads: no room for another
    code, out, _ = call(full, "--out", "full.gif", checkpoint=path)
    assert code == 0 and S.read_settings("full.gif")["caption"] == full
    code, _, said = call(full + " up", checkpoint=path)
    assert code == 2 and "has 13 words" in said


# ---- times ------------------------------------------------------------------------------------------------

def test_times_by_hand():
    assert S.times(4).tolist() == [0, 0.25, 0.5, 0.75, 1]
    torch.testing.assert_close(S.times(2, "shifted", 3.0), torch.tensor([0, 0.25, 1]))      # 0.5 / (0.5 + 1.5)
    # Four steps: 0, 1/1000, 2/1000, then 2/1000 + j/1000 + c j^2 with c = (1 - 4/1000)/4 = 0.249
    torch.testing.assert_close(S.times(4, "linear-quadratic"), torch.tensor([0, 0.001, 0.002, 0.252, 1]))


@pytest.mark.parametrize("schedule", S.SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 50, 51, 999, 1000])
def test_times_rise_from_0_to_1(schedule, steps):
    ts = S.times(steps, schedule, 4.0)
    assert ts.shape == (steps + 1,) and ts.dtype == torch.float32
    assert ts[0] == 0 and ts[-1] == 1 and (ts.diff() > 0).all()


def test_linear_quadratic_imitates_1000_steps_and_has_no_kink():
    ts = S.times(50, "linear-quadratic").double()
    torch.testing.assert_close(ts[:26], torch.arange(26).double() / 1000, atol=1e-7, rtol=0)
    second = ts.diff().diff()
    torch.testing.assert_close(second[25:], second[25:26].expand(24), atol=1e-6, rtol=0)   # a parabola
    assert abs(second[24] - second[30] / 2) < 1e-6       # half of the curvature on the border: the slopes meet
    torch.testing.assert_close(S.times(1000, "linear-quadratic"), S.times(1000))


def test_shifted():
    torch.testing.assert_close(S.times(9, "shifted", 1.0), S.times(9))
    assert (S.times(9, "shifted", 3.0)[1:-1] < S.times(9)[1:-1]).all()


@pytest.mark.parametrize("arguments", [(0,), (-1,), (1001,), (2.5,), ("3",), (True,), (4, "cosine"), (4, "shifted", 0.5),
                                       (4, "shifted", float("nan")), (4, None), (None,), (4, "shifted", None)])
def test_times_refused(arguments):
    with pytest.raises(ValueError):
        S.times(*arguments)


# ---- the sampler ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("schedule", S.SCHEDULES)
def test_euler_on_a_linear_velocity(schedule):
    """For v = a x + t, step i multiplies by (1 + a dt) and adds dt t: the recursion in float64 by hand."""
    got = S.sample(Stub(lambda x, t, text: -2 * x + 0.1 * t), TEXT, SHAPE, steps=7, schedule=schedule, shift=2.0, seed=5)
    ts = S.times(7, schedule, 2.0).double().tolist()
    for i in range(2):
        x = noise(5 + i).double()
        for t, after in zip(ts, ts[1:]):
            x = x + (after - t) * (-2 * x + 0.1 * t)
        torch.testing.assert_close(got[i].double(), x.clamp(-1, 1), atol=1e-5, rtol=0)


def test_euler_tends_to_the_solution():
    """dx/dt = -x from x0 ends on x0/e; Euler is of first order, so that ten times the steps divide the error by ten."""
    errors = []
    for steps in (10, 100):
        got = S.sample(Stub(lambda x, t, text: -x), TEXT[:1], SHAPE, steps=steps)[0]
        errors.append((got - (noise(0) * torch.exp(torch.tensor(-1.0))).clamp(-1, 1)).abs().max().item())
    assert 8 < errors[0] / errors[1] < 12


@pytest.mark.parametrize("steps", [1, 3, 50])
@pytest.mark.parametrize("schedule", S.SCHEDULES)
def test_clean_predictions_are_reached(steps, schedule):
    """A model that knows the clip: straight path, so every schedule ends on it; as a velocity, the same."""
    data = torch.rand(3, *SHAPE) * 2 - 1
    seen = []
    clean = S.sample(Stub(lambda x, t, text: data.expand_as(x), "clean"), TEXT, SHAPE, steps=steps, schedule=schedule,
                     shift=3.0, callback=lambda step, x1: seen.append((step, x1)))
    torch.testing.assert_close(clean, data.expand_as(clean), atol=1e-5, rtol=1e-5)
    assert [step for step, _ in seen] == list(range(steps)) and all(torch.equal(x1[0], data) for _, x1 in seen)
    velocity = S.sample(Stub(lambda x, t, text: (data - x) / (1 - t)), TEXT, SHAPE, steps=steps, schedule=schedule, shift=3.0,
                        callback=lambda step, x1: torch.testing.assert_close(x1[0], data, atol=1e-5, rtol=1e-5))
    torch.testing.assert_close(velocity, clean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance", [0, 0.5, 1, 4.0])
def test_guidance(guidance):
    """Constant velocities, 0.1*(sum of the words) + 0.02: the empty caption gives 0.02, and the sum is exact."""
    model = Stub(lambda x, t, text: torch.zeros_like(x) + 0.1 * text.sum(1).view(-1, 1, 1, 1, 1) + 0.02)
    got = S.sample(model, TEXT, SHAPE, steps=3, guidance=guidance)
    for i, total in enumerate((0.3, 0.3)):
        torch.testing.assert_close(got[i], (noise(i) + 0.02 + guidance * total).clamp(-1, 1), atol=1e-5, rtol=0)
    assert len(model.calls) == 3 and all(n == (2 if guidance == 1 else 4) for n, _, _ in model.calls)
    assert torch.equal(model.calls[0][2][:2], TEXT) and not model.calls[0][2][2:].any()
    torch.testing.assert_close([t[0] for _, t, _ in model.calls], [0.0, 1 / 3, 2 / 3])


def test_seeds(checkpoint):
    model, _ = S.load_model(checkpoint)
    text = S.encode(["a red circle", "blue square"], WORDS)
    both = S.sample(model, text, (4, 8, 8), steps=3, guidance=2.0, seed=7)
    assert both.shape == (2, 3, 4, 8, 8) and both.dtype == torch.float32 and both.abs().max() <= 1
    assert torch.equal(both, S.sample(model, text, (4, 8, 8), steps=3, guidance=2.0, seed=7))
    alone = S.sample(model, text[1:, :2], (4, 8, 8), steps=3, guidance=2.0, seed=8)       # without padding, too
    torch.testing.assert_close(alone[0], both[1], atol=1e-5, rtol=0)
    assert not torch.allclose(S.sample(model, text[1:], (4, 8, 8), steps=3, seed=9)[0], both[1], atol=1e-2)
    caption = S.sample(model, text[:1], (4, 8, 8), steps=3, guidance=2.0, seed=8)
    assert not torch.allclose(caption[0], alone[0], atol=1e-4)                           # the caption matters


@pytest.mark.parametrize("change", [
    {"text": TEXT.float()}, {"text": TEXT[0]}, {"text": TEXT[:0]}, {"text": [[1]]}, {"shape": (0, 4, 4)},
    {"shape": (3, 4, 4)}, {"shape": (2, 5, 4)}, {"shape": (2, 4, -4)}, {"shape": (2, 4, 4.0)}, {"steps": 0},
    {"guidance": float("nan")}, {"guidance": float("inf")}, {"guidance": "3"}, {"seed": -1}, {"seed": 2**32}, {"schedule": "x"}, {"period": -1}, {"period": 2.5}, {"views": 0}, {"views": True}])
def test_sample_refuses(change):
    model = Stub(lambda x, t, text: x, patch=(2, 4, 4))
    with pytest.raises(ValueError):
        S.sample(model, **{"text": TEXT, "shape": SHAPE, **change})
    assert not model.calls


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_an_error(value):
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        S.sample(Stub(lambda x, t, text: x + value), TEXT, SHAPE, steps=2)


def test_a_still_image():
    assert S.sample(Stub(lambda x, t, text: x, patch=(2, 4, 4)), TEXT, (1, 4, 4), steps=1).shape == (2, 3, 1, 4, 4)


@pytest.mark.parametrize("fresh", [0.0, 0.6, 1.0])
def test_fresh_noise_replaces_as_much_as_it_says(fresh):
    clip, seen = torch.full((1, 3, 4, 32, 32), 0.5), []

    def knows(x, t, text):                          # a model that knows the clip: what is left in x is pure noise
        seen.append(((x - t * clip) / (1 - t)).flatten())
        return clip
    out = S.sample(Stub(knows, "clean"), TEXT[:1], (4, 32, 32), steps=5, fresh=fresh, seed=3)
    torch.testing.assert_close(out, clip)
    for before, after in zip(seen, seen[1:]):
        assert after.std().item() == pytest.approx(1, abs=0.03)
        both = torch.corrcoef(torch.stack([before, after]))[0, 1].item()
        assert both == pytest.approx((1 - fresh**2) ** 0.5, abs=0.03)


def test_fresh_noise_of_a_clip_does_not_depend_on_its_neighbours():
    model = Stub(lambda x, t, text: x.roll(1, -1), "clean")
    pair = S.sample(model, TEXT, SHAPE, steps=4, fresh=0.7, seed=5)
    torch.testing.assert_close(S.sample(model, TEXT[1:], SHAPE, steps=4, fresh=0.7, seed=6), pair[1:], rtol=0, atol=0)
    assert not torch.equal(S.sample(model, TEXT[1:], SHAPE, steps=4, fresh=0.7, seed=7), pair[1:])


def test_noise_repeats_after_its_period():
    draw = lambda frames, period: S.white_noise((2, 3, frames, 4, 5), torch.Generator().manual_seed(1), period)
    for period in (1, 3, 7):                        # also one that does not divide the frames
        noise = draw(11, period)
        assert noise.shape == (2, 3, 11, 4, 5)
        for i in range(11):
            assert torch.equal(noise[:, :, i], draw(period, 0)[:, :, i % period])
    assert torch.equal(draw(11, 11), draw(11, 0)) and torch.equal(draw(11, 40), draw(11, 0))    # short clips: as ever
    own = draw(11, 0)
    assert not any(torch.equal(own[:, :, i], own[:, :, j]) for i in range(11) for j in range(i))


@pytest.mark.parametrize("fresh", [0.0, 1.0])
def test_the_sampler_draws_noise_with_the_period(fresh):
    seen = []

    def model(x, t, text):
        seen.append(x.clone())
        return 0 * x
    S.sample(Stub(model, "clean"), TEXT, (8, 4, 4), steps=4, fresh=fresh, period=4)
    assert all(torch.equal(x[:, :, :4], x[:, :, 4:]) for x in seen) and not torch.equal(seen[0][:, :, 0], seen[0][:, :, 1])
    seen.clear()
    S.sample(Stub(model, "clean"), TEXT, (8, 4, 4), steps=4, fresh=fresh)
    assert not any(torch.equal(x[:, :, :4], x[:, :, 4:]) for x in seen)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_on_a_torus_each_step_asks_from_another_place(guidance):
    """What is said of each pixel by itself comes back to it: the same clip. But where it was asked was rolled."""
    seen, calls = {}, {}
    for torus in (False, True):
        seen[torus], calls[torus] = [], []

        def model(x, t, text):
            seen[torus].append(x.clone())
            return 0.5 * x + 0.01 * text.sum(1).view(-1, 1, 1, 1, 1)
        stub = Stub(model)
        stub.config.torus = torus
        clip = S.sample(stub, TEXT, (2, 4, 6), steps=12, guidance=guidance, fresh=0.5, callback=lambda step, x1: calls[torus].append(x1))
        seen[torus].append(clip)
    assert torch.equal(seen[True].pop(), seen[False].pop()) and all(torch.equal(a, b) for a, b in zip(calls[True], calls[False]))
    found = []
    for rolled, plain in zip(seen[True], seen[False]):
        found += [(y, x) for y in range(4) for x in range(6) if torch.equal(rolled, plain.roll((y, x), (3, 4)))]     # the whole batch alike
    assert len(found) == 12 and len({y for y, _ in found}) > 2 and len({x for _, x in found}) > 3


def without_ends(asked, more):
    """What a model was shown of a ring in time, without the `more` frames on either side that it was shown twice."""
    inner = asked[:, :, more:asked.shape[2] - more]
    for i in range(asked.shape[2]):
        assert torch.equal(asked[:, :, i], inner[:, :, (i - more) % inner.shape[2]])
    return inner


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("frames, period", [(2, 0), (4, 4)])
def test_views_are_averaged_each_from_a_place_of_its_own(guidance, frames, period):
    """A model with a mistake that stays at its place: a step of three views makes a third of it at each of three places."""
    mistake = torch.randn(1, 3, frames, 4, 4, generator=torch.Generator().manual_seed(0))

    def model(x, t, text):
        more = period // 2 if torus else 0
        seen.append(without_ends(x[:2], more))
        return 0.5 * x + torch.nn.functional.pad(mistake, (0, 0, 0, 0, more, more), value=9)      # what is said of the ends does not count
    for torus in (True, False):
        seen, steps, stub = [], [], Stub(model, "clean")
        stub.config.torus = torus
        S.sample(stub, TEXT, (frames, 4, 4), steps=5, views=3, guidance=guidance, fresh=1.0, period=period, callback=lambda step, x1: steps.append(x1))
        if not torus:               # where nothing rolls, three views would be the same one three times
            assert len(seen) == 5
            break
        assert len(seen) == 15
        rolls = [(z, y, x) for z in range(frames if period else 1) for y in range(4) for x in range(4)]
        for step, x1 in enumerate(steps):
            # Where the views of this step stood: all are rolls of one clip, and the answer says of which.
            fits = []
            for start in rolls:
                clip = seen[3 * step].roll([-moved for moved in start], (2, 3, 4))
                places = [next((r for r in rolls if torch.equal(clip.roll(r, (2, 3, 4)), view)), None) for view in seen[3 * step:3 * step + 3]]
                if None not in places:
                    mean = sum(mistake.roll([-moved for moved in r], (2, 3, 4)) for r in places) / 3
                    fits += [len(set(places))] * torch.allclose(0.5 * clip + mean, x1, atol=1e-5)
            assert len(fits) == 1 and fits[0] >= 2


@pytest.mark.parametrize("frames", [4, 7, 8, 9])
def test_in_a_world_that_comes_back_each_step_asks_from_another_frame(frames):
    """In whole rounds of four frames, cut to length in the end."""
    def clip(frames, period, torus=True, size=(4, 4)):
        seen = []

        def model(x, t, text):
            seen.append(x.clone())
            return 0.5 * x + (torch.arange(x.shape[2]) < 2).view(-1, 1, 1) * ring     # what is said of the ends does not count
        stub, ring = Stub(model), torus and size == (4, 4) and period == 4 <= frames
        stub.config.torus = torus
        out = S.sample(stub, TEXT, (frames, *size), steps=9, fresh=0.5, period=period)
        return out, [without_ends(asked, 2 * ring) for asked in seen]
    rounds = -(-frames // 4) * 4
    cut, seen = clip(frames, 4)
    whole, plain = clip(rounds, 4, torus=False)
    assert torch.equal(cut, whole[:, :, :frames])               # what is said of each pixel by itself comes back to it
    found = [(t, y, x) for asked, still in zip(seen, plain, strict=True) for t in range(rounds) for y in range(4) for x in range(4)
             if torch.equal(asked, still.roll((t, y, x), (2, 3, 4)))]
    assert len(found) == 9 * rounds // 4 and len({t % 4 for t, *_ in found}) > 2      # one place a step; a round later is the same
    for length, period, torus, size in ((frames, 4, False, (4, 4)), (frames, 4, True, (4, 6)), (frames, 0, True, (4, 4)), (frames, 8, True, (4, 4)),
                                        (3, 4, True, (4, 4)), (1, 4, True, (4, 4))):    # no ring, or less than a round: as long as asked for
        out, seen = clip(length, period, torus, size)
        assert out.shape[2] == length and all(asked.shape[2] == length for asked in seen)


def test_a_ring_is_made_of_whole_periods_half_of_which_are_whole_patches():
    rings = lambda frames, period, torus=True, patch=(4, 4, 4): S.whole_periods(SimpleNamespace(torus=torus, patch=patch), (frames, 32, 32), period)
    assert [rings(frames, 32) for frames in (16, 31, 32, 33, 64, 1088)] == [0, 0, 32, 64, 64, 1088]
    assert rings(64, 32, torus=False) == rings(64, 0) == rings(64, 16) == rings(64, 32, patch=(32, 4, 4)) == 0 and rings(64, 32, patch=(16, 4, 4)) == 64
    config = lingen.preset("tiny", vocab_size=5)
    needs = lambda frames, period: S.lacks_memory(config, (frames, 32, 32), {"guidance": 1, "period": period}, "cpu").split(" needs about ")[1].split(" MiB")[0]
    assert needs(64, 32) == needs(96, 0) != needs(64, 0)        # what is shown, not what is kept


# ---- checkpoints ------------------------------------------------------------------------------------------

def test_load(checkpoint):
    import hashlib
    model, got = S.load_model(str(checkpoint), backend="torch")
    assert not model.training and model.config == tiny() and all(p.dtype == torch.float32 for p in model.parameters())
    assert got["vocabulary"] == WORDS and got["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    for name, value in model.state_dict().items():
        assert torch.equal(value, got["weights"][name].to(value.dtype)), name


def test_training_checkpoints_serve_too(tmp_path):
    torch.save(contents(optimizer={"state": {0: torch.ones(3)}}, step=7, training={"steps": 7}), tmp_path / "t.pt")
    assert S.load_model(tmp_path / "t.pt")[1]["step"] == 7


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_code_is_never_run(tmp_path):
    trap = str(tmp_path / "trap")
    torch.save({**contents(), "training": Code(trap)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="never run"):
        S.load_checkpoint(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Code(trap)))
    torch.save(Code(trap), tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    for name in ("b.pt", "c.pt"):
        with pytest.raises(ValueError, match="no whole checkpoint"):
            S.load_checkpoint(tmp_path / name)
    assert not Path(trap).exists()


def test_damage(checkpoint, tmp_path):
    whole, path = checkpoint.read_bytes(), tmp_path / "d.pt"
    for n in {0, 1, 10, 1000, *range(0, len(whole), len(whole) // 25), len(whole) - 1}:
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="copy or download it again"):
            S.load_checkpoint(path)
    flips = 0
    with zipfile.ZipFile(checkpoint) as z:     # one bit in the largest record: torch.load alone would not notice
        record = max(z.infolist(), key=lambda r: r.file_size)
    for where in (record.header_offset + 300 + record.file_size // 2, *range(0, len(whole), len(whole) // 25)):
        torn = bytearray(whole)
        torn[where] ^= 16
        path.write_bytes(torn)
        try:
            got = S.load_checkpoint(path)["weights"]     # a bit in the padding between records hurts nobody
            assert all(torch.equal(v, contents()["weights"][k]) for k, v in got.items())
        except ValueError:
            flips += 1
    assert flips > 5


def test_foreign_checkpoints(tmp_path):
    path, good = tmp_path / "f.pt", contents()
    weights = good["weights"]
    first = next(iter(weights))
    cases = {"another program or version": [{**good, "format": "lingen-tiny-0"}, {"state_dict": weights}, [1], weights, 3,
                                            {**good, "format": torch.ones(3)}],
             "lacks": [{k: v for k, v in good.items() if k != key} for key in ("config", "vocabulary", "weights", "sampling")]
             + [{**good, "config": [1]}, {**good, "weights": 3}],
             "does not fit": [{**good, "config": {"colour": 3}}, {**good, "weights": {}}, {**good, "weights": {1: 2}},
                              {**good, "weights": {k: v for k, v in weights.items() if k != first}},
                              {**good, "weights": {**weights, "more": torch.ones(2)}},
                              {**good, "weights": {**weights, first: torch.ones(1, 2, 3)}},
                              {**good, "weights": {**weights, first: "x"}}, {**good, "vocabulary": [1, 2]},
                              {**good, "vocabulary": WORDS + ["green"]},
                              {**good, "sampling": {"frames": "many"}},
                              *({**good, "sampling": {"choices": choices}} for choices in (3, "red", ["red"], [[]], [["pink"]], [[[]]], {}))]}
    for message, wrong in cases.items():
        for content in wrong:
            torch.save(content, path)
            with pytest.raises(ValueError, match=message) as error:
                S.load_model(path)
            assert "f.pt" in str(error.value)


def test_missing_checkpoints(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path, tmp_path / "none" / "x.pt", "a\0b"):
        with pytest.raises(OSError, match="checkpoint"):
            S.load_checkpoint(path)


# ---- writing ----------------------------------------------------------------------------------------------

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)


def test_to_frames():
    clip = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 2, 4, 5)
    got = S.to_frames(clip)
    assert got.shape == (2, 4, 5, 3) and got.dtype == np.uint8 and got[1, 2, 3].tolist() == [0, 128, 255]
    with pytest.raises(ValueError):
        S.to_frames(clip[:2])


def test_npy_and_webp_and_png_keep_every_value(tmp_path):
    S.write_clip(tmp_path / "c.npy", FRAMES)
    assert np.array_equal(np.load(tmp_path / "c.npy"), FRAMES) and np.load(tmp_path / "c.npy").dtype == np.uint8
    S.write_clip(tmp_path / "c.webp", FRAMES, scale=3, fps=7)
    with Image.open(tmp_path / "c.webp") as image:
        assert image.n_frames == 5 and image.size == (12, 18)
        total = 0
        for i in range(5):
            image.seek(i)
            image.load()
            total += image.info["duration"]
            assert np.array_equal(np.asarray(image.convert("RGB"))[1::3, 1::3], FRAMES[i])
        assert total == round(5000 / 7)
    S.write_clip(tmp_path / "c.png", FRAMES, scale=2)
    page = np.asarray(Image.open(tmp_path / "c.png"))
    assert page.shape == (12, 5 * 8 + 4 * 2, 3)
    for i in range(5):
        assert np.array_equal(page[1::2, i * 10 + 1:i * 10 + 8:2], FRAMES[i])
    assert (page[:, 8:10] == 255).all()


@pytest.mark.parametrize("fps", [1, 7, 12.5, 16, 24, 30, 50])
def test_gif_lasts_as_long_as_it_should(fps, tmp_path):
    frames = np.zeros((33, 4, 4, 3), np.uint8) + np.arange(33, dtype=np.uint8)[:, None, None, None] * 7
    S.write_clip(tmp_path / "c.gif", frames, fps=fps, scale=1)
    with Image.open(tmp_path / "c.gif") as image:
        assert image.n_frames == 33 and image.info["loop"] == 0
        lasts = []
        for i in range(33):
            image.seek(i)
            lasts.append(image.info["duration"])
            assert abs(int(np.asarray(image.convert("RGB"))[0, 0, 0]) - 7 * i) <= 2
    assert abs(sum(lasts) - 33000 / fps) <= 5 and max(lasts) - min(lasts) <= 10


def test_gif_colours_and_still_frames(tmp_path):
    """A shape on a noisy ground keeps its colour; frames that do not change keep their time; one frame is a picture."""
    frames = np.random.default_rng(1).normal(40, 4, (8, 32, 32, 3)).clip(0, 255).astype(np.uint8)
    frames[:, 10:14, 10:14] = (220, 40, 40)
    S.write_clip(tmp_path / "c.gif", frames, scale=4)
    with Image.open(tmp_path / "c.gif") as image:
        got = np.asarray(image.convert("RGB")).astype(int)
    assert abs(got[42:54, 42:54] - (220, 40, 40)).max() < 16 and got.shape == (128, 128, 3)
    many = np.random.default_rng(2).integers(0, 256, (1, 40, 40, 3), dtype=np.uint8)      # no dither: a colour and
    S.write_clip(tmp_path / "m.gif", np.concatenate([many, many[:, ::-1]], 2), scale=1)     # its copy elsewhere stay equal
    with Image.open(tmp_path / "m.gif") as image:
        got = np.asarray(image.convert("RGB"))
    assert np.array_equal(got[:, :40], got[::-1, 40:])
    S.write_clip(tmp_path / "s.gif", np.repeat(frames[:1], 16, 0), fps=16)
    with Image.open(tmp_path / "s.gif") as image:
        assert sum(image.seek(i) or image.info.get("duration", 0) for i in range(image.n_frames)) == 1000
        assert image.size == (256, 256)
    S.write_clip(tmp_path / "o.gif", frames[:1])
    assert Image.open(tmp_path / "o.gif").size == (256, 256)


def test_contact_sheet_of_many():
    frames = np.arange(200, dtype=np.uint8).reshape(200, 1, 1, 1).repeat(3, 3)
    page = np.asarray(S.sheet(frames, gap=0))[..., 0]
    assert page.shape == (8, 8) and page[0, 0] == 0 and page[-1, -1] == 199 and (np.diff(page.ravel().astype(int)) > 0).all()
    page = np.asarray(S.sheet(frames[:10], gap=0))[..., 0]
    assert page.ravel().tolist() == [*range(10), *[255] * 6]


@pytest.mark.parametrize("ending", [".gif", ".webp", ".png"])
@pytest.mark.parametrize("n", [1, 5])
def test_settings_come_back(ending, n, tmp_path):
    settings = {"caption": "a red \u5186 circle \"x\" " + "long " * 300, "seed": 3, "guidance": 2.5, "none": None}
    S.write_clip(tmp_path / f"c{ending}", FRAMES[:n], settings=settings)
    assert S.read_settings(tmp_path / f"c{ending}") == settings


def test_settings_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        S.read_settings(tmp_path / "none.gif")
    S.write_clip(tmp_path / "c.npy", FRAMES)
    Image.fromarray(FRAMES[0]).save(tmp_path / "bare.png")
    Image.fromarray(FRAMES[0]).save(tmp_path / "other.gif", comment=b"made by hand")
    for name in ("c.npy", "bare.png", "other.gif", "."):
        with pytest.raises(ValueError, match="holds no settings"):
            S.read_settings(tmp_path / name)


@pytest.mark.parametrize("change", [{"path": "c.mp4"}, {"path": "c"}, {"frames": FRAMES[0]}, {"frames": FRAMES[:0]},
                                    {"frames": FRAMES / 255}, {"fps": 0}, {"fps": float("nan")}, {"scale": 0}, {"scale": 1.5}])
def test_write_refuses(change, tmp_path):
    arguments = {"path": "c.gif", "frames": FRAMES, **change}
    with pytest.raises(ValueError):
        S.write_clip(tmp_path / arguments.pop("path"), **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["write", "fsync", "replace", "save"])
@pytest.mark.parametrize("kind", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written(where, kind, tmp_path, monkeypatch):
    path = tmp_path / "c.gif"
    path.write_bytes(b"the old clip")

    def fail(*_, **__):
        raise kind
    if where == "write":
        class Full(io.FileIO):
            def write(self, data):
                super().write(data[:10])
                fail()
        monkeypatch.setattr(S, "open", lambda name, mode: Full(name, mode), raising=False)
    else:
        monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (os, "replace"), "save": (Image.Image, "save")}[where], fail)
    with pytest.raises(type(kind)):
        S.write_clip(path, FRAMES)
    assert path.read_bytes() == b"the old clip" and [p.name for p in tmp_path.iterdir()] == ["c.gif"]


# ---- the command ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ending", S.ENDINGS)
def test_one_caption(call, ending, checkpoint):
    import hashlib
    code, out, err = call("A red circle moving up-left", "--out", f"c{ending}", "--seed", 4)
    assert code == 0 and f"wrote 'c{ending}'" in out and "peak memory" in out and "Traceback" not in err
    if ending == ".npy":
        assert np.load("c.npy").shape == (4, 8, 12, 3)
    else:
        got = S.read_settings(f"c{ending}")
        assert got["caption"] == "A red circle moving up-left" and got["seed"] == 4 and got["guidance"] == 3.0
        assert got["checkpoint"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest() and got["torch"] == torch.__version__
        assert {"frames": 4, "height": 8, "width": 12, "steps": 2, "schedule": "shifted", "fps": 8}.items() <= got.items()
        code, out, _ = call("--read", f"c{ending}")
        assert code == 0 and json.loads(out) == got


def test_options_reach_the_clip(call, checkpoint):
    assert call("a circle", "--out", "c.npy", "--frames", 2, "--height", 16, "--width", 8, "--steps", 3, "--guidance", 1,
                "--schedule", "uniform", "--seed", 11, "--backend", "torch")[0] == 0
    model = S.load_model(checkpoint)[0]
    clip = S.sample(model, S.encode(["a circle"], WORDS), (2, 16, 8), steps=3, seed=11)
    assert np.array_equal(np.load("c.npy"), S.to_frames(clip[0]))


def test_several_captions_are_what_each_is_alone(call, tmp_path):
    (tmp_path / "list.txt").write_bytes("\ufeffa blue square\r\n\r\nthe red circle\n".encode())
    (tmp_path / "clips").mkdir()
    code, out, err = call("a circle", "--captions", "list.txt", "--out", "clips/", "--seed", 5)
    assert code == 0, err
    names = sorted(p.name for p in (tmp_path / "clips").iterdir())
    assert names == ["000-a-circle.gif", "001-a-blue-square.gif", "002-the-red-circle.gif"]
    assert call("the red circle", "--out", "alone.gif", "--seed", 7)[0] == 0
    assert (tmp_path / "alone.gif").read_bytes() == (tmp_path / "clips" / names[2]).read_bytes()
    assert call("a circle", "--out", "clips")[0] == 0          # a folder, for one caption


def test_emerge(call):
    code, out, err = call("a circle", "--out", "c.gif", "--emerge", "e.png", "--steps", 9)
    assert code == 0, err
    page = np.asarray(Image.open("e.png").convert("RGB")).reshape(-1, 3).tolist()
    assert [255, 255, 255] in page and [0x22, 0x22, 0x22] in page


WRONG = [  # arguments, what the message must say
    ([], "no caption"),
    ([""], "is empty"),
    (["a red cirle"], "did you mean 'circle'"),
    (["a \u202ered"], r"'\u202e'"),
    (["red \x1b[0m"], r"'\x1b'"),
    (["\u05d0\u05d3\u05d5\u05dd"], r"\u05d0"),
    (["\udcff"], r"\udcff"),
    (["red " * 2500], "2500 words"),
    (["red " * 9], "reads 8"),
    (["a\nred\0"], r"'\x00'"),
    (["red" * 4000], "does not know"),
    (["--frames"], "expected one argument"),
    (["a", "--frames", "x"], "invalid int"),
    (["a", "--frames", "3"], "take 4, or 1"),
    (["a", "--frames", "0"], "from 1 to 4096"),
    (["a", "--frames", "1e9"], "invalid int"),
    (["a", "--frames", "99999999999"], "from 1 to"),
    (["a", "--height", "7"], "take 8"),
    (["a", "--width", "-8"], "from 1 to 4096"),
    (["a", "--height", "2"], "take 4"),
    (["a", "--steps", "0"], "from 1 to 1000"),
    (["a", "--steps", "2.5"], "invalid int"),
    (["a", "--fps", "0"], "from 1 to 100"),
    (["a", "--fps", "nan"], "fps is nan"),
    (["a", "--guidance", "nan"], "guidance is nan"),
    (["a", "--guidance", "inf"], "guidance is inf"),
    (["a", "--guidance", "-1"], "from 0"),
    (["a", "--views", "0"], "views is 0"),
    (["a", "--views", "1.5"], "invalid int"),
    (["a", "--seed", "-1"], "seed is -1"),
    (["a", "--seed", str(2**32)], "seed is"),
    (["a", "--frames", "4096", "--height", "4096", "--width", "4096"], "times smaller"),
    (["a", "--height", "1024", "--scale", "16"], "a smaller scale"),
    (["a", "--scale", "0"], "scale is 0"),
    (["a", "--schedule", "cosine"], "invalid choice"),
    (["a", "--backend", "jax"], "invalid choice"),
    (["a", "--fram", "4"], "unrecognized"),
    (["a", "--what"], "unrecognized"),
    (["a", "--device", "toaster"], "'toaster' is not to be had"),
    (["a", "--device", "meta"], "not to be had"),
    (["a", "--device", ""], "not to be"),
    (["a", "--device", "cuda:99"], "not to be had"),
    (["a", "--out", "c.mp4"], "choose one of"),
    (["a", "--out", "clip"], "choose one of"),
    (["a", "--out", "none/c.gif"], "make it first"),
    (["a", "--out", "none/"], "make it first"),
    (["a", "--out", "a\0.gif"], "NUL"),
    (["a", "--out", "folder.gif/x.gif/"], "make it first"),
    (["a", "the", "--out", "c.gif"], "make it first"),
    (["a", "the", "--emerge", "e.png"], "one caption"),
    (["a", "--emerge", "e.gif"], "writes .png"),
    (["a", "--emerge", "none/e.png"], "make it first"),
    (["--captions", "none.txt"], "cannot read"),
    (["--captions", "."], "cannot read"),
    (["--captions", "binary"], "not text in UTF-8"),
    (["--captions", "blank.txt"], "no caption"),
    (["--captions", "a\0"], "not"),
    (["--read", "none.gif"], "no file"),
    (["--read", "binary"], "no settings"),
    (["a", "--out", "\u5186/c.gif"], r"\u5186"),
    (["a", "--emerge", "folder.png"], "is a folder"),
    (["a", "--checkpoint", "none.pt"], "train one"),
    (["a", "--backend", "mamba_ssm"], "mamba_ssm"),
    (["a", "--checkpoint", "."], "is a folder"),
    (["a", "--checkpoint", "binary"], "no whole checkpoint"),
    (["a", "--checkpoint", "a\0"], "cannot read"),
    (["a", "--checkpoint", "blank.txt"], "no whole"),
    (["a", "--checkpoint", "foreign.pt"], "another program"),
]


@pytest.mark.parametrize("argv, message", WRONG, ids=lambda v: ascii(v)[:40])
def test_wrong_calls(call, checkpoint, argv, message, tmp_path, monkeypatch):
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "folder.png").mkdir()
    torch.save([1], tmp_path / "foreign.pt")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(S, "sample", lambda *_, **__: pytest.fail("sampled before checking"))
    extra = [] if "--checkpoint" in argv else ["--checkpoint", str(checkpoint)]
    extra += [] if "--device" in argv else ["--device", "cpu"]
    code, out, err = call(*extra, *argv, checkpoint=None)
    assert code == 2 and out == "" and err.startswith("sample.py: error: ") and message in err, err
    assert err.count("\n") == 1 and err.isascii() and "Traceback" not in err and len(err) < 3100
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.name == "nt" or getattr(os, "geteuid", int)() == 0, reason="needs a user whom a folder can refuse")
def test_read_only_folder(call, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    code, _, err = call("a", "--out", "locked/c.gif")
    assert code == 2 and "nothing can be written" in err


@pytest.mark.parametrize("error, message", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total capacity of 10 GiB of which 1.50 GiB is free."),
     "(9.00 GiB more asked for, 1.50 GiB free): this clip needs about 0.04"), (MemoryError(), "out of memory: this clip needs"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 3221225472 bytes."), "(3 GiB more"),
    (OSError(12, "Cannot allocate memory"), "ask for less (half of --frames"),
    (RuntimeError("something\nelse"), ": something else"), (KeyError("k"), "KeyError"), (FloatingPointError("NaN"), "NaN"),
    (OSError(28, "No space left on device"), "No space left on device")])
def test_failures_on_the_way(call, monkeypatch, error, message, tmp_path):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(S, "write_clip" if isinstance(error, OSError) else "sample", fail)
    code, out, err = call("a", "--out", "c.gif")
    assert code == 1 and err.splitlines()[-1].startswith("sample.py: error: ") and message in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_nan_writes_nothing(call, monkeypatch, tmp_path):
    monkeypatch.setattr(lingen.LinGen, "forward", lambda self, clip, t, text: clip * float("nan"))
    code, _, err = call("a", "--out", "c.gif")
    assert code == 1 and "NaN or infinity" in err and not list(tmp_path.iterdir())


def test_interrupted(call, monkeypatch, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(lingen.LinGen, "forward", interrupt)
    code, _, err = call("a", "--out", "c.gif")
    assert code == 130 and "interrupted" in err and not list(tmp_path.iterdir())


def script(*argv, **env):
    return subprocess.run([sys.executable, ROOT / "sample.py", *map(str, argv)], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})


def test_as_a_user_runs_it(checkpoint, tmp_path):
    out = tmp_path / "a clip \u00e9.gif"
    done = script("a red circle", "--out", out, "--checkpoint", checkpoint, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "peak memory" in done.stdout and done.stdout.isascii(), done.stderr
    assert Image.open(out).n_frames == 4
    done = script("a red circel", "--checkpoint", checkpoint, LC_ALL="C", PYTHONUTF8="0")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and "'circle'" in done.stderr


def test_help_and_typing_errors_do_not_wait_for_torch():
    code = "import sys, sample; print(sample.main(['a', '--frames', 'x']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "2 False\n", done.stderr
    done = script("--help")
    assert done.returncode == 0 and "--guidance" in done.stdout and done.stdout.isascii()
