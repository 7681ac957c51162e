"""The toy world and its judge: real clips score 100 %, and each way of going wrong is seen and named."""


import argparse
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import popen

import lingen
import sample
import train_tiny as toy
from benchmarks import judge as ruler

ROOT = Path(__file__).resolve().parent.parent
ALL = torch.cartesian_prod(*[torch.arange(n) for n in (6, 4, 8, 2, 2)])                    # (768, 5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clip_of(spec, frames=16, start=(15.3, 14.8)):
    return toy.render(torch.tensor(spec).view(1, -1, 5), torch.tensor(start).view(1, -1, 2), frames)[0]


def failed(record):
    names = [f"{a}_ok" for a in toy.ATTRIBUTES] + ["one_object", "steady", "finite", "overlap_ok"]
    return {n.removesuffix("_ok") for n in names if record[n] is False}


SPECS = [(c, s, d, v, z) for c, s, d, v, z in zip((0, 1, 2, 3, 4, 5, 0, 3), (0, 1, 2, 3) * 2, range(8),
                                                  (0, 1, 1, 0) * 2, (0, 0, 0, 0, 1, 1, 1, 1), strict=True)]


# ---- data ----------------------------------------------------------------------------------------

def test_drawing_agrees_with_a_picture_16_times_as_fine():
    fine = (torch.arange(32 * 16) + 0.5) / 16 - 0.5
    for z, half in enumerate((5.0, 8.0)):
        cx, cy = 13.37, 30.81                                                  # hangs over the lower border
        got = toy.draw_shapes(torch.tensor([half]), torch.tensor([[cx, cy]]), 32)[0]
        x, y = ((fine - cx + 16) % 32 - 16)[None, :], ((fine - cy + 16) % 32 - 16)[:, None]
        inside = [x * x + y * y < half**2, (x.abs() < 0.95 * half) & (y.abs() < 0.95 * half),
                  (y < 0.7 * half) & (0.75**0.5 * x.abs() - y / 2 < 0.7 * half),
                  ((x.abs() < 1.2 * half) & (y.abs() < 0.4 * half)) | ((y.abs() < 1.2 * half) & (x.abs() < 0.4 * half))]
        want = F.avg_pool2d(torch.stack(inside)[:, None].float(), 16)[:, 0]
        assert (got - want).abs().amax() < 0.4                                 # a pixel on a sharp corner
        assert ((got - want).abs().sum((1, 2)) < 0.03 * want.sum((1, 2))).all()
        assert 0.6 < got.sum((1, 2)).min() / got.sum((1, 2)).max()             # comparable areas


def test_clips_lie_in_range_and_live_on_a_torus():
    clips, captions, specs = toy.make_batch(64, 33, seeded())
    assert clips.shape == (64, 3, 33, 32, 32) and clips.dtype == torch.float32 and specs.shape == (64, 1, 5)
    assert len(captions) == 64 and clips.amin() == -1 and clips.amax() <= 1 and clips.amax() > 0.99
    assert torch.equal(clips[:, :, 0], clips[:, :, 32])                        # once, or twice, around
    moved = toy.render(specs, torch.tensor([[[3.25, 30.5]]]).expand(64, 1, 2), 2)
    there = toy.render(specs, torch.tensor([[[19.25, 14.5]]]).expand(64, 1, 2), 2)
    assert torch.allclose(moved.roll((16, -16), (4, 3)), there, atol=1e-5)


def test_the_frame_after_is_the_frame_drawn_one_step_further():
    for spec in ALL[::7]:
        dx, dy = list(toy.DIRECTIONS.values())[spec[2]]
        v = 1 + int(spec[3])
        a, b = clip_of(spec.tolist(), 4, (9.6, 21.1)), clip_of(spec.tolist(), 1, (9.6 + 3 * v * dx, 21.1 + 3 * v * dy))
        assert torch.allclose(a[:, 3], b[:, 0], atol=1e-5)


def test_the_first_object_lies_on_top():
    clip = clip_of([(0, 1, 0, 0, 0), (2, 0, 1, 0, 0)], 1, ((10.0, 10.0), (12.0, 10.0)))
    assert clip[:, 0, 10, 12].tolist() == [1, -1, -1] and clip[:, 0, 10, 16].tolist() == [-1, -1, 1]


@pytest.mark.parametrize("frames", [1, 7, 16, 40])
def test_two_objects_are_half_the_torus_apart_in_the_middle_of_a_clip(frames):
    specs = toy.random_specs(200, seeded(1), 2)
    specs[100:] = specs[:100].flip(1)                                                      # the same pairs, named the other way round
    places = toy.random_starts(specs, frames, seeded(2)).double()                          # (b, k, 2)
    ways = toy.STEPS[specs[..., 2], specs[..., 3]]                                         # (b, k, 2)

    def away(b, t, second):                                                    # by hand: across the torus, at the moment t
        return [((second[i] - places[b, 0, i] + t * (ways[b, 1, i] - ways[b, 0, i])).item() + 16) % 32 - 16 for i in (0, 1)]

    def least(b, second):
        return min(math.hypot(*away(b, t, second)) for t in range(frames))

    def near(pair, wanted):
        return all(abs(abs(x) - w) < 1e-4 for x, w in zip(pair, wanted))
    halves, met, moments = ((16, 16), (16, 0), (0, 16)), set(), set()
    for b in range(200):
        middle = [t for t in ([(frames - 1) / 2] if frames < 32 else range(32)) if any(near(away(b, t, places[b, 1]), half) for half in halves)]
        assert middle, f"pair {b} is never half the torus apart"
        half = next(half for half in halves if near(away(b, middle[0], places[b, 1]), half))
        met.add(half)
        moments.add(middle[0])
        others = [places[b, 0] + torch.tensor(h) - middle[0] * (ways[b, 1] - ways[b, 0]) for h in halves]
        assert abs(least(b, places[b, 1]) - max(least(b, other) for other in others)) < 1e-4
        assert abs(least(b, places[b, 1]) - least((b + 100) % 200, places[(b + 100) % 200, 1])) < 1e-4
    assert len(met) == (1 if frames == 1 else 3) and len(moments) > 5 * (frames >= 32)
    for b in range(3 if frames < 32 else 0):                                   # at any of 1024 places they would be hardly farther apart
        best = max(least(b, places[b, 0] + torch.tensor([dx, dy])) for dx in range(32) for dy in range(32))
        assert least(b, places[b, 1]) > best - 2.4
    assert min(least(b, places[b, 1]) for b in range(200)) > (7 if frames <= 16 else 4)
    assert places.min() >= 0 and places.max() < 32 and places[:, 0].std(0).min() > 5


