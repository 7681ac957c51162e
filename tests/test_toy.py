"""The toy world, and its judge: right clips are right, and each way to be wrong is told."""

import pytest
import torch

from toy import shapes
from toy.judge import interval, judge, seconds, summary

EVERY = torch.cartesian_prod(torch.arange(6), torch.arange(4), torch.arange(8))  # all 192 specs
SOME = EVERY[::5]  # 39 of them, with all colours, shapes and directions
CHECKS = ("colour", "shape", "direction", "one_object", "lenient", "strict")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_starts(n, size=24):
    return size * torch.rand(n, 2, generator=seeded(1))


def test_a_tenth_is_held_out_and_training_meets_every_pair():
    trained = shapes.random_specs(5000, seeded()).unique(dim=0)
    tested = shapes.random_specs(5000, seeded(), held_out_only=True).unique(dim=0)
    assert (len(trained), len(tested)) == (173, 19)
    assert not shapes.random_specs(99, seeded(), n_shapes=1)[:, 1].any()  # circles
    assert shapes.held_out(tested).all() and not shapes.held_out(trained).any()
    for pair, number in (([0, 1], 24), ([0, 2], 48), ([1, 2], 32)):
        assert len(trained[:, pair].unique(dim=0)) == number


def test_wrap_is_the_shortest_way_around_the_torus():
    offset = torch.linspace(-60, 60, 601)
    copies = offset[:, None] + 24 * torch.arange(-4, 5)
    assert torch.allclose(shapes.wrap(offset).abs(), copies.abs().amin(1), atol=1e-4)


def test_a_shape_that_crosses_the_border_equals_all_its_shifted_copies():
    centre = random_starts(200)
    wide = shapes.draw_shapes(centre + 24, 72)  # three worlds wide: nothing reaches its border
    folded = wide.view(200, 4, 3, 24, 3, 24).amax((2, 4))
    assert torch.allclose(shapes.draw_shapes(centre), folded, atol=1e-4)


def test_captions_are_parsed_back_to_their_specs():
    left_out = torch.rand(EVERY.shape, generator=seeded()) < 0.5
    for spec in torch.cat([EVERY, EVERY.masked_fill(left_out, -1)]):
        text = shapes.caption(spec)
        assert torch.equal(shapes.parse_caption(text), spec)
        assert set(text.split()) <= set(sum(shapes.WORDS.values(), []))
    assert shapes.caption(torch.tensor([0, 0, 5])) == "a red circle moving up-left"
    assert shapes.caption(torch.tensor([0, 0, 5]), still=True) == "a red circle"


def test_each_frame_shows_the_shape_at_its_start_plus_its_steps():
    starts = random_starts(192)
    clips = shapes.render(EVERY, starts, 30)
    for frame in (0, 1, 29):
        cover = shapes.draw_shapes(starts + frame * shapes.STEPS[EVERY[:, 2]])
        cover = cover[torch.arange(192), EVERY[:, 1]]
        paint = shapes.RGB[EVERY[:, 0]][:, :, None, None] * cover[:, None]
        assert torch.allclose(clips[:, :, frame], 2 * paint - 1, atol=1e-4)


def test_batches_depend_on_their_generator_alone():
    first, again, other = (shapes.make_batch(8, 4, seeded(seed)) for seed in (5, 5, 6))
    assert first[1] == again[1] and all(map(torch.equal, first[::2], again[::2]))
    assert not torch.equal(first[0], other[0])


def test_drawn_clips_are_right_and_stay_so_with_mild_noise():
    specs, starts = shapes.random_specs(1000, seeded()), random_starts(1000)
    verdict = judge(shapes.render(specs, starts, 3), specs)
    assert all(verdict[key].all() for key in CHECKS)
    assert verdict["overlap"].min() > 0.99 and verdict["jump"].max() < 0.01
    assert shapes.wrap(verdict["start"] - starts).abs().max() < 0.01
    clips = shapes.render(EVERY, random_starts(192), 4)
    assert judge(clips + 0.05 * torch.randn(clips.shape, generator=seeded()), EVERY)["strict"].all()


