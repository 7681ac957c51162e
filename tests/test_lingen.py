"""Review tokens, MATE, the block and the whole denoiser: what reaches what, what it costs, and what is refused."""
import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lingen
from lingen import MATE, LinGen, LinGenConfig, pixels, preset, review_tokens

SMALL = dict(vocab_size=9, d_model=16, depth=4, nheads=2, d_state=4, headdim=8, chunk_size=8, grid=(2, 4, 4), patch=(2, 4, 4),
             window=(2, 2, 2), pool=(2, 2, 2))
VARIANTS = [dict(), dict(mixer="attention"), dict(tesa=False), dict(ma=False), dict(review=False), dict(scan="spatial-row"),
            dict(scan="zigzag"), dict(predicts="velocity"), dict(ngroups=2), dict(grid=(0, 0, 0)), dict(travel=True)]


def awake(model):
    """A model whose zero-initialised gates and outputs are opened, so that something flows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.3)
    return model.double()


@pytest.mark.parametrize("shape, pool", [((4, 6, 8), (2, 3, 4)), ((3, 5, 7), (2, 2, 2)), ((1, 1, 1), (4, 4, 4)), ((5, 2, 9), (2, 4, 3)), ((2, 3, 4), (1, 1, 1))])
def test_review_tokens_are_block_means(shape, pool):
    grid = torch.randn(2, *shape, 3, dtype=torch.float64)
    review = review_tokens(grid, pool)
    assert review.shape == (2, *(-(-s // p) for s, p in zip(shape, pool)), 3)
    for t in range(review.shape[1]):
        for y in range(review.shape[2]):
            for x in range(review.shape[3]):
                block = grid[:, t * pool[0] : (t + 1) * pool[0], y * pool[1] : (y + 1) * pool[1], x * pool[2] : (x + 1) * pool[2]]
                torch.testing.assert_close(review[:, t, y, x], block.mean((1, 2, 3)))


def test_review_tokens_reach_both_directions(monkeypatch):
    """With the state cut between the tokens and all that is far, only the overview can carry news across the clip.

    The decay is set so strong that nothing survives more than a few tokens. Then the first real token learns of the
    last one only through the review tokens in front of it, and the last of the first only through those behind it.
    """
    config = LinGenConfig(**{**SMALL, "tesa": False, "pool": (4, 8, 8)})
    for review in (True, False):
        torch.manual_seed(0)
        mate = MATE(dataclasses.replace(config, review=review), layer=0).double()
        with torch.no_grad():
            mate.ma.A_log.fill_(1.0)
            mate.ma.dt_bias.fill_(3.0)
        grid = torch.randn(1, 4, 8, 8, 16, dtype=torch.float64, requires_grad=True)
        out = mate(grid)
        first, = torch.autograd.grad(out[0, 0, 0, 0].sum(), grid, retain_graph=True)
        last, = torch.autograd.grad(out[0, -1, -1, -1].sum(), grid)
        to_first, to_last = first[0, -1, -1, -1].abs().max(), last[0, 0, 0, 0].abs().max()
        if review:
            assert to_first > 1e-7 and to_last > 1e-7
        else:
            assert to_first < 1e-20 and to_last < 1e-20


@pytest.mark.parametrize("layer", range(4))
def test_ma_branch_sees_everything_and_tesa_its_window(layer):
    grid = torch.randn(1, 3, 4, 5, 16, dtype=torch.float64, requires_grad=True)
    for part, everywhere in (("tesa", True), ("ma", False)):       # the part that is taken out
        torch.manual_seed(0)
        mate = MATE(LinGenConfig(**{**SMALL, part: False}), layer).double()
        reach = torch.autograd.grad(mate(grid)[0, 1, 2, 2].sum(), grid)[0][0].abs().sum(-1) > 0
        assert reach.all() if everywhere else 1 <= reach.sum() <= 8


def test_layers_turn_the_scan_and_shift_the_windows():
    config = LinGenConfig(**SMALL)
    assert [config.order(layer) for layer in range(5)] == [*lingen.SCANS[:4], lingen.SCANS[0]]
    assert [config.shift(layer) for layer in range(3)] == [(0, 0, 0), (1, 1, 1), (0, 0, 0)]
    model = LinGen(config)
    assert [block.mixer.order for block in model.blocks] == list(lingen.SCANS[:4])
    assert [block.mixer.tesa.shift for block in model.blocks] == [(0, 0, 0), (1, 1, 1)] * 2
    for torus, travel in ((False, True), (True, False)):
        assert all((block.mixer.tesa.torus, block.mixer.tesa.travel) == (torus, travel) for block in LinGen(LinGenConfig(**SMALL, torus=torus, travel=travel)).blocks)


@pytest.mark.parametrize("change", VARIANTS)
def test_every_variant_runs_at_every_size_and_learns(change):
    torch.manual_seed(0)
    model = awake(LinGen(LinGenConfig(**{**SMALL, **change})))
    for shape in ((2, 3, 4, 16, 16), (1, 3, 1, 16, 16), (1, 3, 10, 20, 12)):        # trained size, still image, longer and odd
        clip, text = torch.randn(shape, dtype=torch.float64), torch.randint(1, 10, (shape[0], 5))
        out = model(clip, torch.rand(shape[0], dtype=torch.float64), text)
        assert out.shape == clip.shape and torch.isfinite(out).all()
    model.zero_grad()
    model(torch.randn(2, 3, 4, 16, 16, dtype=torch.float64), torch.rand(2, dtype=torch.float64), torch.randint(1, 10, (2, 5))).square().mean().backward()
    for name, p in model.named_parameters():
        if "positions" not in name:
            assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any(), name


def test_caption_padding_and_neighbours_do_not_matter():
    torch.manual_seed(0)
    model = awake(LinGen(LinGenConfig(**SMALL, travel=True)))
    clip, t = torch.randn(2, 3, 4, 16, 16, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    text = torch.tensor([[1, 2, 3], [4, 5, 0]])
    out = model(clip, t, text)
    torch.testing.assert_close(model(clip[1:], t[1:], text[1:, :2])[0], out[1])
    empty = model(clip, t, torch.zeros_like(text))
    assert torch.isfinite(empty).all()
    torch.testing.assert_close(model(clip, t, text[:, :0]), empty)
    assert not torch.allclose(out[1], empty[1])


def test_word_order_matters():
    torch.manual_seed(0)
    model = awake(LinGen(LinGenConfig(**SMALL)))
    clip, t = torch.randn(1, 3, 4, 16, 16, dtype=torch.float64), torch.rand(1, dtype=torch.float64)
    assert not torch.allclose(model(clip, t, torch.tensor([[1, 2]])), model(clip, t, torch.tensor([[2, 1]])))


def test_words_say_how_positions_move():
    torch.manual_seed(0)
    new = LinGen(LinGenConfig(**{**SMALL, "d_model": 18, "nheads": 3, "headdim": 6}, travel=True))
    words, mask = torch.randn(2, 4, 18), torch.tensor([[True] * 4, [True, True, False, False]])
    assert not new.drift(words, mask).any()          # and nothing moves before anything is learnt
    model = awake(new)
    got = model.drift(words.double(), mask)
    assert got.shape == (2, 3, 2)
    for clip, own in enumerate([words[0], words[1, :2]]):
        said = model.motion(torch.nn.functional.layer_norm(own.double(), (18,)))        # (words, 3 heads)
        for head in range(3):
            heard, along_h, along_w = said[:, 3 * head : 3 * head + 3].T
            share = heard.exp() / heard.exp().sum()
            torch.testing.assert_close(got[clip, head], torch.stack([(share * along_h).sum(), (share * along_w).sum()]))
    seen = []                                           # and every layer's TESA hears of it
    for block in model.blocks:
        block.mixer.tesa.register_forward_pre_hook(lambda tesa, args: seen.append(args[1]))
    model(torch.randn(1, 3, 4, 16, 16, dtype=torch.float64), torch.rand(1, dtype=torch.float64), torch.tensor([[1, 2]]))
    assert len(seen) == 4 and seen[0].any() and all(torch.equal(drift, seen[0]) for drift in seen)
    for change in (dict(travel=False), dict(tesa=False), dict(mixer="attention")):      # where nothing could move, nothing is asked
        assert LinGen(LinGenConfig(**{**SMALL, "travel": True, **change})).motion is None


def test_embeddings_in_place_of_words():
    config = LinGenConfig(**{**SMALL, "vocab_size": 0, "text_dim": 7}, travel=True)
    clip = torch.randn(2, 3, 4, 16, 16)
    assert LinGen(config)(clip, torch.rand(2), torch.randn(2, 3, 7)).shape == clip.shape


def test_position_tables_crop_and_stretch():
    table = torch.tensor([[0.0], [1.0], [2.0]])
    torch.testing.assert_close(lingen.position_table(table, 2), table[:2])
    torch.testing.assert_close(lingen.position_table(table, 5), torch.tensor([[0.0], [0.5], [1.0], [1.5], [2.0]]))


def flops(config, frames):
    with torch.device("meta"):
        model = LinGen(config)
        clip, t, text = torch.empty(1, 3, frames, 32, 32), torch.empty(1), torch.zeros(1, 4, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(clip, t, text)
    return counter.get_total_flops()


def test_cost_is_linear_in_the_length_and_the_dits_is_not():
    """Operations counted for clips of 64, 128 and 256 frames: twice the frames, twice the cost."""
    mate = [flops(preset("tiny", vocab_size=9), f) for f in (64, 128, 256)]
    assert (mate[2] - mate[1]) / (mate[1] - mate[0]) == pytest.approx(2, rel=0.01)
    full = [flops(preset("tiny", vocab_size=9, mixer="attention"), f) for f in (64, 128, 256)]
    assert (full[2] - full[1]) / (full[1] - full[0]) > 2.5


def test_presets_build():
    with torch.device("meta"):
        for name, low, high in (("tiny", 1e6, 3e6), ("small", 1e8, 5e8), ("4b", 3.8e9, 4.4e9)):
            config = preset(name, vocab_size=40) if name == "tiny" else preset(name)
            assert low < sum(p.numel() for p in LinGen(config).parameters()) < high
    with pytest.raises(ValueError, match="tiny, small, 4b"):
        preset("large")


def test_one_batch_is_overfitted():
    torch.manual_seed(0)
    model = LinGen(LinGenConfig(**{**SMALL, "d_model": 64, "depth": 2}))
    clip, t, text = torch.rand(2, 3, 4, 16, 16).round() * 2 - 1, torch.tensor([0.02, 0.02]), torch.tensor([[1, 2], [3, 4]])
    noisy = 0.98 * torch.randn_like(clip) + 0.02 * clip             # so noisy that the clip must come from the caption
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(noisy, t, text) - clip).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.02


def test_config_survives_a_round_trip_and_refuses_nonsense():
    config = LinGenConfig(**SMALL)
    assert LinGenConfig(**dataclasses.asdict(config)) == config
    assert LinGenConfig(**{**dataclasses.asdict(config), "patch": [2, 4, 4]}) == config
    for wrong, message in ((dict(patch=(0, 4, 4)), "patch"), (dict(patch=4), "patch"), (dict(d_model=15), "d_model"), (dict(headdim=24), "headdim"), (dict(mlp_ratio=0), "mlp_ratio"), (dict(ngroups=3), "ngroups"), (dict(depth=0), "depth"),
                           (dict(scan="diagonal"), "scan"), (dict(mixer="rnn"), "mixer"), (dict(ma=False, tesa=False), "branches"),
                           (dict(vocab_size=0), "words"), (dict(text_dim=3), "words"), (dict(nheads=3), "nheads"), (dict(backend="jax"), "backend"),
                           (dict(predicts="noise"), "predicts"), (dict(depth=2.0), "depth"), (dict(window=(2, 2, "2")), "window")):
        with pytest.raises(ValueError, match=message):
            LinGenConfig(**{**SMALL, **wrong})
    with pytest.raises(TypeError, match="LinGenConfig"):
        LinGen(SMALL)


@pytest.mark.parametrize("clip, t, text, message", [
    ((1, 4, 4, 16, 16), (1,), (1, 3), "clip must"), ((1, 3, 4, 16), (1,), (1, 3), "clip must"), ((1, 3, 3, 16, 16), (1,), (1, 3), "frames=3"),
    ((1, 3, 4, 17, 16), (1,), (1, 3), "height=17"), ((1, 3, 4, 16, 2), (1,), (1, 3), "width=2"), ((1, 3, 4, 16, 16), (2,), (1, 3), "one time per clip"), ((1, 3, 4, 2, 16), (1,), (1, 3), "height=2 must be a multiple of the patch .4.: take 4$"),
    ((1, 3, 4, 16, 16), (1,), (2, 3), "text must"), ((1, 3, 4, 16, 16), (1,), (1, 65), "65 words"), ((0, 3, 4, 16, 16), (0,), (0, 3), "clip must")])
def test_what_does_not_fit_is_named(clip, t, text, message):
    with pytest.raises(ValueError, match=message):
        LinGen(LinGenConfig(**SMALL))(torch.zeros(clip), torch.zeros(t), torch.zeros(text, dtype=torch.long))


@pytest.mark.parametrize("grid, pool", [(torch.zeros(2, 3, 4), (1, 1, 1)), (torch.zeros(1, 2, 2, 2, 1), (0, 1, 1)), (torch.zeros(1, 2, 2, 2, 1), (2, 2))])
def test_review_tokens_refuse_what_is_no_grid(grid, pool):
    with pytest.raises(ValueError, match="grid|pool"):
        review_tokens(grid, pool)


@pytest.mark.parametrize("word", [-1, 10, 10**6])
def test_unknown_word_numbers_are_named(word):
    with pytest.raises(ValueError, match="0 ... 9"):
        LinGen(LinGenConfig(**SMALL))(torch.zeros(1, 3, 4, 16, 16), torch.zeros(1), torch.tensor([[1, word]]))


def test_pixels_are_bounded_and_trust_what_one_sees_by_wieners_rule():
    clip = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1, 1)
    blank = torch.zeros_like(clip)
    assert pixels(blank, clip, torch.zeros(1)).abs().max() == 0                     # pure noise says nothing
    seen = torch.linspace(-1, 1, 21).view(1, 1, 1, 1, 21)
    late = pixels(torch.zeros_like(seen), seen, torch.ones(1))                      # no noise left: what one sees is what it is,
    torch.testing.assert_close(late, 0.97 * seen)                                   # soft edges too
    assert pixels(blank, 5 * clip, torch.full((1,), 0.99)).abs().max() == pytest.approx(0.98)
    assert pixels(blank + 20, clip, torch.full((1,), 0.99)).min() == 1              # the network may overrule it
    t = 1 / 1.1                                                                     # s = 0.1, as large as the network's error: half
    torch.testing.assert_close(pixels(torch.zeros_like(seen), seen, torch.tensor([t])), 0.97 * seen / 2)
    t = 1 / 1.3                                                                     # s = 0.3: 1 to 9
    torch.testing.assert_close(pixels(torch.zeros_like(seen), seen, torch.tensor([t])), 0.97 * seen / 10)