def test_training_names_every_speed_as_the_sampler_does():
    words = {"slowly", "slow", "quickly", "fast"}
    for speeds in (True, False):
        captions = toy.make_batch(60, 16, seeded(), objects=2, speeds=speeds)[1]
        assert all(words & set(thing.split()) for text in captions for thing in text.split(" and a ")) is speeds
    for objects in (1, 2):
        text = toy.training_batch(1201, 2000, 0, objects)[1]                   # 16 frames
        named = [sum(toy.VOCABULARY[i - 1] in words for i in row if i > 0) for row in text.tolist()]
        assert named.count(objects) > 8 and set(named) <= {0, objects}         # 0: the captions that are taken away
    assert not any(words & set(text.split()) for text in toy.make_batch(60, 1, seeded(), speeds=True)[1])      # a picture moves at none


@pytest.mark.parametrize("objects", [1, 2])
def test_all_chance_comes_from_the_generator(objects):
    a, b, c = (toy.make_batch(8, 4, seeded(s), objects=objects) for s in (3, 3, 4))
    assert torch.equal(a[0], b[0]) and a[1] == b[1] and torch.equal(a[2], b[2])
    assert not torch.equal(a[0], c[0]) and a[1] != c[1]


def test_a_tenth_is_held_out_and_every_pair_is_met():
    out = toy.held_out(ALL)
    triples, seen = torch.unique(ALL[out][:, :3], dim=0), ALL[~out]
    assert len(triples) == 19
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert len(torch.unique(seen[:, [i, j]], dim=0)) == len(torch.unique(ALL[:, [i, j]], dim=0))
    for column in range(3):                                                    # nothing is left out of the exam
        assert len(triples[:, column].unique()) == len(ALL[:, column].unique())
    for objects in (1, 2):
        for flag in (False, True):
            specs = toy.random_specs(3000, seeded(), objects, held_out_only=flag)
            assert (toy.held_out(specs) == flag).all()
            assert len(torch.unique(specs[:, 0, :3], dim=0)) == (19 if flag else 173)
            if objects == 2:
                assert (specs[:, 0, 0] != specs[:, 1, 0]).all() and (specs[..., 4] == 0).all()


# ---- captions ------------------------------------------------------------------------------------

def test_captions_read_back_as_what_they_were_made_from():
    g, said, unsaid = seeded(), set(), set()
    for spec in torch.cat([ALL, ALL, ALL]):
        for still in (False, True):
            text = toy.caption(spec[None], g, still)
            (thing,) = ruler.parse(text)
            said |= set(sample.words(text))
            for column, (attribute, table) in enumerate(toy.ATTRIBUTES.items()):
                motion = attribute in ("direction", "speed")
                if thing[attribute] is None:
                    assert attribute in ("size", "speed") or still and motion, text
                    unsaid.add(attribute)
                else:
                    assert thing[attribute] == table[spec[column]] and not (still and motion), text
    assert unsaid == {"size", "speed", "direction"}
    for a, b in zip(*toy.random_specs(200, seeded(), 2).unbind(1), strict=True):
        text = toy.caption(torch.stack([a, b]), g)
        said |= set(sample.words(text))
        for spec, thing in zip((a, b), ruler.parse(text), strict=True):
            assert [thing[x] for x in ("colour", "shape", "direction")] == [
                toy.ATTRIBUTES[x][spec[i]] for i, x in enumerate(("colour", "shape", "direction"))]
    assert said == set(toy.VOCABULARY) and len(said) < 50


def test_plain_captions_and_the_readme_example():
    assert toy.caption(torch.tensor([[0, 0, 1, 0, 0]]), plain=True) == "a small red circle moving slowly left"
    assert toy.caption(torch.tensor([[0, 0, 1, 0, 0]]), plain=True, still=True) == "a small red circle"
    g = seeded()
    assert any(toy.caption(torch.tensor([[0, 0, 0, 0, 0]]), g) == "a red circle moving right" for _ in range(500))


@pytest.mark.parametrize("text, says", [
    ("a circle moving left", "no colour"), ("a red thing", "no shape"), ("", "empty"),
    ("a red blue circle", "red and blue"), ("a red circle square", "circle and square"),
    ("a red circle moving left right", "left-right"), ("a small big red circle", "small and large"),
    ("a slow red circle moving fast up", "slowly and quickly"), ("a red circle and a red square", "different colours"),
    ("a red circle and a blue circle and a green circle", "3 objects"),
    ("a red circle and blue square", "red and blue")])
def test_captions_that_cannot_be_judged_say_why(text, says):
    with pytest.raises(ValueError, match=says):
        ruler.parse(text)


def test_wrong_arguments_say_what_to_do():
    specs, starts = torch.zeros(2, 1, 5, dtype=torch.long), torch.zeros(2, 1, 2)
    for call in (lambda: toy.render(specs[:, 0], starts, 4), lambda: toy.render(specs, starts, 0),
                 lambda: toy.render(specs, starts, 4, size=16), lambda: toy.random_specs(2, seeded(), objects=3),
                 lambda: ruler.judge(torch.zeros(2, 3, 4, 32, 32), ["a red circle"]),
                 lambda: ruler.judge(torch.zeros(3, 4, 32, 31), "a red circle"), lambda: ruler.summary([])):
        with pytest.raises(ValueError):
            call()


# ---- the judge accepts ---------------------------------------------------------------------------

@pytest.mark.parametrize("objects, frames, n", [(1, 1, 800), (1, 4, 500), (1, 16, 500), (1, 64, 60),
                                                (2, 1, 300), (2, 4, 200), (2, 16, 250), (2, 64, 50)])
def test_real_clips_score_100_percent(objects, frames, n):
    clips, captions, _ = toy.make_batch(n, frames, seeded(frames), objects=objects)
    result = ruler.summary(records := ruler.judge(clips, captions))
    assert result["joint"] == 1, [(c, r["why"]) for c, r in zip(captions, records, strict=True) if not r["ok"]][:3]
    assert result["flicker"] < 0.01 and result["area_drift"] < 0.01 and result["colour_drift"] < 0.01
    assert min(r["overlap"] for r in records) > 0.93                           # far from the limit


def test_every_single_combination_is_read_with_a_wide_margin():
    clips = toy.render(ALL[:, None], toy.random_starts(ALL[:, None], 3, seeded()), 3)
    assert ruler.summary(ruler.judge(clips, [toy.caption(s[None], plain=True) for s in ALL]))["joint"] == 1
    centre = torch.rand(200, 2, generator=seeded()) * 32
    for z, half in enumerate(toy.HALF):
        ideal = ruler.soft(toy.draw_shapes(half.expand(200), centre, 32))
        for shape in range(4):
            scores = ruler.match(ideal[:, shape], ideal[:, shape], ruler.locate(ideal[:, shape]))
            own = scores[:, 4 * z + shape].clone()
            scores[:, 4 * z + shape] = 0
            assert (own - scores.amax(1)).amin() > 0.1