def wrong_clips():
    """Each way to be wrong: its name -> what must be told, and clips of SOME in 10 frames."""
    starts = random_starts(len(SOME))
    clips = shapes.render(SOME, starts, 10)
    others = [(SOME + one) % torch.tensor([6, 4, 8]) for one in torch.eye(3, dtype=torch.long)]
    colour, shape, direction = [shapes.render(other, starts, 10) for other in others]
    twin = torch.maximum(clips, clips.roll((12, 12), (3, 4)))
    ghost = torch.maximum(clips, 0.15 * (clips.roll((1, 12, 12), (1, 3, 4)) + 1) - 1)
    smear = torch.stack([0.6**i * (clips.roll(i, 3) + 1) - 1 for i in range(6)]).amax(0)
    blur = [clips.roll((i, j), (3, 4)) for i in range(-2, 3) for j in range(-2, 3)]
    centre = starts + 5 * shapes.STEPS[SOME[:, 2]]  # in frame 5
    column = shapes.wrap(torch.arange(24) - centre[:, :1]).view(-1, 1, 1, 1, 24)

    def changed(other, to=10):  # from frame 5 on
        return torch.cat([clips[:, :, :5], other[:, :, 5:to], clips[:, :, to:]], 2)

    return {
        "other colour in one frame": ("colour", changed(colour, to=6)),
        "other shape half way": ("shape", changed(shape)),
        "other direction": ("direction jump", direction),
        "turn half way": ("direction jump", changed(clips.flip(2))),
        "no motion": ("direction jump", clips[:, :, :1].expand_as(clips)),
        "jump by one pixel": ("jump", changed(clips.roll(1, 4))),
        "faint ghost": ("one_object", ghost),
        "faint ghost in one frame": ("one_object", changed(ghost, to=6)),
        "blur": ("overlap ...", torch.stack(blur).mean(0)),
        "dim": ("overlap", 0.75 * (clips + 1) - 1),
        "two objects": ("one_object ...", twin),
        "smear": ("one_object ...", smear),
        "tear in one frame": ("one_object ...", changed(clips.where(column.abs() > 0.5, -1), to=6)),
        "half missing in one frame": ("overlap ...", changed(clips.where(column > 0, -1), to=6)),
        "nothing in one frame": ("colour shape direction ...", changed(0 * clips - 1, to=6)),
        "NaN for black": ("colour shape ...", clips.where(clips > -1, torch.nan)),
    }


WRONG = wrong_clips()


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_and_nothing_else(name):
    keys = set(WRONG[name][0].split())
    verdict = judge(WRONG[name][1], SOME)
    wrong = {key: ~verdict[key] for key in CHECKS[:4]}
    wrong |= {"overlap": verdict["overlap"] < 0.85, "jump": verdict["jump"] > 0.5}
    assert not verdict["strict"].any()
    assert torch.equal(~verdict["lenient"], torch.stack([wrong[key] for key in CHECKS[:4]]).any(0))
    assert all(wrong[key].all() for key in keys - {"..."})
    assert "..." in keys or not any(wrong[key].any() for key in wrong.keys() - keys)


@pytest.mark.parametrize("frames", [1, 6])
@pytest.mark.parametrize("fill", [-1.0, 0.0, 1.0, torch.nan, torch.inf, "noise"])
def test_clips_without_a_shape_are_wrong_in_everything(frames, fill):
    clips = torch.randn(4, 3, frames, 24, 24, generator=seeded())
    clips = clips if fill == "noise" else torch.full_like(clips, fill)
    verdict = judge(clips, torch.full((4, 3), -1))
    assert not any(verdict[key].any() for key in (*CHECKS, "right"))
    assert verdict["overlap"].max() < 0.5 and verdict["jump"].min() > 0.5  # so none is NaN


def test_what_the_spec_leaves_out_may_be_anything_but_only_one_and_the_direction_of_a_still():
    clips = shapes.render(SOME, random_starts(39), 1)
    assert judge(clips, SOME * torch.tensor([1, 1, 0]))["strict"].all()
    clips = shapes.render(SOME, random_starts(39), 4)
    assert judge(clips, torch.full_like(SOME, -1))["strict"].all()
    for name in ("other colour in one frame", "other shape half way", "no motion"):
        assert not judge(WRONG[name][1], torch.full_like(SOME, -1))["lenient"].any()


@pytest.mark.parametrize("size", [25, 40])
def test_the_world_need_not_be_square(size):
    specs = EVERY[EVERY[:, 2] == 0]  # to the right
    starts = torch.stack([random_starts(24, size)[:, 0], torch.full((24,), 12.3)], 1)
    clips = shapes.render(specs, starts, 9, size)[:, :, :, :24]  # (24, 3, 9, 24, size)
    verdict = judge(clips, specs)
    assert verdict["strict"].all() and torch.allclose(verdict["start"], starts, atol=0.01)


def test_seconds_tell_where_a_long_clip_goes_wrong():
    clips = shapes.render(SOME[:3], random_starts(3), 1088)
    clips[0, :, 496:] = clips[0, :, 496:].roll(1, 3)  # a jump into the first frame of second 31
    clips[1, :, 40] = -1  # nothing in a frame of second 2
    wrong = ~seconds(judge(clips, SOME[:3]))
    assert wrong.shape == (3, 68) and wrong.nonzero().tolist() == [[0, 31], [1, 2]]


def test_summary_gives_shares_and_their_interval():
    clips = torch.cat([shapes.render(SOME, random_starts(39), 10), WRONG["faint ghost"][1]])
    result = summary(judge(clips, SOME.repeat(2, 1)))
    assert result["strict"] == result["one_object"] == result["seconds"] == 0.5
    assert (result["low"], result["high"]) == interval(39, 78)
    assert interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
