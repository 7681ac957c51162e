"""lingen.py: review tokens, MATE, the block, the denoiser, and every part taken out or swapped."""

import copy
import functools
import itertools
import math
import runpy

import pytest
import torch
import torch.nn.functional as F
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lingen
from lingen import MATE, LinGen, LinGenConfig, preset, review_tokens
from mamba2_ref import ssd_chunked, ssd_chunked_plain
from scan import SCANS, places
from tesa import windows

SMALL = dict(
    vocab_size=9, d_model=16, depth=4, nheads=2, d_state=4, headdim=8, chunk_size=8,
    grid=(2, 4, 4), patch=(2, 4, 4), window=(2, 2, 2), pool=(2, 2, 2), backend="torch",
)  # fmt: skip
VARIANTS = [
    dict(), dict(mixer="attention"), dict(ma=False), dict(tesa=False), dict(review=False),
    dict(scan="spatial-row"), dict(scan="temporal-column"), dict(scan="zigzag"), dict(ngroups=2),
    dict(predicts="velocity"), dict(grid=(0, 0, 0)), dict(grid=(0, 4, 4)),
    dict(expand=2.0, d_conv=3), dict(vocab_size=0, text_dim=7),
]  # fmt: skip
MASK = torch.tensor([[True] * 5, [True, True, False, False, False]])  # captions of 5 and 2 words


def config(**changes):
    return LinGenConfig(**{**SMALL, **changes})


def new_model(dtype=torch.float64, **changes):
    """A model whose zero-initialised gates and outputs are opened, so that something flows."""
    torch.manual_seed(0)
    model = LinGen(config(**changes))
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.3)
    return model.to(dtype)


def inputs(shape=(2, 3, 4, 16, 16), text_dim=0, dtype=torch.float64):
    """A clip, its times and captions of five words."""
    torch.manual_seed(1)
    clip, t = torch.randn(shape, dtype=dtype), torch.rand(shape[0], dtype=dtype)
    words = torch.randint(1, 10, (shape[0], 5))
    return clip, t, torch.randn(*words.shape, text_dim, dtype=dtype) if text_dim else words


def random_grid(*shape):
    torch.manual_seed(2)
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def close(got, want, atol=1e-10):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(4, 6, 8), (3, 5, 7), (1, 1, 1)])
@pytest.mark.parametrize("pool", [(2, 3, 4), (2, 2, 2), (1, 1, 1), (9, 1, 4)])
def test_review_tokens_are_means_of_blocks_also_of_cut_ones(shape, pool):
    grid = random_grid(2, *shape, 3)
    review = review_tokens(grid, pool)
    assert review.shape == (2, *(math.ceil(s / p) for s, p in zip(shape, pool)), 3)
    for t, y, x in itertools.product(*map(range, review.shape[1:4])):
        block = grid[:, t * pool[0] :, y * pool[1] :, x * pool[2] :]
        block = block[:, : pool[0], : pool[1], : pool[2]]
        close(review[:, t, y, x], block.mean((1, 2, 3)))


@pytest.mark.parametrize("layer", range(4))
def test_mate_adds_both_branches_with_review_tokens_at_both_ends(layer):
    mate = MATE(config(), layer).double()
    grid = random_grid(2, 3, 4, 5, 16)
    review = torch.empty(2, 2 * 2 * 3, 16, dtype=torch.float64)
    review[:, places(layer, (2, 2, 3)).flatten()] = review_tokens(grid, (2, 2, 2)).flatten(1, 3)
    tokens, place = torch.empty(2, 60, 16).double(), places(layer, (3, 4, 5)).flatten()
    tokens[:, place] = grid.flatten(1, 3)
    out = mate.ma(torch.cat([review, tokens, review], 1))[:, 12:72]
    close(mate(grid), out[:, place].view(grid.shape) + mate.tesa(grid))


