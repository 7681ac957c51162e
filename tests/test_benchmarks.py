"""The scripts that check the paper's claims: the counter of operations against a count by hand, and each script's own sums."""
import dataclasses
import importlib.util
import itertools
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_tiny
from benchmarks import ablations, adapt, adjacency, bayes, common, consumer, cost, following, judge, length, minute, parts, progress
from lingen import Block, LinGen, describe, preset
from scan import places
from tesa import windows

ROOT = Path(__file__).resolve().parent.parent


def call(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


# ---- operations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [dict(), dict(mixer="attention"), dict(tesa=False), dict(review=False), dict(ngroups=2, d_state=16)])
def test_counter_agrees_with_a_count_by_hand_and_sees_the_scan(change):
    c, n = preset("tiny", vocab_size=9, **change), 5
    shape, d = (4, 8, 8), c.d_model
    with torch.device("meta"):
        block = Block(c, layer=0)
        x, condition, text = torch.empty(1, *shape, d), torch.empty(1, d), torch.empty(1, n, d)
    with FlopCounterMode(display=False) as counter:
        block(x, condition, text, torch.ones(1, n, dtype=torch.bool, device="meta"))
    l = math.prod(shape)                                                # multiply-adds, part by part
    count = d * 6 * d                                                   # modulation
    count += 2 * l * d * d + n * d * 2 * d + 2 * l * n * d              # cross-attention: q and out, k and v, scores and sums
    count += 2 * l * d * 4 * d                                          # feed-forward
    if c.mixer == "attention":
        count += 4 * l * d * d + 2 * l * l * d
    else:
        if c.tesa:
            count += 4 * l * d * d + 2 * l * math.prod(c.window) * d
        if c.ma:
            review = math.prod(-(-s // p) for s, p in zip(shape, c.pool)) if c.review else 0
            length, inner, groups = l + 2 * review, d, c.ngroups * c.d_state
            padded = -(-length // c.chunk_size) * c.chunk_size
            count += length * d * (2 * inner + 2 * groups + inner // c.headdim) + length * inner * d        # in and out
            count += padded * (c.chunk_size * groups + c.chunk_size * inner)                                # C B^T, and M x
            count += 2 * padded * 2 * c.d_state * inner                 # per direction: into the state, and out of it
    assert counter.get_total_flops() == 2 * count


def test_described_parts_add_up():
    rows = {name.strip(): (parameters, products) for name, _, parameters, products in describe(preset("tiny", vocab_size=9), 16, 32, 32)}
    inside = ("MA-branch", "TE-branch", "cross-attention", "feed-forward", "modulation")
    for column in (0, 1):
        assert rows["block 0"][column] == sum(rows[name][column] for name in inside)


def test_a_block_counted_once_and_multiplied_is_the_whole_model():
    config = preset("4b", d_model=256, nheads=2, depth=5)
    _, _, _, products = describe(config, 34, 16, 16, words=256)[-1]
    assert cost.operations(config, (34, 16, 16)) == 2 * products


def test_committed_operations_are_those_that_the_code_counts():
    row = next(row for row in common.Table(common.RESULTS / "cost.csv", resume=True).rows if (row["pixels"], row["seconds"]) == ("512", "17"))
    ours, dit = (cost.operations(preset("4b", **change), (34, 64, 64)) / 1e12 for change in cost.MODELS.values())
    assert (float(row["lingen_tflop"]), float(row["dit_tflop"]), float(row["ratio"])) == (round(ours, 1), round(dit, 1), round(dit / ours, 2))


def test_models_that_are_compared_hold_the_same_parameters():
    sizes = [cost.parameters(preset("4b", **fields)) for fields in cost.MODELS.values()]
    dits = [dit for name, (_, dit, _) in cost.DEPENDS.items() if "28 blocks" not in name]
    sizes += [cost.parameters(preset("4b", **{**cost.MODELS["DiT-4B"], **dit})) for dit in dits]
    sizes += [cost.parameters(preset("4b", **ours)) for ours, _, _ in cost.DEPENDS.values()]
    assert all(4.1e9 < size < 4.3e9 for size in sizes)


# ---- what the scripts share -----------------------------------------------------------------------------


@pytest.mark.parametrize("module, wrong", [
    (ablations, "--seeds 0"), (adapt, "--every 0"), (adjacency, "--grid 1 1 1"), (bayes, "--captions 0"), (consumer, "--device tpu"), (following, "--captions 0"),
    (cost, "--pixels 3"), (length, "--pixels 500"), (minute, "--frames 10"), (minute, "--views 0"), (parts, "--rounds 0")])
def test_every_script_teaches_and_refuses(monkeypatch, capsys, module, wrong):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, module, "--help")
    said = capsys.readouterr().out
    assert stop.value.code == 0 and f"python benchmarks/{module.__name__.split('.')[1]}.py" in said and "--out" in said
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, module, *wrong.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "error: " in said and wrong.split()[0] in said


@pytest.mark.parametrize("script, args, says", [
    ("speed.py", ["--help"], "peers"), ("speed.py", ["nonsense"], "there is no table"), ("cost.py", ["--help"], "figs. 1b")])
def test_scripts_run_as_scripts(script, args, says):
    run = subprocess.run([sys.executable, ROOT / "benchmarks" / script, *args], capture_output=True, text=True)
    assert says in (run.stdout + run.stderr).replace("\n", " ") and "Traceback" not in run.stderr


def test_rows_outlive_ctrl_c_and_are_read_back(tmp_path, capsys):
    def main():
        table = common.Table(tmp_path / "new" / "table.csv")
        table.add(name="one", value=None)
        table.add(name="two, three", value=0.5)
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        common.run(main, "it.py")
    assert stop.value.code == 130 and "Traceback" not in capsys.readouterr().err
    assert common.Table(tmp_path / "new" / "table.csv", resume=True).rows == [dict(name="one", value=""), dict(name="two, three", value="0.5")]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.csv"]


def test_errors_are_a_line_and_plots_are_optional(monkeypatch, tmp_path, capsys):
    def main():
        raise ChildProcessError("it failed")
    with pytest.raises(SystemExit) as stop:
        common.run(main, "it.py")
    assert stop.value.code == 1 and capsys.readouterr().err == "it.py: error: it failed\n"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    common.plot(tmp_path / "none.png", None)
    assert "matplotlib is not installed" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_variants_differ_in_one_field():
    base = dataclasses.asdict(preset("tiny", vocab_size=9))
    for name, change in common.VARIANTS.items():
        other = dataclasses.asdict(preset("tiny", vocab_size=9, **change))
        assert sum(other[field] != value for field, value in base.items()) == (name != "default"), name


# ---- time and memory ------------------------------------------------------------------------------------


def test_length_measures_and_attention_stops_at_its_limit(monkeypatch, tmp_path):
    taken = {("mate", 1): 1.0, ("attention", 1): 2.0, ("mate", 2): 2.0, ("attention", 2): 8.0, ("mate", 4): 4.0}    # 4 s: only MATE
    monkeypatch.setattr(common, "in_fresh_process", lambda script, preset, mixer, seconds, **rest: (taken[mixer, seconds], 10.4))
    call(monkeypatch, length, "--seconds", 1, 2, 4, "--limit", 31, "--out", tmp_path, "--plot", tmp_path / "plot.png")
    rows = common.Table(tmp_path / "length_tiny_cpu.csv", resume=True).rows
    assert [row["ratio"] for row in rows] == ["2.0", "4.0", ""] and [row["tokens"] for row in rows] == ["256", "512", "1024"]
    found = length.child("tiny", "attention", 1, 512, "cpu", 1)
    assert 0 < found[0] < 60 and found[1] >= 0


def test_parts_are_held_against_the_default_of_their_own_round(monkeypatch, tmp_path):
    clock = itertools.count()                       # round by round the machine slows down; the second variant takes twice the first
    monkeypatch.setattr(common, "seconds", lambda step, device: (lambda n: (1 + n // 6) * (2 if n % 6 == 1 else 1))(next(clock)))
    call(monkeypatch, parts, "--seconds", 1, "--rounds", 4, "--out", tmp_path)
    rows = common.Table(tmp_path / "parts_tiny_cpu.csv", resume=True).rows
    assert [row["relative"] for row in rows] == ["1.0", "2.0", "1.0", "1.0", "1.0", "1.0"] and rows[3]["paper"] == "1.41"


def test_longest_and_fit_find_what_they_should():
    for true in (0, 1, 2, 5, 37, consumer.MOST, 10**6):
        asked = []
        assert consumer.longest(lambda n, true=true, asked=asked: asked.append(n) or n <= true) == min(true, consumer.MOST)
        assert max(asked) <= consumer.MOST and len(asked) < 25
    assert consumer.fit([(10, 200), (30, 600)]) == (20, 0)
    size, peak = common.in_fresh_process(consumer.__file__, preset="small", width=128, seconds=2)
    assert size == 1024 * 128 and 10 < peak / size < 800


# ---- adjacency ------------------------------------------------------------------------------------------


def test_adjacency_is_that_of_a_count_by_hand(monkeypatch, tmp_path):
    grid, window = (4, 3, 5), (2, 2, 4)
    call(monkeypatch, adjacency, "--grid", *grid, "--window", *window, "--out", tmp_path / "a.csv", "--plot", tmp_path / "a.png")
    rows = {(row["order"], row["neighbours"]): row for row in common.Table(tmp_path / "a.csv", resume=True).rows}
    cells = list(itertools.product(*map(range, grid)))
    at = {order: places(order, grid) for order in ("spatial-row", "spatial-column", "temporal-row", "temporal-column", "zigzag")}
    cut = [windows(grid, window, shift) for shift in ((0, 0, 0), (1, 1, 2))]
    for kind in ("faces", "all"):
        near, tesa, pairs = {(order, k): 0 for order in (*at, "RMS") for k in adjacency.WITHIN}, 0, 0
        for a, b in itertools.combinations(cells, 2):
            steps = [abs(i - j) for i, j in zip(a, b)]
            if max(steps) > 1 or (kind == "faces" and sum(steps) > 1):
                continue
            pairs += 1
            apart = {order: abs(int(place[a] - place[b])) for order, place in at.items()}
            apart["RMS"] = min(apart[order] for order in apart if order != "zigzag")
            for order, k in near:
                near[order, k] += apart[order] <= k
            tesa += any(number[a] == number[b] for number in cut)
        for (order, k), count in near.items():
            assert float(rows[order, kind][f"within_{k}"]) == round(100 * count / pairs, 1), (order, k)
        assert float(rows["TESA", kind]["within_1"]) == round(100 * tesa / pairs, 1)
        assert float(rows["RMS + TESA", kind]["within_1"]) >= max(float(rows[name, kind]["within_1"]) for name in ("RMS", "TESA"))


# ---- training and judging -------------------------------------------------------------------------------


def test_following_knows_where_shapes_go_and_sees_what_tesa_does(monkeypatch):
    """Against brute force over tokens: of what one token shows four frames later, the clip says where it is."""
    generator = torch.Generator().manual_seed(0)
    clips, captions, specs = train_tiny.make_batch(6, 16, generator)
    way = following.on_the_way(train_tiny.STEPS[specs[:, 0, 2], specs[:, 0, 3]], (4, 8, 8))
    assert (way.sum(-1) == 3).all()
    cut = clips.unfold(2, 4, 4).unfold(3, 4, 4).unfold(4, 4, 4).permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(6, 256, -1)
    for b in range(6):
        same = (cut[b][:, None] - cut[b]).abs().amax(-1) == 0
        for token in (cut[b] > -0.9).any(1).nonzero()[:, 0].tolist():
            assert same[token][way[b, token]].all()
    model = LinGen(preset("tiny", vocab_size=len(train_tiny.VOCABULARY), depth=2))
    model.vocabulary = train_tiny.VOCABULARY
    perfect = way.float() / 3
    uniform = torch.full_like(perfect, 1 / 256)
    maps = following.look(model, clips, torch.ones(6, 3, dtype=torch.long), 0.2)
    assert [layer.shape for layer in maps] == [(6, 4, 256, 256)] * 2 and all(torch.allclose(layer.sum(-1), torch.ones(6, 4, 256)) for layer in maps)
    monkeypatch.setattr(following, "look", lambda *args: [torch.stack([perfect, uniform], 1)])
    torch.testing.assert_close(following.measure(model, 6, 0)[1], torch.tensor([[100.0, 300 / 256]]))
    assert following.meant(model, captions[0]) == [[0, 0]] * 4
    with torch.no_grad():
        model.motion.bias.copy_(torch.tensor([0, 1, -0.5, 0, 0, 1] * 2))
    assert following.meant(model, following.TWO) == [[1.0, -0.5], [0.0, 1.0]] * 2


@pytest.mark.parametrize("objects, together", [(1, True), (2, True), (2, False)])
def test_the_best_denoiser_is_the_mean_over_all_clips_that_may_be_behind_the_noise(objects, together):
    """Against brute force: every place on whole pixels drawn, and weighed by how likely its noise is."""
    generator, frames = torch.Generator().manual_seed(3), 4
    specs = train_tiny.random_specs(6, generator, objects)[2]
    places = torch.cartesian_prod(torch.arange(32.0), torch.arange(32.0))
    starts = [places[:, None]] * objects
    if objects == 2 and together:
        first, second = train_tiny.random_starts(specs[None], frames, generator)[0]
        starts[1] = ((places + (second - first).round()) % 32)[:, None]
    groups = [(specs, torch.cat(starts, 1))] if together else [(spec[None], places[:, None]) for spec in specs]
    drawn = [(1 + train_tiny.render(spec.expand(1024, -1, -1), start, frames)) / 2 for spec, start in groups]
    behind = sum(clips[77 + 200 * i] for i, clips in enumerate(drawn))
    for t in (0.02, 0.1):
        noisy = (1 - t) * torch.randn(3, frames, 32, 32, generator=generator) + t * (2 * behind - 1)
        log = [-(noisy - t * (2 * clips - 1)).double().square().sum((1, 2, 3, 4)) / 2 / (1 - t) ** 2 for clips in drawn]
        want = sum(torch.einsum("n,ncthw->cthw", share.softmax(0).float(), clips) for share, clips in zip(log, drawn))
        assert want.amax() < 0.99 or t > 0.02           # not yet decided: many clips count
        torch.testing.assert_close(bayes.best(noisy, t, specs, together, fine=1), want, atol=2e-4, rtol=0)


def test_bayes_measures_the_model_against_it(monkeypatch):
    """A model that knows the clips misses by nothing, from wherever it is asked; one that says black by all that is bright; the best lies between."""
    model = LinGen(preset("tiny", vocab_size=len(train_tiny.VOCABULARY), depth=1)).eval()
    model.vocabulary = train_tiny.VOCABULARY
    shown, render = [], train_tiny.render
    monkeypatch.setattr(train_tiny, "render", lambda *args: shown.append(render(*args)) or shown[-1])
    def black(clip, t, text):
        return torch.full_like(clip, -1.0)
    def knows(clip, t, text):
        for y in range(32):
            for x in range(32):
                rolled = shown[0].roll((y, x), (3, 4))
                if (clip - 0.999 * rolled).abs().amax() < 0.01:
                    return rolled
    for forward, times in ((black, (0.05, 0.3)), (knows, (0.999,))):
        monkeypatch.setattr(model, "forward", forward)
        for objects in (1, 2):
            shown.clear()
            for row in bayes.measure(model, objects, 2, 0, times):
                bright = ((1 + shown[0]) / 2).square().sum().item() / 2 / 16
                right = 0 if forward is knows else bright
                assert all(row[f"views_{k}"] == pytest.approx(right, abs=0.02) for k in (1, 2, 8)), row
                if forward is black:
                    assert row["best"] < 0.9 * bright and row["best"] <= (row["best_apart"] or 1e9) * 1.2
    assert list(row) == ["objects", "t", "views_1", "views_2", "views_8", "best_apart", "best"] and row["best_apart"] is not None


def test_ablations_train_by_the_recipe_and_measure_on_held_out_clips(monkeypatch):
    mine, theirs = ablations.begin("default", 40, 0), None
    config = preset("tiny", vocab_size=len(train_tiny.VOCABULARY))
    theirs = train_tiny.Run(config, dict(steps=40, seed=0, objects=1, rate=2e-3), torch.device("cpu"))
    assert mine.advance() == theirs.advance()
    seen = []
    make = train_tiny.make_batch
    monkeypatch.setattr(train_tiny, "make_batch", lambda *args, **kwargs: seen.append(make(*args, **kwargs)) or seen[-1])
    model = mine.averaged()
    assert ablations.validation_loss(model, 16, 1024) == ablations.validation_loss(model, 16, 1024)
    assert train_tiny.held_out(seen[0][2]).all() and seen[0][0].shape == (4, 3, 16, 32, 32)


def test_ablations_judge_the_average_trained_on_noise_that_never_repeats(monkeypatch):
    monkeypatch.setattr(train_tiny, "PERIOD", train_tiny.PERIOD)
    monkeypatch.setattr(ablations, "LENGTHS", (4, 16))
    steps = []

    def advance(self):
        steps.append((train_tiny.PERIOD, self.settings["steps"], self.model.config.tesa))
        self.average = {name: torch.full_like(value, 0.5) for name, value in self.average.items()}
    monkeypatch.setattr(train_tiny.Run, "advance", advance)
    average = lambda model: all((value == 0.5).all() for value in model.state_dict().values())
    monkeypatch.setattr(ablations, "validation_loss", lambda model, frames: frames / 8 if average(model) else 0)

    def score(model, n, frames, options):
        assert average(model) and (n, frames, options["steps"]) == (7, 16, train_tiny.SAMPLING["steps"]) and model.vocabulary == train_tiny.VOCABULARY
        return None, {name: 0.12345 for name in ablations.JUDGED}
    monkeypatch.setattr(judge, "score", score)
    row = ablations.child("without TESA", 1, 3, 7)
    assert steps == [(0, 3, False)] * 3
    assert row["loss_4"] == 0.5 and row["loss_16"] == 2 and row["direction"] == row["joint"] == 0.123 and row["cpu_seconds"] >= 0


def test_ablations_go_seed_by_seed_skip_what_is_done_and_end_in_time(monkeypatch, tmp_path):
    calls, options = [], ("--seeds", 2, "--variants", "default", "DiT", "--out", tmp_path, "--plot", tmp_path / "plot.png")

    def fresh(script, threads, variant, seed, steps, captions):
        calls.append((variant, seed))
        if len(calls) == 3:
            raise KeyboardInterrupt
        losses = {f"loss_{frames}": seed + 0.5 for frames in ablations.LENGTHS}
        return {**losses, **{name.removesuffix("_ok"): 0.25 for name in ablations.JUDGED}}
    monkeypatch.setattr(common, "in_fresh_process", fresh)
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, ablations, *options)
    call(monkeypatch, ablations, *options, "--minutes", 0)
    assert calls == [("default", 0), ("DiT", 0), ("default", 1)]
    call(monkeypatch, ablations, *options)
    assert calls[3:] == [("default", 1), ("DiT", 1)]
    rows = common.Table(tmp_path / "ablations_summary.csv", resume=True).rows
    assert [row["loss_16"] for row in rows] == ["1.0000 ± 0.7071"] * 2 and rows[0]["joint"] == "0.25 ± 0.00"
    with pytest.raises(SystemExit):
        call(monkeypatch, ablations, *options, "--steps", 7)


def test_the_table_for_gpus_says_where_there_is_none_and_counts_all_rows(monkeypatch, capsys):
    """Its whole way on a CPU, with stand-ins for the official kernel and for the compiler; on a GPU it has yet to run."""
    from benchmarks import speed
    rows = []
    if not torch.cuda.is_available():
        speed.gpu(lambda **row: rows.append(row), True)
        assert not rows and "no CUDA GPU here" in capsys.readouterr().out
    monkeypatch.setattr(speed, "_official_scan", lambda: (speed.ssd_chunked, ""))
    monkeypatch.setattr(speed, "ssd", lambda *arguments, backend: speed.ssd_chunked(*arguments))
    monkeypatch.setattr(torch, "compile", lambda scan, dynamic: scan)
    inputs = speed.inputs
    monkeypatch.setattr(speed, "inputs", lambda length, dtype: inputs(length // 64, dtype))
    speed.gpu(lambda **row: rows.append(row), True, "cpu")
    assert len(rows) == 3 * 2 * 5 and {row["scan"] for row in rows} == {"ours", "plain", "plain, compiled", "official", "backend"}
    assert all(row["to_floor"] > 0 for row in rows) and all(row["to_official"] == 1 for row in rows if row["scan"] == "official")


def test_progress_judges_a_run_anew_and_keeps_what_it_judged_before(monkeypatch, tmp_path, capsys):
    path, results = tmp_path / "run.pt", tmp_path / "results"
    run = train_tiny.Run(preset("tiny", vocab_size=len(train_tiny.VOCABULARY)), dict(steps=60, seed=0, objects=1, rate=2e-3), torch.device("cpu"))
    run.step, run.losses = 60, [(1, 0.5)] * 30 + [(4, 0.1)] * 30
    train_tiny.save(path, run.state())
    results.mkdir()
    rows = ("7,0.5", "60,0.1", "8,0.4", "90,0.1")                       # the third is of another run, the last of a longer one
    (results / "accuracy.csv").write_text("step,loss," + ",".join(progress.JUDGED) + "\n" + "".join(row + ",0.25" * 6 + "\n" for row in rows))
    monkeypatch.setattr(progress, "score", lambda model, *rest, **more: (None, dict.fromkeys(progress.JUDGED, 0.75)))
    call(monkeypatch, progress, path, "--watch", "--results", results, "--out", tmp_path / "training.png")
    assert "joint 75 %" in capsys.readouterr().out
    assert [(row["step"], row["joint"]) for row in common.Table(results / "accuracy.csv", resume=True).rows] == [("7", "0.25"), ("60", "0.75")]
    assert (results / "training.csv").read_text().split() == ["step,frames,loss", "25,1,0.5", "55,4,0.1"]
    assert (tmp_path / "training.png").stat().st_size > 5000
    assert progress.smooth([(1, 1, 0.5), (2, 1, 0.25), (3, 4, 0.1)]) == [(2, 1, 0.375), (3, 4, 0.1)]     # just begun


def test_adapt_moves_to_clips_four_times_as_long(monkeypatch):
    monkeypatch.setattr(train_tiny, "STAGES", train_tiny.STAGES)
    monkeypatch.setattr(train_tiny, "LONG_EVERY", train_tiny.LONG_EVERY)
    monkeypatch.setattr(train_tiny, "PERIOD", train_tiny.PERIOD)
    runs, init = [], train_tiny.Run.__init__
    monkeypatch.setattr(train_tiny.Run, "__init__", lambda self, *args: runs.append(self) or init(self, *args))
    monkeypatch.setattr(train_tiny.Run, "advance", lambda self: self.losses.append(train_tiny.training_batch(
        len(self.losses), self.settings["steps"], 0)[0].shape) or None)
    monkeypatch.setattr(train_tiny.Run, "averaged", lambda self: types.SimpleNamespace(after=len(self.losses)))
    monkeypatch.setattr(ablations, "validation_loss", lambda model, frames: (frames, model.after))
    monkeypatch.setattr(adapt, "moves_as_told", lambda model, captions, frames, seed: (model.after, model.vocabulary, captions, frames, seed))
    measured = adapt.child("DiT", 7, 4, 20, 3, 5)
    frames = [shape[2] for shape in runs[0].losses]
    assert [loss for loss, _ in measured] == [(16, step) for step in (20, 23, 26, 29, 32, 35, 38)] and len(frames) == 40
    assert [moves and (moves[0], *moves[2:]) for _, moves in measured] == [(20, 5, 16, 7), None, None, (29, 5, 16, 7), None, None, (38, 5, 16, 7)]
    assert measured[0][1][1] is train_tiny.VOCABULARY
    assert set(frames[:4]) == {1} and 4 in frames[4:20] and 16 not in frames[:20] and set(frames[20:]) == {1, 16}
    assert runs[0].model.config.grid == (1, 8, 8) and train_tiny.learning_rate(39, 80, 1.0) == 40 / 50
    configs = {model: dataclasses.asdict(preset("tiny", vocab_size=9, grid=(1, 8, 8), **changes)) for model, changes in adapt.MODELS.items()}
    for model, name in (("LinGen", "travel"), ("DiT", "mixer")):                            # one thing apart
        assert configs[model] != configs["without drift"]
        assert {key for key in configs[model] if configs[model][key] != configs["without drift"][key]} <= {name, "travel"}


def test_adapt_judges_every_second_by_itself(monkeypatch):
    def clips_for(model, captions, frames, options, seed):
        assert options["period"] == 0 and options["steps"] == train_tiny.SAMPLING["steps"] and seed == 4
        drawn = train_tiny.random_specs(3, torch.Generator().manual_seed(30_000_001 + seed), held_out_only=True)
        clips = train_tiny.render(drawn, torch.full((3, 1, 2), 9.5), frames)
        clips[0, :, 20] = clips[0, :, 3]                                # one frame of one film, in its second second
        yield from ((clip[None], [caption]) for clip, caption in zip(clips, captions))
    monkeypatch.setattr(judge, "clips_for", clips_for)
    assert adapt.moves_as_told(None, 3, 64, 4) == 11 / 12


def test_adapt_goes_on_and_sums_up(monkeypatch, tmp_path, capsys):
    made = []

    def run(script, threads, model, seed, frames, steps, every, captions):
        made.append((model, seed))
        worse = 1 + list(adapt.MODELS).index(model)
        return [[worse * (10 - step) + seed, step / 10 if step in (0, 1, 3) else None] for step in range(steps // every + 1)]
    monkeypatch.setattr(common, "in_fresh_process", run)
    options = ("--steps", 10, "--every", 3, "--out", tmp_path, "--plot", tmp_path / "plot.png")
    call(monkeypatch, adapt, *options, "--seeds", 1)
    call(monkeypatch, adapt, *options, "--seeds", 2)                    # goes on: seed 0 is not made again
    assert made == [(model, seed) for seed in (0, 1) for model in adapt.MODELS]
    rows = common.Table(tmp_path / "adapt.csv", resume=True).rows
    assert [row["step"] for row in rows] == ["0", "3", "6", "9"] and [row["DiT moves"] for row in rows] == ["0.00", "0.10", "", "0.30"]
    assert rows[1]["LinGen loss"] == "9.5000" and rows[1]["DiT loss"] == "27.5000" and rows[1]["dit_over_without_drift"] == "1.49"
    assert not importlib.util.find_spec("matplotlib") or (tmp_path / "plot.png").stat().st_size > 5000
    with pytest.raises(SystemExit):
        call(monkeypatch, adapt, *options, "--captions", 3)
    assert "other settings" in capsys.readouterr().err


def test_minute_counts_seconds_and_films(monkeypatch, tmp_path):
    def score(model, n, frames, options, held_out_only, seed):
        assert options["period"] == 8 and options["views"] == 3 and options["steps"] == train_tiny.SAMPLING["steps"]
        good = torch.ones(n, frames, dtype=torch.bool)
        good[0, 17] = False                                             # one frame of one film, in its second second
        return [dict(good=row) for row in good], dict(joint=(n - 1) / n, low=0.3, high=0.9)
    monkeypatch.setattr(judge, "score", score)
    monkeypatch.setattr(common, "in_fresh_process", lambda script, checkpoint, frames, period, views, device: dict(seconds=1.23, mib=float(10 * views + period), device=device))
    call(monkeypatch, minute, "--frames", 32, 64, "--captions", 2, "--period", 8, "--views", 3, "--device", "cpu", "--out", tmp_path, "--plot", tmp_path / "plot.png")
    rows = common.Table(tmp_path / "minute.csv", resume=True).rows
    assert [row["peak_mib"] for row in rows] == ["38", "38"]            # the clip that is timed has the same noise and views
    assert [(row["seconds_right"], row["all_right"]) for row in rows] == [("75.0 %", "50.0 %"), ("87.5 %", "50.0 %")]
    assert [row["right"] for row in common.Table(tmp_path / "minute_by_second.csv", resume=True).rows] == ["1.0", "0.5", "1.0", "1.0"]


def test_minute_makes_a_clip_by_sample_py():
    one = common.in_fresh_process(minute.__file__, checkpoint=str(ROOT / "assets" / "tiny.pt"), frames=4, period=2, views=1, device="cpu")
    assert one["seconds"] > 0 and one["mib"] > 100
