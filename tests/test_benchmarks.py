"""The benchmarks run with tiny settings, and their counts agree with counts by hand."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_tiny
from benchmarks import ablations, adapt, adjacency, agree, common, cost, gpu, ideal, length
from benchmarks import memory, minute, parts, progress, speed, starts, uses
from docs import figures
from lingen import Block, LinGen, preset
from scan import SCANS, places
from tesa import windows
from toy import judge, shapes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def call(monkeypatch):
    """Runs a script's main in this process, with small batches and a few steps of the sampler."""
    stage, sample_captions = train_tiny.Stage, train_tiny.sample_captions

    def sample_in_two_steps(model, captions, vocabulary, settings):
        return sample_captions(model, captions, vocabulary, {**settings, "steps": 2})

    scan_inputs = speed.scan_inputs
    small = [stage(old.frames, 2, old.share) for old in train_tiny.STAGES]
    monkeypatch.setattr(train_tiny, "STAGES", small)
    monkeypatch.setattr(train_tiny, "Stage", lambda frames, batch, share: stage(frames, 2, share))
    monkeypatch.setattr(train_tiny, "sample_captions", sample_in_two_steps)
    monkeypatch.setattr(common, "keep_memory", lambda: None)
    monkeypatch.setattr(speed, "scan_inputs", lambda length: scan_inputs(length // 64))

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()

    return run


@pytest.fixture
def checkpoint(tmp_path):
    state = ablations.new_run({}, 3, 0).state()
    state["sampling"]["steps"] = 2
    train_tiny.write_checkpoint(tmp_path / "t.pt", state)
    return tmp_path / "t.pt"


def products_by_hand(config, shape, words):
    """Multiply-adds that a block cannot do without."""
    d, l = config.d_model, math.prod(shape)
    count = 6 * d * d + 8 * l * d * d  # modulation, feed-forward
    count += 2 * l * d * d + 2 * words * d * d + 2 * l * words * d  # cross-attention
    if config.mixer == "attention":
        return count + 4 * l * d * d + 2 * l * l * d
    if config.tesa:
        count += 4 * l * d * d + 2 * l * math.prod(config.window) * d
    if config.ma:
        review = math.prod(-(-size // pool) for size, pool in zip(shape, config.pool))
        l += 2 * review if config.review else 0
        inner, groups = int(config.expand * d), config.ngroups * config.d_state
        count += l * d * (2 * inner + 2 * groups + inner // config.headdim) + l * inner * d
        count += l * config.chunk_size * (groups + inner)  # C B^T and M x
        count += 4 * l * config.d_state * inner  # into and out of the state, in both directions
    return count


@pytest.mark.parametrize("change", list(ablations.VARIANTS.values()))
def test_the_counter_sees_the_products_counted_by_hand(change):
    config, shape, words = preset("tiny", backend="torch", **change), (16, 12, 12), 5
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        condition = torch.empty(1, 1, 1, 1, config.d_model)
        x = torch.empty(1, *shape, config.d_model)
        text = torch.empty(1, words, config.d_model)
        mask = torch.ones(1, 1, 1, words, dtype=torch.bool)
        Block(config, layer=0)(x, condition, text, mask)
    ratio = counter.get_total_flops() / 2 / products_by_hand(config, shape, words)
    scans = config.mixer == "mate" and config.ma
    # The scan also fills its last chunk, and passes states on from chunk to chunk.
    assert 1 <= ratio < 1.2 if scans else ratio == 1


def test_committed_operations_are_those_of_the_code_and_rows_of_other_settings_are_refused():
    row = common.Table(ROOT / "benchmarks/results/cost.csv", resume=True).rows[0]
    configs = [preset("4b", **change) for change in cost.MODELS.values()]
    shape = common.clip_shape(configs[0], int(row["seconds"]), int(row["pixels"]))
    counts = [round(cost.operations(config, shape) / 1e12, 1) for config in configs]
    assert counts == [float(row["lingen_tflop"]), float(row["dit_tflop"])]
    pytest.raises(ValueError, common.Table, ROOT / "benchmarks/results/cost.csv", True, pixels=256)


def test_adjacency_equals_a_count_by_hand():
    grid, window, k = (4, 3, 5), (2, 2, 4), 8
    at = {order: places(order, grid) for order in (*SCANS, "zigzag")}
    cut = [windows(grid, window, shift) for shift in ((0, 0, 0), (1, 1, 2))]
    for offsets, most in ((adjacency.FACES, 1), (adjacency.ALL, 3)):
        near = dict.fromkeys((*at, "RMS", "TESA", "zigzag + TESA", "RMS + TESA"), 0)
        for a, b in itertools.combinations(itertools.product(*map(range, grid)), 2):
            steps = [abs(i - j) for i, j in zip(a, b)]
            if max(steps) == 1 and sum(steps) <= most:
                apart = {order: abs(int(place[a] - place[b])) for order, place in at.items()}
                apart["RMS"] = min(apart[order] for order in SCANS)
                together = any(number[a] == number[b] for number in cut)
                for order in near:
                    scan, _, tesa = order.partition(" + ")
                    covered = together and "TESA" in (scan, tesa)
                    near[order] += covered or apart.get(scan, math.inf) <= k
        found = adjacency.within(grid, window, offsets)
        assert {order: int(pairs[k].sum()) for order, pairs in found.items()} == near


RUNS = [
    (ablations, "--steps 1 --captions 1 --seeds 1 --variants DiT", "ablations_summary.csv", 1),
    (agree, "--steps 1 --captions 1 --seeds 1 --frames 4 --variants DiT", "agree_summary.csv", 1),
    (adapt, "--steps 2 --every 1 --seeds 1", "adapt.csv", 3),
    (progress, "--steps 2 --every 1 --seeds 1 --captions 1", "progress.csv", 2),
    (parts, "--seconds 1 --rounds 2", "parts_tiny.csv", 6),
    (speed, "linear both mate --quick", "speed_mate.csv", 2),
    (adjacency, "--grid 2 3 4", "adjacency.csv", 18),
    (minute, "--frames 16 --captions 1 --checkpoint CHECKPOINT", "minute.csv", 1),
    (uses, "--captions 1 --only plain inpaint loop --checkpoint CHECKPOINT", "uses.csv", 3),
    (ideal, "--frames 2 4 --times 0.1 --clips 2 --checkpoint CHECKPOINT", "ideal.csv", 2),
    (starts, "--seeds 2 --checkpoint CHECKPOINT", "starts.csv", 3),
    (memory, "--checkpoint CHECKPOINT", "memory.csv", 4),
]
GPU = dict(tests=37, judge=2, step=2, scan=6, sample=1, train=1, cards=4, table2=6)
RUNS += [(gpu, f"--device cpu --tiny --part {name}", f"{name}.csv", GPU[name]) for name in GPU]


@pytest.mark.parametrize("module, arguments, file, rows", RUNS)
def test_a_script_writes_its_table(call, tmp_path, checkpoint, module, arguments, file, rows):
    call(module, *arguments.replace("CHECKPOINT", str(checkpoint)).split(), "--out", tmp_path)
    found = common.Table(tmp_path / file, resume=True).rows
    assert len(found) == rows and "TypeError" not in str(found)


def test_a_part_that_is_killed_loses_only_itself(call, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GROUPS", [((gpu.step,), 0.1), ((gpu.cards,), 99)])
    call(gpu, "--device", "cpu", "--tiny", "--out", tmp_path)
    summary = (tmp_path / "summary.txt").read_text()
    assert "step: 0 rows in 0 s, killed at its limit of 0.1 s" in summary
    assert "cards: 4 rows" in summary


def test_clips_are_judged_by_their_own_captions(monkeypatch):
    def draw(model, captions, vocabulary, settings):
        specs = torch.stack([shapes.parse_caption(caption) for caption in captions])
        return shapes.render(specs, torch.full((len(specs), 2), 7.5), settings["frames"])

    monkeypatch.setattr(train_tiny, "sample_captions", draw)
    assert ablations.sample_and_judge(None, 20)["strict"].all()


def test_the_shares_of_clips_are_those_counted_by_hand():
    specs = ablations.small_specs(8)
    assert specs[:, 2].tolist() == [*range(8)] and not shapes.held_out(specs).any()
    clips = shapes.render(specs, torch.full((8, 2), 3.3), 10, 16)
    clips[0, :, 7:] = clips[0, :, 7:].roll(3, 2)  # three frames elsewhere
    clips[1, :, 4] = -1  # a frame without a circle
    clips[2] = clips[2, :, :1]  # no motion
    found = ablations.shares(judge.judge(clips, specs), specs, 16)
    assert (9 * found["steady"]).round().tolist() == [8, 7, 0] + 5 * [9]
    assert (10 * found["path"]).round().tolist() == [7, 9, 1] + 5 * [10]
    assert found["direction"].tolist() == [1, 1, 0] + 5 * [1] and found["right"][3:].eq(1).all()
    assert agree.agreement(torch.cat(list(clips[[1, 3]]), 1)) == pytest.approx((10 / 19, 0.95, 3))


def test_clips_of_the_ablations_grow_and_all_lengths_stay_among_them():
    lengths = [ablations.clip_length(step, 800) for step in range(800)]
    some = [set(lengths[i : i + 8]) for i in (0, 80, 160, 360, 560, 792)]
    assert some == [{1}, {1, 4}, {1, 16}, {1, 16, 64}, {1, 16, 64, 256}, {1, 16, 64, 256}]


def test_the_best_denoiser_returns_the_mean_of_all_clips_by_how_well_they_fit(monkeypatch):
    monkeypatch.setattr(ideal, "PARTS", 1)  # starts at whole pixels: 576 clips
    spec, t = torch.tensor([[3, 2, 5]]), 0.1
    starts = torch.cartesian_prod(torch.arange(24.0), torch.arange(24.0))
    every = shapes.render(spec.expand(576, 3), starts, 3).double()
    noisy = torch.randn(every[:1].shape, generator=torch.Generator().manual_seed(0)).double()
    noisy = noisy.lerp(every[100:101], t)
    weights = (-(noisy - t * every).square().sum((1, 2, 3, 4)) / (1 - t) ** 2 / 2).softmax(0)
    best = ideal.posterior_mean(noisy, spec, t)[0]  # several starts count
    assert weights.max() < 0.8 and torch.allclose(best, torch.tensordot(weights, every, 1))


def test_starts_are_counted_in_the_nine_parts_of_the_torus():
    places = torch.tensor([[0.0, 0.0], [7.9, 7.9], [8.0, 0.0], [23.9, 23.9], [0.0, 8.0]])
    assert starts.count_starts(places).tolist() == [2, 1, 0, 1, 0, 0, 0, 0, 1]
    assert starts.chi_square(torch.tensor([3, 1])) == 1  # (3 - 2)^2 / 2 + (1 - 2)^2 / 2


def test_memories_are_those_of_known_steps_and_rates():
    model = LinGen(preset("tiny", depth=1)).requires_grad_(False)
    ma = model.blocks[0].mixer.ma
    ma.in_proj.weight[-4:] = 0  # steps of dt = 0.01 for all tokens
    ma.dt_bias.fill_(math.log(math.expm1(0.01)))
    ma.A_log.copy_(torch.tensor([2.0, 1.0, 5.0, 4.0]).log())
    inputs = torch.zeros(1, 3, 16, 24, 24), torch.zeros(1), torch.ones(1, 3).long()
    assert memory.memories(model, *inputs) == [[288 + 2 * 16, 20, 25, 50, 100]]


def test_a_process_of_its_own_gives_back_what_child_returns():
    request = dict(preset="tiny", mixer="mate", seconds=1, pixels=512, repeats=1)
    seconds, mib = common.in_fresh_process(length.__file__, threads=1, keep=True, **request)
    assert seconds > 0 and mib >= 0


@pytest.mark.parametrize("name", figures.PICTURES)
def test_every_picture_is_drawn(call, tmp_path, checkpoint, name):
    path = tmp_path / ("hero.gif" if name == "hero" else f"{name}.png")
    call(figures, name, "--out", path, "--checkpoint", checkpoint)
    with figures.Image.open(path) as picture:
        assert min(picture.size) > 100