@pytest.mark.parametrize("layer", range(4))
def test_tesa_hears_its_window_and_the_ma_branch_and_full_attention_all(layer):
    grid, number = random_grid(1, 3, 4, 5, 16), windows((3, 4, 5), (2, 2, 2), (layer % 2,) * 3)
    for changes in (dict(ma=False), dict(tesa=False), dict(mixer="attention")):
        mixer = new_model(**changes).blocks[layer].mixer
        (grad,) = torch.autograd.grad(mixer(grid)[0, 1, 2, 2].sum(), grid)
        wanted = number == number[1, 2, 2] if "ma" in changes else number >= 0
        assert torch.equal(grad[0].any(-1), wanted), changes


@pytest.mark.parametrize("review", [True, False])
def test_review_tokens_alone_carry_news_past_a_strong_decay_in_both_directions(review):
    mate = MATE(config(tesa=False, pool=(4, 8, 8), review=review)).double()
    torch.nn.init.constant_(mate.ma.A_log, 1.0)  # the state is forgotten within a few tokens
    torch.nn.init.constant_(mate.ma.dt_bias, 3.0)
    grid = random_grid(1, 4, 8, 8, 16)
    out = mate(grid)
    (first,) = torch.autograd.grad(out[0, 0, 0, 0].sum(), grid, retain_graph=True)
    (last,) = torch.autograd.grad(out[0, -1, -1, -1].sum(), grid)
    for news in (first[0, -1, -1, -1].abs().max(), last[0, 0, 0, 0].abs().max()):
        assert news > 1e-7 if review else news < 1e-20


def test_layers_rotate_the_scan_and_shift_every_second_window():
    mixers = [block.mixer for block in LinGen(config(depth=6, window=(4, 3, 2))).blocks]
    assert [mixer.order for mixer in mixers] == [*SCANS, *SCANS[:2]]
    assert [mixer.tesa.shift for mixer in mixers] == [(0, 0, 0), (2, 1, 1)] * 3
    assert {block.mixer.order for block in LinGen(config(scan="zigzag")).blocks} == {"zigzag"}
    for changes in (dict(), dict(ma=False)):  # offset moves the windows of all layers
        model, arguments = new_model(depth=2, **changes), inputs((2, 3, 10, 16, 16))
        moved, before = model(*arguments, offset=1), model(*arguments)
        even, odd = (block.mixer.tesa for block in model.blocks)
        even.shift, odd.shift = (1, 0, 0), (0, 1, 1)
        assert torch.equal(moved, model(*arguments)) and not torch.equal(moved, before)