def test_small_noise_and_dim_captions_are_no_offence():
    g = seeded(5)
    clips, captions, _ = toy.make_batch(150, 16, g)
    noisy = clips + 0.05 * torch.randn(clips.shape, generator=g)
    assert ruler.summary(ruler.judge(noisy, captions))["joint"] == 1
    clips, captions, _ = toy.make_batch(60, 16, g, objects=2)
    assert ruler.summary(ruler.judge(clips + 0.05 * torch.randn(clips.shape, generator=g), captions))["joint"] == 1


def test_a_minute_is_judged_second_by_second():
    spec = torch.tensor([[[0, 0, 0, 0, 0]]])
    clip = toy.render(spec, torch.tensor([[[3.0, 4.0]]]), 1088)[0]
    assert ruler.judge(clip, "a red circle moving right")["ok"]
    clip[:, 500] = -1
    record = ruler.judge(clip, "a red circle moving right")
    seconds = record["good"].view(-1, 16).all(1)
    assert not record["ok"] and not seconds[500 // 16] and seconds.sum() == 67


def test_an_evaluation_tells_the_model_every_speed_and_judges_it(monkeypatch):
    def draw(model, text, shape, *, seed, **options):       # a sampler that has learnt all, but moves slowly unless told otherwise
        told = [" ".join(toy.VOCABULARY[i - 1] for i in row if i) for row in text.tolist()]
        heard.extend(told)
        specs = torch.tensor([[[names.index(thing[a] or names[0]) for a, names in toy.ATTRIBUTES.items()] for thing in ruler.parse(words)] for words in told])
        if asleep:
            specs[..., 3] = 0
        return toy.render(specs, toy.random_starts(specs, shape[0], torch.Generator().manual_seed(seed)), shape[0])
    monkeypatch.setattr(sample, "sample", draw)
    model, asleep, heard = SimpleNamespace(vocabulary=list(toy.VOCABULARY), choices=toy.SAMPLING["choices"]), False, []
    assert ruler.score(model, 40, 16, {}, objects=2)[1]["joint"] == 1
    assert all(thing["speed"] for words in heard for thing in ruler.parse(words))
    asleep, heard = True, []
    records, result = ruler.score(model, 40, 16, {}, objects=2)
    both_slow = sum(all(thing["speed"] == "slowly" for thing in ruler.parse(words)) for words in heard)
    assert result["joint"] == both_slow / 40 < 0.5          # what was added is held against the clip, too
    for frames, named in ((16, True), (1, False)):          # a picture moves at no speed
        heard = []
        assert ruler.score(model, 40, frames, {}, objects=1)[1]["joint"] == (1 if frames == 1 else sum(ruler.parse(words)[0]["speed"] == "slowly" for words in heard) / 40)
        assert all(bool(ruler.parse(words)[0]["speed"]) is named for words in heard)


# ---- the judge refuses ---------------------------------------------------------------------------

@pytest.mark.parametrize("column, attribute", enumerate(toy.ATTRIBUTES))
def test_one_wrong_attribute_is_the_one_that_fails(column, attribute):
    g = seeded(column)
    specs = toy.random_specs(60, g)
    other = specs.clone()
    count = len(toy.ATTRIBUTES[attribute])
    other[:, 0, column] = (specs[:, 0, column] + torch.randint(1, count, (60,), generator=g)) % count
    clips = toy.render(other, toy.random_starts(other, 16, g), 16)
    for clip, spec, o in zip(clips, specs, other, strict=True):
        record = ruler.judge(clip, toy.caption(spec, plain=True))
        assert failed(record) == {attribute} and not record["ok"]
        assert f"{attribute}: {toy.ATTRIBUTES[attribute][o[0, column]]}" in record["why"]
        unnamed = ruler.judge(clip, toy.caption(o, plain=True, still=True))      # what is not named cannot fail
        assert unnamed["ok"] and unnamed["direction_ok"] is None


def squeeze(clip, factor):
    """Scale along x about the middle: the object becomes an egg."""
    x, y = torch.meshgrid(torch.linspace(-1, 1, 32) / factor, torch.linspace(-1, 1, 32), indexing="xy")
    grid = torch.stack([x, y], -1).expand(clip.shape[1], -1, -1, -1)
    return F.grid_sample(clip.transpose(0, 1), grid, align_corners=True, padding_mode="border").transpose(0, 1)


def still_of(spec, frames=16):
    return clip_of(spec, 1).expand(-1, frames, -1, -1).clone()


@pytest.mark.parametrize("spec", SPECS)
def test_spoiled_clips_are_refused_and_say_why(spec):
    text, clip, g = toy.caption(torch.tensor([spec]), plain=True), clip_of(spec), seeded()
    here, drawing = clip_of(spec, 16, (16.0, 16.0)), toy.caption(torch.tensor([spec]), plain=True, still=True)
    standing = still_of(spec)
    assert ruler.judge(clip, text)["ok"] and ruler.judge(standing, drawing)["ok"]

    def refused(broken, what, words=text):
        record = ruler.judge(broken, words)
        assert not record["ok"] and what <= failed(record) and record["why"], (what, record["why"])
        assert all(f"{name}:" in record["why"] for name in failed(record))
        return failed(record)

    refused(clip[:, torch.randperm(16, generator=g)], {"direction", "steady"})
    refused(clip[:, :1].expand_as(clip), {"direction"})
    assert refused(clip.flip(1), {"direction"}) == {"direction"}
    jump = torch.cat([clip[:, :8], clip[:, 8:].roll(6, 3)], 1)
    refused(jump, {"direction", "steady"})
    cut = standing.clone()
    cut[:, :, 13:15] = -1
    refused(cut, {"one_object", "overlap"}, drawing)
    late = clip.clone()                                                        # a single frame is enough
    late[:, 9] = late[:, 9].maximum(clip_of((spec[0], 0, *spec[2:4], 0), 16, (31.3, 30.8))[:, 9])
    refused(late, {"one_object"})
    speck = standing.clone()
    speck[:, 5, 1, 1:3] = 0.0
    assert refused(speck, {"one_object"}, drawing) == {"one_object"}
    fading = (clip + 1) * torch.linspace(1, 0, 16)[:, None, None] - 1
    refused(fading, {"overlap", "steady", "one_object"})
    refused((clip + 1) * 0.7 - 1, {"overlap"})
    blurred = F.avg_pool2d(F.pad(clip, (2, 2, 2, 2), mode="circular"), 5, 1)
    refused(blurred, {"overlap"})
    refused(squeeze(standing, 1.3), {"overlap"}, drawing)
    refused((clip + 0.5 * torch.randn(clip.shape, generator=g)).clamp(-1, 1), {"one_object", "overlap"})
    refused(torch.randn(clip.shape, generator=g), {"overlap", "steady", "direction"})     # noise hangs together
    refused(torch.full_like(clip, -1.0), {"one_object", "colour", "shape", "overlap", "direction", "size"})
    refused(torch.ones_like(clip), {"colour", "overlap"})
    nan = clip.clone()
    nan[0, 3, 0, 0] = float("nan")
    assert refused(nan, {"finite"}) == {"finite"}
    refused(torch.full_like(clip, float("nan")), {"finite"})
    change = clip.clone()                                                      # wrong in one frame only
    other = (spec[0], (spec[1] + 1) % 4, *spec[2:])
    change[:, 7] = clip_of(other)[:, 7]
    assert {"shape", "steady"} <= refused(change, {"shape"})
    change[:, 7] = clip_of(((spec[0] + 1) % 6, *spec[1:]))[:, 7]
    refused(change, {"colour"})
    half = here.clone()                                                        # one half in another colour
    half[:, :, :, 16:] = clip_of(((spec[0] + 1) % 6, *spec[1:]), 16, (16.0, 16.0))[:, :, :, 16:]
    refused(half, {"overlap"})
    grown = torch.cat([still_of((*spec[:4], 0), 8), still_of((*spec[:4], 1), 8)], 1)
    refused(grown, {"steady", "size"}, drawing.replace("small", "large"))


def test_each_rule_of_the_judge_is_needed():
    """Clips that only a single rule can refuse."""
    wobbling = clip_of((0, 0, 0, 0, 0))
    wobbling[:, 8:] = wobbling[:, 8:].roll(1, 3)                               # one pixel aside, once
    assert failed(ruler.judge(wobbling, "a red circle")) == {"steady"}
    half = torch.tensor([5.2] * 12 + [4.7] * 4)                                # each alone is near enough to 5
    disc = toy.draw_shapes(half, torch.tensor([[16.0, 16.0]]).expand(16, 2), 32)[:, 0]
    breathing = torch.stack([2 * disc - 1, -torch.ones_like(disc), -torch.ones_like(disc)])
    assert failed(ruler.judge(breathing, "a red circle")) == {"steady"}
    for colour in (1, 5):                                                      # stuck on: one piece, red is whole
        patch = still_of((0, 1, 0, 0, 0))
        patch[:, :, 11:20, 20:24] = (2 * toy.RGB[colour] - 1)[:, None, None, None]
        assert failed(ruler.judge(patch, "a red square")) == {"overlap"}
    turning = still_of((0, 0, 0, 0, 1))                                        # three quarters of it green, once
    turning[:, 7, :, 11:] = clip_of((1, 0, 0, 0, 1))[:, 0, :, 11:]
    assert "colour" in failed(ruler.judge(turning, "a red circle"))
    lone = still_of((0, 0, 0, 0, 0))
    lone[:, :, 0, 0] = 1.0                                                     # one pixel is not an object
    assert ruler.judge(lone, "a red circle")["ok"]
    bright = still_of((0, 0, 0, 0, 0))
    bright = torch.where(bright > 0, 3.0, bright)                              # out of range, but clear
    assert ruler.judge(bright, "a red circle")["overlap"] > 0.9
    mixed = still_of((3, 0, 0, 0, 0))
    mixed[1] = (mixed[1] + 1) * 0.5 - 1                                        # orange is neither red nor yellow
    assert not ruler.judge(mixed, "a red circle")["ok"] and not ruler.judge(mixed, "a yellow circle")["ok"]
    assert failed(ruler.judge(still_of((0, 0, 0, 0, 0)), "a red circle moving left")) == {"direction"}


@pytest.mark.parametrize("x, y, ok", [(1, 0, True), (1.15, -0.15, True), (0.6, 0, False), (1.4, 0, False), (1, 0.4, False)])
def test_a_pace_that_only_rounds_to_the_captions_is_another(x, y, ok):
    spec = torch.tensor([[[0, 0, 0, 0, 1]]])
    clip = torch.cat([toy.render(spec, torch.tensor([[[5.0 + x * i, 5.0 + y * i]]]), 1)[0] for i in range(16)], 1)
    assert failed(ruler.judge(clip, "a red circle moving right slowly")) == (set() if ok else {"direction", "speed"})


def test_two_objects_bind_to_their_own_words():
    g = seeded(1)
    specs = toy.random_specs(60, g, 2)
    specs[:, 1, 1] = (specs[:, 0, 1] + 1) % 4
    specs[:, 1, 2] = specs[:, 0, 2] ^ 1                                        # opposite ways
    starts = toy.random_starts(specs, 16, g)
    clips, texts = toy.render(specs, starts, 16), [toy.caption(s, plain=True) for s in specs]
    assert ruler.summary(ruler.judge(clips, texts))["joint"] == 1
    for column, attribute in ((0, "shape"), (1, "shape"), (2, "direction")):   # swap one attribute between the two
        swapped = specs.clone()
        swapped[:, :, column] = specs.flip(1)[:, :, column]
        for record in ruler.judge(toy.render(swapped, starts, 16), texts):
            assert not record["ok"] and record[f"{attribute}_ok"] is False, record["why"]
            assert record["colour_ok"]
    recoloured = specs.clone()
    recoloured[:, 1, 0] = torch.tensor([next(c for c in range(6) if c not in s) for s in specs[:, :, 0].tolist()])
    assert all(failed(r) == {"colour"} for r in ruler.judge(toy.render(recoloured, starts, 16), texts))


def test_two_objects_and_what_does_not_belong():
    text = "a red circle moving left and a blue square moving right"
    specs, starts = [(0, 0, 1, 0, 0), (2, 1, 0, 0, 0)], ((8.0, 7.0), (20.0, 7.0))          # they meet
    clip = clip_of(specs, 32, starts)
    assert ruler.judge(clip, text)["ok"]
    assert ruler.judge(clip, "a blue square moving right and a red circle moving left")["ok"]
    assert not ruler.judge(clip, "a blue circle moving left and a red square moving right")["ok"]
    assert not ruler.judge(clip, "a red circle moving left")["ok"]
    assert not ruler.judge(clip_of(specs[0], 32), text)["ok"]
    third = clip.maximum(clip_of((1, 0, 1, 0, 0), 32, (8.0, 23.0)))
    assert "one_object" in failed(ruler.judge(third, text))
    gone = clip.clone()                                                        # the square never comes back
    gone[2, 17:] = -1
    assert "one_object" in failed(ruler.judge(gone, text))
    gone = clip.clone()                                                        # or is lost behind the circle
    gone[2, 22:] = -1
    assert failed(ruler.judge(gone, text)) == {"overlap"}
    gone = clip.clone()                                                        # or blinks while alone
    gone[2, 0] = -1
    assert not ruler.judge(gone, text)["ok"]
    ghost = clip.clone()                                                       # a third one, only while they meet
    ghost[:, 10] = third[:, 10]
    assert "overlap" in failed(ruler.judge(ghost, text))
    ghost = clip.clone()                                                       # or two specks
    ghost[:, 10, 20, 3:5] = ghost[:, 10, 25, 3:5] = 0.0
    assert failed(ruler.judge(ghost, text)) == {"one_object"}
    stuck = clip_of(specs, 1, ((14.0, 16.0), (19.0, 16.0))).expand(-1, 16, -1, -1)         # never apart
    assert not ruler.judge(stuck, text)["ok"]


def test_summary_counts_only_what_was_named():
    clips, _, _ = toy.make_batch(2, 4, seeded())
    records = ruler.judge(clips.clamp(max=-1), ["a red circle", "a small red circle"])
    result = ruler.summary(records)
    assert result["joint"] == 0 and result["size_ok"] == 0 and result["direction_ok"] is None and result["n"] == 2
    assert ruler.wilson(0, 10)[0] == pytest.approx(0) and ruler.wilson(10, 10)[1] == pytest.approx(1)
    assert ruler.wilson(95, 100) == pytest.approx((0.888, 0.978), abs=1e-3)


# ---- training ------------------------------------------------------------------------------------

SMALL = (toy.Stage(1, 4, 0.2), toy.Stage(4, 2, 0.3), toy.Stage(8, 2, 0.5))
# The command line with small stages, in a process of its own that can be killed.
COMMAND = ("import sys, torch, train_tiny as t; torch.set_num_threads(1); t.STAGES = (t.Stage(1, 4, 0.2), t.Stage(4, 2, 0.3), "
           "t.Stage(8, 2, 0.3), t.Stage(8, 1, 0.2)); sys.exit(t.main(sys.argv[1:]))")


def command(*args, **kwargs):
    return popen([sys.executable, "-c", COMMAND, *map(str, args)], cwd=ROOT, text=True,
                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(toy, "STAGES", SMALL)
    monkeypatch.setattr(toy, "SAMPLING", {**toy.SAMPLING, "steps": 1})
    torch.set_num_threads(1)


def test_stages_follow_their_shares_and_pictures_are_mixed_in(small):
    assert [toy.stage_at(step, 10).frames for step in range(10)] == [1, 1, 4, 4, 4, 8, 8, 8, 8, 8]
    frames = [toy.training_batch(step, 40, seed=0)[0].shape[2] for step in range(40)]
    assert frames[:8] == [1] * 8 and all((f == 1) == (step < 8 or step % toy.IMAGES_EVERY == 0) for step, f in enumerate(frames))
    assert [toy.stage_at(step, 16, shortest=4).frames for step in range(16)] == [4] * 6 + [8] * 10
    frames = [toy.training_batch(step, 32, 0, shortest=4)[0].shape[2] for step in range(32)]
    assert frames == [1 if step % toy.IMAGES_EVERY == 0 else 4 if step < 12 else 8 for step in range(32)]      # no stage of pictures, but pictures


def test_every_second_step_of_a_long_stage_goes_back_to_sixteen_frames(monkeypatch):
    assert abs(sum(stage.share for stage in toy.STAGES) - 1) < 1e-9 and [stage.frames for stage in toy.STAGES] == [1, 4, 16, 16, 64, 256]
    monkeypatch.setattr(toy, "STAGES", (toy.Stage(1, 4, 0.2), toy.Stage(4, 2, 0.2), toy.Stage(16, 2, 0.2), toy.Stage(20, 1, 0.2), toy.Stage(24, 1, 0.2)))
    frames = [toy.training_batch(step, 80, seed=0)[0].shape[2] for step in range(80)]
    assert frames[48:64] == [1, 16, 20, 16, 20, 16, 20, 16] * 2 and frames[64:] == [1, 16, 24, 16, 24, 16, 24, 16] * 2
    assert set(frames[32:48]) == {1, 16}


@pytest.mark.parametrize("objects", [1, 2])
def test_the_world_is_small_first_and_never_for_two_objects(objects):
    for stage in toy.STAGES:        # all stages cost about the same: as many tokens
        assert 0.7 < stage.batch * max(4, stage.frames) * stage.size**2 / (16 * 16 * 32**2) < 1.05
    for step in range(12, 2400, 123):
        stage, two = toy.shown_at(step, 2400), objects == 2 and step % toy.ONE_EVERY > 0
        clips = toy.training_batch(step, 2400, 0, objects)[0]
        assert clips.shape[2] == stage.frames and clips.shape[3] == clips.shape[4] == (32 if two else stage.size)
        assert 0.9 < clips[:, 0].numel() / (stage.batch * stage.frames * stage.size**2) <= 1
    assert {stage.size for stage in toy.STAGES if stage.frames > 16} == {32} and toy.shown_at(2399, 2400).size == 32


def test_training_shows_most_what_is_hard_and_the_judge_asks_all_alike():
    for objects in (1, 2):
        for practice, cross, small in ((False, 1 / 4, 1 / 2), (True, 3 / 6.5, toy.SMALL)):
            specs = toy.random_specs(4000, seeded(), objects, practice=practice)
            shares = [(specs[:, :, 1] == i).double().mean(0).tolist() for i in range(4)]           # (4, objects)
            assert shares[3] == pytest.approx([cross] * objects, abs=0.03) and shares[0] == pytest.approx(shares[1], abs=0.03)
            assert objects == 2 or (specs[..., 4] == 0).double().mean().item() == pytest.approx(small, abs=0.03)
            assert not toy.held_out(specs).any() and (objects == 1 or (specs[:, 0, 0] != specs[:, 1, 0]).all())
    drawn, make = [], toy.make_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "make_batch", lambda *args, **kwargs: drawn.append(make(*args, **kwargs)) or drawn[-1])
        for step in range(1200, 1280):
            toy.training_batch(step, 2400, 0)
    specs = torch.cat([specs[:, 0] for _, _, specs in drawn])
    assert (specs[:, 1] == 3).double().mean().item() == pytest.approx(3 / 6.5, abs=0.04)
    assert (specs[:, 4] == 0).double().mean().item() == pytest.approx(toy.SMALL, abs=0.04)


def test_a_step_makes_its_own_data(small):
    one, again, other = (toy.training_batch(step, 10, seed=3) for step in (7, 7, 6))
    assert all(torch.equal(a, b) for a, b in zip(one, again))
    assert not torch.equal(one[3], other[3])
    assert not torch.equal(one[3], toy.training_batch(7, 10, seed=4)[3])


def test_training_never_shows_what_is_held_out_and_sometimes_hides_the_caption(small):
    empty = words = captions = told = 0
    tables = list(toy.ATTRIBUTES.values())[:3]
    for step in range(0, 200):
        clips, text, t, noise, earlier, before = toy.training_batch(step, 200, seed=1, objects=1 + step % 2)
        for row in text[(text > 0).any(1)].tolist() if len(clips[0, 0]) > 1 else ():
            for thing in ruler.parse(" ".join(toy.VOCABULARY[i - 1] for i in row if i)):
                triple = [table.index(thing[name]) for name, table in zip(toy.ATTRIBUTES, tables)]
                told += 1
                assert not toy.held_out(torch.tensor([*triple, 0, 0])), thing
        if step % 2:
            continue
        empty += int((text == 0).all(1).sum())
        words, captions = words + int((text > 0).sum()), captions + int((text > 0).any(1).sum())
        assert clips.shape == noise.shape and len(t) == len(clips) and ((t > 0) & (t < 1)).all()
    assert told > 300
    assert 0.03 < empty / (captions + empty) < 0.08                 # a twentieth
    assert 5.0 < words / captions < 6.2                             # those that are left keep all their words


def test_times_move_to_the_noise_as_clips_grow(monkeypatch):
    share = (toy.draw_times(4000, 16, seeded()) > 0.8).float().mean()
    assert share == pytest.approx(0.05, abs=0.01)     # a quarter of the times may be any, few of the others are late
    monkeypatch.setattr(toy, "ANY_TIME", 0)
    logit = lambda frames: torch.logit(toy.draw_times(4000, frames, seeded())).median().item()
    assert logit(16) == pytest.approx(-2, abs=0.08) and logit(4) == pytest.approx(-1.307, abs=0.08)
    assert logit(32) == logit(64) == logit(256) == pytest.approx(-2.347, abs=0.08)      # the noise repeats after 32 frames
    monkeypatch.setattr(toy, "PERIOD", 0)
    assert logit(64) == pytest.approx(-2.693, abs=0.08)


def test_the_noise_of_long_clips_repeats_when_the_world_does(monkeypatch):
    for frames in (64, 48):
        monkeypatch.setattr(toy, "STAGES", (toy.Stage(frames, 2, 1.0),))
        monkeypatch.setattr(toy, "LONG_EVERY", 1)
        clips, text, t, noise, earlier, before = toy.training_batch(9, 10, seed=0)
        for of in (clips, before):              # the clips do so of themselves, and that is why
            assert of.shape[2] == frames and torch.equal(of[:, :, 32:], of[:, :, : frames - 32])
            assert not torch.equal(of[:, :, 1], of[:, :, 0])
        assert not torch.equal(noise, before)
    alike = []                                  # of the step's own noise a part does, any part
    monkeypatch.setattr(toy, "STAGES", (toy.Stage(64, 8, 1.0),))
    for step in range(1, 8):
        for noise in toy.training_batch(step, 10, seed=0)[3]:
            assert noise.std().item() == pytest.approx(1, abs=0.01)
            alike.append(torch.corrcoef(torch.stack([noise[:, :32].flatten(), noise[:, 32:].flatten()]))[0, 1].item())
    assert min(alike) < 0.1 and max(alike) > 0.9 and sum(alike) / len(alike) == pytest.approx(0.5, abs=0.1)
    for frames, period in ((32, 32), (64, 0)):  # nothing to repeat: noise drawn once, and the rest of the step as ever
        monkeypatch.setattr(toy, "STAGES", (toy.Stage(frames, 2, 1.0),))
        monkeypatch.setattr(toy, "PERIOD", period)
        noise, before = (toy.training_batch(9, 10, seed=0)[i] for i in (3, 5))
        drawn, white = [], sample.white_noise
        monkeypatch.setattr(sample, "white_noise", lambda *args: drawn.append(white(*args)) or drawn[-1])
        toy.training_batch(9, 10, seed=0)
        monkeypatch.setattr(sample, "white_noise", white)
        assert len(drawn) == 2 and torch.equal(noise, drawn[0]) and torch.equal(before, drawn[1])
    assert toy.SAMPLING["period"] == 32


def test_loss_is_that_of_the_predicted_clip(small):
    clips, text, t, noise, *_ = toy.training_batch(9, 10, seed=0)
    seen = {}

    def model(x, times, words):
        seen["x"] = x
        return torch.zeros_like(x)
    loss = toy.flow_matching_loss(model, clips, text, t, noise)
    odds = t.double() / (1 - t.double()) * (min(clips.shape[2], 32) / 16) ** 0.5      # of a clip of 16 frames that shows as much
    weight = 4 * odds / (1 + odds)                                      # (b,)
    assert loss == pytest.approx(math.log(2) * weight.mean().item(), rel=1e-5)     # grey everywhere, whatever the clip
    sure = toy.flow_matching_loss(lambda x, times, words: 0.9 * clips, clips, text, t, noise).item()
    p, y = (1 + 0.9 * clips.double()) / 2, (1 + clips.double()) / 2
    each = -(y * p.log() + (1 - y) * (1 - p).log()).flatten(1).mean(1)
    assert sure == pytest.approx((weight * each).mean().item(), rel=1e-4) and sure < 0.1
    torch.testing.assert_close(seen["x"][1], (1 - t[1]) * noise[1] + t[1] * clips[1])
    toy.flow_matching_loss(model, clips, text, t, noise, shown=-clips)
    torch.testing.assert_close(seen["x"][1], (1 - t[1]) * noise[1] - t[1] * clips[1])


def test_late_in_training_the_model_meets_its_own_predictions_of_earlier_times(small):
    own = later = 0
    for step in range(120):
        clips, _, t, noise, earlier, before = toy.training_batch(step, 120, seed=0)
        settled = 1 / (1 + math.exp(1.7 + 0.5 * math.log(min(clips.shape[2], 32) / 16)))
        some = earlier > 0
        assert before.shape == clips.shape and not torch.equal(before, noise) and ((earlier >= settled - 1e-6) & (earlier < t) | ~some).all()
        assert step >= 60 or not some.any()
        own, later = own + int(some.sum()), later + int((t > settled).sum() if step >= 60 else 0)
    assert own and own / later == pytest.approx(0.75, abs=0.15)


def test_a_step_trains_on_what_the_rehearsal_shows(small, monkeypatch):
    run = toy.Run(lingen.preset("tiny", vocab_size=len(toy.VOCABULARY)), dict(steps=10, seed=0, objects=1, rate=2e-3), torch.device("cpu"))
    loss, seen = toy.flow_matching_loss, []
    monkeypatch.setattr(toy, "rehearse", lambda model, clips, *rest: -clips)
    monkeypatch.setattr(toy, "flow_matching_loss", lambda model, clips, text, t, noise, shown: (
        seen.append(torch.equal(shown, -clips)) or loss(model, clips, text, t, noise, shown)))
    run.advance()
    assert seen == [True]


def test_rehearsal_shows_the_models_own_prediction_and_no_gradient_flows_through_it():
    clips, noise, text = torch.randn(3, 3, 4, 8, 8), torch.randn(3, 3, 4, 8, 8), torch.tensor([[1], [2], [3]])
    weight = torch.ones(1, requires_grad=True)
    model = lambda x, t, words: weight * (10 * words[:, 0].view(-1, 1, 1, 1, 1) + x)
    shown = toy.rehearse(model, clips, text, torch.tensor([0.0, 0.25, 0.0]), noise)
    assert not shown.requires_grad and torch.equal(shown[::2], clips[::2])
    torch.testing.assert_close(shown[1], 20 + 0.75 * noise[1] + 0.25 * clips[1])
    assert toy.rehearse(None, clips, text, torch.zeros(3), noise) is clips              # nothing to do costs nothing


def test_every_parameter_has_one_optimizer_and_the_average_follows(small):
    run = toy.Run(lingen.preset("tiny", vocab_size=len(toy.VOCABULARY)), dict(steps=10, seed=0, objects=1, rate=2e-3), torch.device("cpu"))
    owned = [id(p) for o in run.optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in run.model.parameters())
    before = {name: p.clone() for name, p in run.average.items()}
    run.advance()
    moved = run.model.state_dict()
    for name, average in run.average.items():
        torch.testing.assert_close(average, before[name] + 0.9 * (moved[name] - before[name]))


def test_muon_takes_the_steps_of_torchs_own(request):
    request.addfinalizer(lambda before=torch.get_float32_matmul_precision(): torch.set_float32_matmul_precision(before))
    torch.set_float32_matmul_precision("highest")                          # ours; training itself asks for less
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in ((24, 8), (8, 24), (24, 8), (16, 16), (5, 5))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in starts] for _ in range(2))
    optimizers = [toy.Muon(ours, lr=0.1, weight_decay=0.2), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")]
    for _ in range(3):
        for a, b in zip(ours[:-1], theirs[:-1]):
            a.grad = torch.randn(a.shape) * torch.linspace(0.1, 3, a.shape[1])
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, start in zip(ours, theirs, starts):
        assert (a - b).norm() <= 0.01 * (b - start).norm()                 # bfloat16, in which torch does it, has 8 bits
    assert torch.equal(ours[-1], starts[-1])                               # no gradient, no step


def test_learning_rate_warms_up_stays_and_falls_to_zero():
    rates = [toy.learning_rate(step, 1000, 1.0) for step in (0, 49, 300, 599, 800, 999)]
    assert rates == pytest.approx([0.02, 1, 1, 1, 0.5, 0.0025])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "stopped.pt"
    process = command("--steps", 5000, "--out", out, "--save-every", 0)
    for _ in range(600):
        if out.exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in said and "Traceback" not in said
    assert torch.load(out, weights_only=True)["training"]["step"] > 0


def test_nan_stops_with_the_step_and_the_module(small, tmp_path, capsys, monkeypatch):
    out = tmp_path / "nan.pt"
    assert toy.main(["--steps", "3", "--out", str(out)]) == 0
    good, init = out.read_bytes(), toy.Run.__init__

    def poisoned(self, *args):
        init(self, *args)
        with torch.no_grad():
            self.model.blocks[1].mlp[0].weight[0, 0] = float("nan")
    monkeypatch.setattr(toy.Run, "__init__", poisoned)
    monkeypatch.setattr(toy.Run, "restore", lambda self, checkpoint: None)
    assert toy.main(["--steps", "5", "--out", str(out), "--resume"]) == 1
    said = capsys.readouterr().err
    assert "step 0" in said and "blocks.1.mlp.0" in said and out.read_bytes() == good


def test_a_run_is_not_overwritten_nor_mixed_with_another(small, tmp_path, capsys):
    out = tmp_path / "run.pt"
    assert toy.main(["--steps", "2", "--out", str(out)]) == 0
    for args, says in ((["--steps", "2"], "--resume"), (["--steps", "1", "--resume"], "steps"), (["--steps", "2", "--seed", "1", "--resume"], "seed")):
        assert toy.main([*args, "--out", str(out)]) == 2
        assert says in capsys.readouterr().err
    assert toy.main(["--steps", "3", "--resume", "--out", str(out)]) == 0              # a finished run may be made longer
    assert torch.load(out, weights_only=True)["training"]["step"] == 3


def test_a_run_may_leave_out_the_stages_of_short_clips(small, tmp_path, capsys):
    out = tmp_path / "run.pt"
    assert toy.main(["--steps", "8", "--shortest", "4", "--out", str(out)]) == 0
    saved = torch.load(out, weights_only=True)
    assert [frames for frames, _ in saved["training"]["losses"]] == [1, 4, 4, 8, 8, 8, 8, 8] and saved["training"]["shortest"] == 4     # steps 0 and 8 are on pictures
    assert toy.main(["--steps", "10", "--resume", "--out", str(out)]) == 2 and "shortest: 4 there, 1 here" in capsys.readouterr().err
    assert toy.main(["--steps", "10", "--resume", "--shortest", "4", "--out", str(out)]) == 0
    assert [frames for frames, _ in torch.load(out, weights_only=True)["training"]["losses"]] == [1, 4, 4, 8, 8, 8, 8, 8, 1, 8]
    del saved["training"]["shortest"]                           # of a time that had all stages only
    torch.save(saved, out)
    assert toy.main(["--steps", "9", "--resume", "--out", str(out)]) == 0
    with pytest.raises(ValueError, match="no stage has clips of 9 frames or more; the longest has 8"):
        toy.stage_at(0, 10, shortest=9)


def test_a_run_can_begin_with_the_weights_of_another(small, tmp_path, capsys):
    first, second, other = (tmp_path / name for name in ("first.pt", "second.pt", "other.pt"))
    assert toy.main(["--steps", "2", "--out", str(first)]) == 0
    toy.publish(first, second)
    published = torch.load(second, weights_only=True)["weights"]
    args = dict(resume=False, device="cpu", steps=2, seed=1, objects=1, rate=2e-3, shortest=1, out=str(tmp_path / "run.pt"), weights=str(second))
    run, *_ = toy.begin(argparse.Namespace(**args))
    for name, p in run.model.state_dict().items():
        assert torch.equal(p, published[name].float()) and torch.equal(run.average[name], p)
    run.advance()
    old, new, mean = published["nothing"].float(), run.model.nothing, run.average["nothing"]
    assert run.step == 1 and not torch.equal(new, old) and torch.allclose(mean, old.lerp(new, 0.9)) and not torch.allclose(mean, new)
    strange = toy.Run(lingen.preset("tiny", vocab_size=len(toy.VOCABULARY), depth=1), dict(steps=2, seed=0, objects=1, rate=2e-3), torch.device("cpu"))
    toy.save(other, strange.state())
    for call, says in ((["--weights", str(other)], "another model"), (["--weights", "missing.pt"], "missing.pt"),
                       (["--weights", str(second), "--resume"], "leave out one")):
        assert toy.main([*call, "--steps", "2", "--out", str(tmp_path / "new.pt")]) == 2
        assert says in capsys.readouterr().err and not (tmp_path / "new.pt").exists()


def test_published_checkpoint_is_small_and_samples(small, tmp_path):
    out, small_file = tmp_path / "run.pt", tmp_path / "small.pt"
    assert toy.main(["--steps", "2", "--out", str(out)]) == 0
    assert out.with_suffix(".gif").exists()
    assert toy.main(["--publish", str(out), str(small_file)]) == 0
    assert small_file.stat().st_size < 5e6
    assert sample.main(["a red circle", "--checkpoint", str(small_file), "--frames", "4", "--out", str(tmp_path / "clip.npy")]) == 0
    assert toy.main(["--steps", "2", "--out", str(small_file), "--resume"]) == 2        # it lacks what training needs


def test_of_several_checkpoints_the_mean_is_published(small, tmp_path, capsys):
    paths = [tmp_path / name for name in ("one.pt", "two.pt", "mean.pt", "three.pt", "other.pt")]
    one, two, mean, three, other = map(str, paths)
    for seed, path in ((1, one), (2, two)):
        assert toy.main(["--steps", "1", "--seed", str(seed), "--out", path]) == 0
    assert toy.main(["--publish", one, two, mean]) == 0 == toy.main(["--publish", one, mean, two, three])
    weights = [sample.load_checkpoint(path)["weights"] for path in paths[:4]]
    for name, p in weights[2].items():
        assert p.dtype == torch.float16
        torch.testing.assert_close(p.float(), (weights[0][name] + weights[1][name]) / 2, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(weights[3][name].float(), (weights[0][name] + weights[1][name]) / 2, atol=2e-3, rtol=2e-3)
    found = sample.load_checkpoint(mean)
    assert found["training"]["seed"] == 2 and found["training"]["mean_of"] == [sample.load_checkpoint(path)["sha256"] for path in (one, two)]
    assert toy.main(["--publish", one, mean, mean]) == 2 and "made of itself" in capsys.readouterr().err and sample.load_checkpoint(mean)["sha256"] == found["sha256"]
    strange = toy.Run(lingen.preset("tiny", vocab_size=len(toy.VOCABULARY), depth=1), dict(steps=2, seed=0, objects=1, rate=2e-3), torch.device("cpu"))
    toy.save(other, strange.state())
    capsys.readouterr()
    for sources, says in (([other, two], "other.pt is of another model"), ([two, other], "two.pt is of another model"), ([two, "missing.pt"], "missing.pt")):
        assert toy.main(["--publish", *sources, str(tmp_path / "new.pt")]) == 2
        assert says in capsys.readouterr().err.replace("'", "") and not (tmp_path / "new.pt").exists()


def test_evaluation_prints_its_table(small, tmp_path, capsys):
    out = tmp_path / "run.pt"
    assert toy.main(["--steps", "1", "--out", str(out)]) == 0
    assert toy.main(["--evaluate", str(out), "--captions", "2", "--frames", "4", "--guidance", "2", "--views", "3"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("colour", "direction", "one object", "all right", "95 % interval", "held out", "flicker", "of 3 views, guidance 2.0"))


def test_examples_are_drawn(tmp_path):
    assert toy.main(["--examples", str(tmp_path / "examples.png")]) == 0
    assert (tmp_path / "examples.png").stat().st_size > 1000


@pytest.mark.parametrize("args, code, says", [
    (["--steps", "0"], 2, "--steps"), (["--steps", "many"], 2, "steps"), (["--rate", "nan"], 2, "--rate"), (["--objects", "3"], 2, "objects"),
    (["--seed", "-1"], 2, "--seed"), (["--evaluate", str(ROOT / "assets" / "tiny.pt"), "--guidance", "nan"], 2, "guidance is nan"),
    (["--evaluate", str(ROOT / "assets" / "tiny.pt"), "--views", "0"], 2, "views is 0"), (["--nonsense"], 2, "nonsense"), (["--evaluate", "missing.pt"], 2, "missing.pt"),
    (["--resume", "--out", "missing.pt"], 2, "missing.pt"), (["--publish", "a.pt"], 2, "2 arguments"), (["--shortest", "5"], 2, "choose from 1, 4, 16, 64, 256"), (["--device", "tpu"], 2, "device"), (["--publish", "missing.pt", "x.pt"], 2, "missing.pt"),
    (["--examples", "no/such/folder.png"], 2, "make it first"), (["--save-every", "-5"], 2, "--save-every")])
def test_wrong_calls_get_one_line(args, code, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert toy.main(args) == code
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said and said.startswith("train_tiny.py: error:") and not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch is built without torch.distributed")
def test_two_processes_follow_the_curve_of_one(tmp_path):
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    assert command("--steps", 6, "--out", one).wait(timeout=300) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rows = [command("--steps", 6, "--out", two, env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                                                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}) for rank in (0, 1)]
    assert [row.wait(timeout=300) for row in rows] == [0, 0], rows[0].stderr.read()
    curve = lambda path: [loss for _, loss in torch.load(path, weights_only=True)["training"]["losses"]]
    assert curve(two) == pytest.approx(curve(one), rel=1e-3)        # the last step has one clip: the second process waits


def test_more_processes_than_clips_are_refused_and_those_of_the_recipe_are_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "113")
    assert toy.main(["--steps", "1", "--out", str(tmp_path / "run.pt")]) == 2
    assert "113 processes, but no batch of more than 112 clips" in capsys.readouterr().err and not list(tmp_path.iterdir())
    run = toy.Run(lingen.preset("tiny", vocab_size=len(toy.VOCABULARY)), dict(steps=100, seed=0, objects=1, rate=2e-3), torch.device("cpu"))
    run.step, gathered = 98, []             # 256 frames, one clip
    monkeypatch.setattr(toy.distributed, "all_reduce", gathered.append)
    run.advance(rank=1, world=2)
    assert run.losses == [(256, 0.0)] and gathered[0].abs().max() == 0
    assert len(gathered[0]) == 1 + sum(p.numel() for p in run.model.parameters())


def test_a_bad_gradient_never_reaches_the_weights(small):
    run = toy.Run(lingen.preset("tiny", vocab_size=len(toy.VOCABULARY)), dict(steps=10, seed=0, objects=1, rate=2e-3), torch.device("cpu"))
    run.advance()
    before = {name: p.clone() for name, p in run.model.state_dict().items()}
    run.model.patch_out.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match="step 1: .*the backward pass"):
        run.advance()
    assert all(torch.equal(p, before[name]) for name, p in run.model.state_dict().items()) and run.step == 1


def test_preview_cannot_overwrite_the_checkpoint(small, tmp_path, capsys):
    assert toy.main(["--steps", "1", "--out", str(tmp_path / "run.gif")]) == 2
    assert ".gif" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_shipped_checkpoint_draws_what_it_is_told():
    """Colour, size and shape of a few captions, by the judge; how often all is right stands in the README."""
    model, checkpoint = sample.load_model(ROOT / "assets" / "tiny.pt")
    captions = ["a small red circle moving slowly right", "a large blue square moving up quickly", "a small green triangle moving left",
                "a large yellow cross moving slowly down and right"]
    clips = sample.sample(model, sample.encode(captions, checkpoint["vocabulary"]), (16, 32, 32), seed=0,
                          **sample.steps_for(checkpoint["sampling"]))
    records = ruler.judge(clips, captions)
    assert all(record["colour_ok"] and record["finite"] for record in records)
    right = [all(record[name] is not False for name in ("shape_ok", "size_ok", "one_object", "direction_ok", "speed_ok")) for record in records]
    assert sum(right) >= 3, right