@pytest.mark.parametrize("mixer", ["mate", "attention"])
def test_a_block_is_gated_mixing_then_cross_attention_then_gated_feed_forward(mixer):
    block = new_model(mixer=mixer).blocks[1]
    x, condition = random_grid(2, 2, 3, 4, 16), random_grid(2, 1, 1, 1, 16)
    text, mask = random_grid(2, 5, 16), MASK[:, None, None]
    scale1, shift1, gate1, scale2, shift2, gate2 = block.modulation(condition).chunk(6, -1)
    want = x + gate1 * block.mixer(F.layer_norm(x, (16,)) * (1 + scale1) + shift1)
    tokens = want.flatten(1, 3)
    q, k, v = block.cross.q(F.layer_norm(tokens, (16,))), *block.cross.kv(text).chunk(2, -1)
    q, k, v = (z.unflatten(-1, (2, 8)).transpose(1, 2) for z in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    want = (tokens + block.cross.proj(out.transpose(1, 2).flatten(2))).view(x.shape)
    want = want + gate2 * block.mlp(F.layer_norm(want, (16,)) * (1 + scale2) + shift2)
    close(block(x, condition, text, mask), want)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_variant_runs_at_several_sizes_and_learns_in_all_parameters(changes):
    model = new_model(**changes)
    for shape in ((1, 3, 1, 16, 16), (1, 3, 1, 20, 4), (1, 3, 10, 20, 12), (2, 3, 4, 16, 16)):
        arguments = inputs(shape, changes.get("text_dim", 0))
        out = model(*arguments)
        assert out.shape == shape and out.isfinite().all()
    out.square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    close(copy.deepcopy(model)(*arguments), out)


def test_a_function_with_the_signature_of_the_official_scan_is_a_backend():
    calls, arguments = [], inputs()
    kernel = lambda *given, **options: calls.append({*options}) or ssd_chunked(*given, **options)
    close(new_model(backend=kernel)(*arguments), new_model(backend="torch")(*arguments))
    assert calls == 4 * [{"dt_bias", "dt_softplus", "dt_limit"}]  # once a layer
    model = new_model(backend=ssd_chunked_plain)  # torch.func refuses the fast scan's own gradient
    weights = dict(model.named_parameters())
    loss = lambda weights: torch.func.functional_call(model, weights, arguments).square().mean()
    loss(weights).backward()
    close(torch.func.grad(loss)(weights), {name: p.grad for name, p in weights.items()})


def test_patches_stay_in_their_place_and_one_frame_is_a_clip_without_motion():
    """Without blocks, and with the identity around the last norm, each patch is its own norm."""
    model = LinGen(config(depth=0, d_model=96, grid=(0, 0, 0))).double()
    for layer in (model.patch_in, model.patch_out):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    clip, t, text = inputs((2, 3, 4, 8, 12))
    got, want = model(clip, t, text), clip.clone()
    for f, y, x in itertools.product((0, 2), (0, 4), (0, 4, 8)):
        patch = want[:, :, f : f + 2, y : y + 4, x : x + 4]
        patch.copy_(F.layer_norm(patch, patch.shape[1:]))
    close(got, want)
    model, still = new_model(), clip[:, :, :1]  # one frame is a clip without motion
    moving = model(still.expand(-1, -1, 2, -1, -1), t, text)
    close(model(still, t, text), moving.mean(2, keepdim=True))


@pytest.mark.parametrize("mixer", ["mate", "attention"])
def test_position_tables_crop_interpolate_and_are_added_along_their_axes(mixer):
    table = torch.tensor([[0.0], [1.0], [2.0]])
    for size, want in ((2, [0, 1]), (3, [0, 1, 2]), (5, [0, 0.5, 1, 1.5, 2])):
        close(lingen.position_table(table, size).flatten(), torch.tensor(want).float())
    model, seen = new_model(mixer=mixer), []
    torch.nn.init.zeros_(model.patch_in.bias)
    model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    clip, t, text = inputs((1, 3, 4, 12, 16))
    model(0 * clip, t, text)
    t, h, w = (model.positions[axis] for axis in "thw")
    close(seen[0][0], t[:, None, None] + h[:3, None] + w)


@pytest.mark.parametrize("text_dim", [0, 7])
def test_padding_neighbours_and_the_form_of_a_caption_do_not_matter(text_dim):
    model = new_model(vocab_size=0 if text_dim else 9, text_dim=text_dim)
    clip, t, text = inputs(text_dim=text_dim)
    out = model(clip, t, text, MASK)
    other = torch.where(MASK[..., None] if text_dim else MASK, text, text.flip(1))
    close(model(clip, t, other, MASK), out)
    close(model(clip[1:], t[1:], text[1:, :2])[0], out[1])
    null = model(clip, t, text, MASK & False)
    close(model(clip, t, text[:, :0]), null)
    if not text_dim:
        close(model(clip, t, text * MASK), out)  # word number 0 is padding
        close(model(clip, t, text * 0), null)
    for other in (null, model(clip, t / 2, text, MASK)):  # caption and time do matter
        assert (other - out).abs().amax((1, 2, 3, 4)).min() > 1e-4


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_comes_close(autocast):
    (clip, t, text), dtype = inputs(), torch.float32 if autocast else torch.bfloat16
    want = new_model()(clip, t, text)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = new_model(dtype)(clip.to(dtype), t.to(dtype), text)
    close(out.double() / want.std(), want / want.std(), atol=0.2)


def test_compiled_equals_eager():
    model, arguments = new_model(depth=1, chunk_size=32), inputs()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(*arguments)  # no break
    eager = model(*arguments)
    close(compiled, eager)
    weights = [*model.parameters()]
    for a, c in zip(*(torch.autograd.grad(out.sum(), weights) for out in (compiled, eager))):
        close(a, c, atol=1e-9 * c.abs().max().item())


def test_export_and_activation_checkpointing_leave_the_numbers_alone():
    model, arguments = new_model(depth=2), (*inputs(), MASK)
    want = model(*arguments)
    grads = torch.autograd.grad(want.sum(), [*model.parameters()])
    close(torch.export.export(model, arguments).module()(*arguments), want)
    close(model(*arguments), want)
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    again = torch.autograd.grad(model(*arguments).sum(), [*model.parameters()])
    for got, grad in zip(again, grads):
        close(got, grad)


@pytest.fixture
def one_process(tmp_path):
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_distributed_data_parallel_finds_no_unused_parameter(one_process):
    model = DistributedDataParallel(LinGen(preset("tiny")))
    for frames in (1, 4):  # an unused parameter makes the second step raise
        out = model(*inputs((2, 3, frames, 8, 8), dtype=torch.float32))
        out.square().mean().backward()


def test_fully_sharded_equals_plain(one_process):
    model, mesh = new_model(), distributed.device_mesh.init_device_mesh("cpu", (1,))
    want = model(*inputs())
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    close(model(*inputs()), want)


def test_the_tiny_model_overfits_one_batch():
    clip, t, text = inputs((2, 3, 4, 16, 16), dtype=torch.float32)
    model, clip, t = LinGen(preset("tiny")), clip.sign(), 0 * t
    noisy = torch.randn_like(clip)  # at t = 0 only the caption tells
    optimizer, losses = torch.optim.Adam(model.parameters(), 2e-3), []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append((model(noisy, t, text) - clip).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[0].item() == pytest.approx(1) and losses[-1] < 0.3


def test_cost_is_linear_in_the_frames_and_that_of_the_dit_is_not():
    for mixer, low, high in (("mate", 1.98, 2.02), ("attention", 2.5, 4.0)):
        cost = []
        for frames in (128, 256, 512):
            with torch.device("meta"), FlopCounterMode(display=False) as counter:
                model = LinGen(preset("tiny", backend="torch", depth=2, mixer=mixer))
                model(*inputs((1, 3, frames, 24, 24), dtype=torch.float32))
            cost.append(counter.get_total_flops())
        assert low < (cost[2] - cost[1]) / (cost[1] - cost[0]) < high, mixer


def test_presets_have_their_size_and_unknown_ones_raise():
    for name, low, high in (("tiny", 1e6, 3e6), ("small", 1e8, 5e8), ("4b", 3.8e9, 4.2e9)):
        with torch.device("meta"):
            size = sum(p.numel() for p in LinGen(preset(name)).parameters())
        assert low < size < high, f"{name} has {size:,} parameters"
    with pytest.raises(ValueError, match="tiny, small, 4b"):
        preset("large")


def test_wrong_configs_and_clips_that_patches_do_not_fill_raise():
    for name in ("mixer", "predicts", "scan", "backend"):
        with pytest.raises(ValueError, match="'no'"):
            LinGen(config(**{name: "no"}))
    for changes in (dict(patch=(0, 4, 4)), dict(window=(2, 2, -1)), dict(d_model=0)):
        with pytest.raises(ValueError, match="sizes must be at least 1"):
            config(**changes)
    for changes in (dict(ma=False, tesa=False), dict(vocab_size=0), dict(text_dim=3)):
        with pytest.raises(ValueError, match="keep ma or tesa|set vocab_size or text_dim"):
            config(**changes)
    for shape in ((1, 3, 3, 16, 16), (1, 3, 4, 17, 16), (1, 3, 1, 16, 2)):
        with pytest.raises(ValueError, match="multiples of the patch"):
            LinGen(config())(*inputs(shape, dtype=torch.float32))


def test_the_script_prints_frames_tokens_and_operations(capsys):
    runpy.run_path(lingen.__file__, run_name="__main__")
    rows = [row.split() for row in capsys.readouterr().out.splitlines()[2:]]
    assert ["-".join(row[:2]) for row in rows] == "16-288 64-1,152 272-4,896 1088-19,584".split()
    assert float(rows[-1][2]) < float(rows[-1][3]) / 4
