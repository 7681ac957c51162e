"""The three forms of the scan against each other, and the layers."""
import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mamba2_ref
from mamba2_ref import (
    BidirectionalMamba2,
    Mamba2,
    choose_scan,
    ssd_bidirectional,
    ssd_chunked,
    ssd_chunked_plain,
    ssd_quadratic,
    ssd_recurrent,
)

ROOT = Path(__file__).resolve().parent.parent
FORMS = [ssd_quadratic, ssd_chunked_plain, ssd_chunked]
OPTIONS = ("D", "D2", "z", "dt_bias", "initial_states", "seq_idx", "dt_softplus", "dt_limit")
LAYERS = [Mamba2, BidirectionalMamba2]


@pytest.fixture
def small_segments(monkeypatch):
    """Several segments and several groups of chunks even at the sizes of a test."""
    monkeypatch.setitem(mamba2_ref.SEGMENT, "cpu", 200)


def draw(l, options=(), b=2, h=4, p=3, g=2, n=5, dtype=torch.float64, seed=0):
    """(tensors that get a gradient, the other arguments)."""
    make = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=make, dtype=torch.float64)
    tensors = dict(x=randn(b, l, h, p), dt=randn(b, l, h).abs() / 2, A=-randn(h).abs() - 0.05,
                   B=randn(b, l, g, n), C=randn(b, l, g, n))
    shapes = dict(D=(h,), D2=(h, p), z=(b, l, h, p), dt_bias=(h,), initial_states=(b, h, p, n))
    for name, shape in shapes.items():
        if name in options:
            tensors[name.replace("2", "")] = randn(*shape)
    rest = {}
    if "seq_idx" in options:
        rest["seq_idx"] = (torch.rand(b, l, generator=make) < 0.2).long().cumsum(1)
    if "dt_softplus" in options:
        rest["dt_softplus"] = True
    if "dt_limit" in options:
        rest["dt_limit"] = (0.1, 0.8)
    return {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}, rest


def run(form, tensors, rest=None, **options):
    """Outputs, and the gradient of every tensor, for one fixed random loss."""
    out = form(**tensors, **(rest or {}), **options)
    out = list(out) if isinstance(out, tuple) else [out]
    make = torch.Generator().manual_seed(1)
    loss = sum((o.double() * torch.randn(o.shape, generator=make).double()).sum() for o in out)
    names = ["y", "final_states"][: len(out)] + ["d" + name for name in tensors]
    return dict(zip(names, out + list(torch.autograd.grad(loss, list(tensors.values())))))


def check_equal(got, wanted, tolerance=1e-12):
    """RMS error over RMS, and largest error over largest entry, of every tensor."""
    for name, want in wanted.items():
        error, want = (got[name] - want).detach().double(), want.detach().double()
        assert torch.isfinite(error).all(), name
        assert error.norm() <= tolerance * want.norm() + 1e-30, name
        assert error.abs().max() <= tolerance * want.abs().max() + 1e-30, name


def flipped_sum(x, dt, A, B, C, D=None, z=None, **options):
    """What `ssd_bidirectional` must give."""
    y = ssd_recurrent(x, dt, A, B, C, **options)
    y = y + ssd_recurrent(x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1), **options).flip(1)
    y = y if D is None else y + D[:, None] * x
    return y if z is None else y * F.silu(z)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [(), *[(o,) for o in OPTIONS], OPTIONS])
@pytest.mark.parametrize("l, Q, h, g", [(1, 4, 4, 2), (4, 4, 4, 4), (5, 4, 4, 1), (21, 8, 6, 3),
                                        (29, 4, 4, 2), (6, 64, 4, 2)])
def test_forms_agree_over_lengths_options_and_groups(form, l, Q, h, g, options, small_segments):
    tensors, rest = draw(l, options, h=h, g=g)
    got = run(form, tensors, rest, chunk_size=Q, return_final_states=True)
    check_equal(got, run(ssd_recurrent, tensors, rest, return_final_states=True))


@pytest.mark.parametrize("l, Q", [(1, 4), (4, 4), (21, 8), (6, 64)])
@pytest.mark.parametrize("h, g", [(4, 1), (6, 3)])
def test_bidirectional_is_the_sum_of_both_directions(l, Q, h, g, small_segments):
    tensors, rest = draw(l, ("D", "z", "dt_bias", "dt_softplus", "dt_limit"), h=h, g=g)
    got = run(ssd_bidirectional, tensors, rest, chunk_size=Q)
    check_equal(got, run(flipped_sum, tensors, rest))


@pytest.mark.parametrize("options", [(), OPTIONS])
def test_gradients_are_finite_differences(options, small_segments):
    tensors, rest = draw(5, options, b=1, h=2, p=2, g=1, n=2)

    def form(*values):
        named = dict(zip(tensors, values))
        return ssd_chunked(**named, **rest, chunk_size=2, return_final_states=True)
    assert torch.autograd.gradcheck(form, tuple(tensors.values()))


def test_strong_decays_cost_few_digits_of_the_gradient_of_a_in_float32():
    """What a token reads of itself does not decay; in the sums of dA it would cancel."""
    tensors, _ = draw(64)
    with torch.no_grad():
        tensors["A"] *= 400
    single = {name: t.detach().float().requires_grad_() for name, t in tensors.items()}
    got, want = run(ssd_chunked, single)["dA"], run(ssd_recurrent, tensors)["dA"]
    check_equal(dict(dA=got), dict(dA=want), tolerance=2e-4)  # with the diagonal 1.5e-3


@pytest.mark.parametrize("form", FORMS)
def test_a_state_may_also_grow(form):
    """A is negative in every Mamba2, but nothing in the mathematics asks for it."""
    tensors, _ = draw(11)
    with torch.no_grad():
        tensors["A"][::2] *= -1
    check_equal(run(form, tensors, chunk_size=4), run(ssd_recurrent, tensors))


def test_packed_sequences_are_sequences_of_their_own():
    tensors, _ = draw(17, b=1, dtype=torch.float32)
    seq_idx = torch.tensor([[0] * 3 + [1] * 5 + [7] * 9])
    packed = ssd_chunked(**tensors, seq_idx=seq_idx, chunk_size=4)
    for s in (slice(0, 3), slice(3, 8), slice(8, 17)):      # a border in a chunk, one at its edge
        cut = {name: t if name == "A" else t[:, s] for name, t in tensors.items()}
        torch.testing.assert_close(packed[:, s], ssd_recurrent(**cut))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_at_the_end(dtype):
    tensors, _ = draw(200, ("D", "z", "initial_states"), dtype=dtype)
    got = run(ssd_chunked, tensors, return_final_states=True)
    assert got["y"].dtype == got["dx"].dtype == dtype and got["final_states"].dtype == torch.float32
    double = {name: t.detach().double() for name, t in tensors.items()}
    y, state = ssd_recurrent(**double, return_final_states=True)
    check_equal({"state": got["final_states"]}, {"state": state}, 1e-5)     # kept in float32
    check_equal({"y": got["y"]}, {"y": y}, max(torch.finfo(dtype).eps, 1e-5))
    assert all(torch.isfinite(value).all() for value in got.values())


@pytest.mark.parametrize("form", [ssd_chunked, ssd_bidirectional])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3, 1e30])
def test_any_decay_gives_finite_values_and_gradients(size, form):
    tensors, _ = draw(40, dtype=torch.float32)
    tensors["dt"] = (tensors["dt"].detach() * size).requires_grad_()
    assert all(torch.isfinite(v).all() for v in run(form, tensors, chunk_size=8).values())


def test_autocast_leaves_the_sums_in_float32_in_both_passes():
    tensors, _ = draw(64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(ssd_chunked, tensors)
    assert all(torch.equal(inside[name], t) for name, t in run(ssd_chunked, tensors).items())


def test_work_is_linear_and_operations_grow_with_the_logarithm(monkeypatch):
    """Counted, not timed, and as on a GPU: a segment takes all chunks."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    class Count(TorchDispatchMode):
        launches = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.launches += not func.is_view
            return func(*args, **(kwargs or {}))
    monkeypatch.setitem(mamba2_ref.SEGMENT, "cpu", 2**40)
    flops, launches = [], []
    for l in (2**10, 2**15):
        tensors, _ = draw(l, b=1, dtype=torch.float32)
        with FlopCounterMode(display=False) as counter, Count() as count:
            ssd_chunked(**tensors)
        flops.append(counter.get_total_flops())
        launches.append(count.launches)
    assert 30 < flops[1] / flops[0] < 34 and launches[0] < 75 and launches[1] - launches[0] < 25


@pytest.mark.parametrize("form", [ssd_chunked, ssd_bidirectional])
def test_inputs_are_left_alone_and_strides_do_not_matter(form):
    tensors, _ = draw(10, ("D", "z"))
    before = {name: t.detach().clone() for name, t in tensors.items()}
    wanted = form(**tensors, chunk_size=4)
    odd = {name: torch.stack([t, t], -1)[..., 0] for name, t in tensors.items()}
    torch.testing.assert_close(form(**odd, chunk_size=4), wanted, rtol=1e-13, atol=1e-13)
    assert all(torch.equal(tensors[name], t) for name, t in before.items())


def layer_and_tokens(layer, dtype=torch.float32, **options):
    torch.manual_seed(0)
    u = torch.randn(2, 21, 16, dtype=dtype, requires_grad=True)
    return layer(16, d_state=4, headdim=8, chunk_size=4, **options).to(dtype), u


def test_a_causal_layer_sees_only_the_past_and_a_bidirectional_one_all():
    for cls in LAYERS:
        layer, u = layer_and_tokens(cls, torch.float64)
        for t in (0, 9, 20):
            seen = torch.autograd.grad(layer(u)[0, t].sum(), u)[0][0].abs().sum(-1) > 0
            assert seen.tolist() == [cls is BidirectionalMamba2 or s <= t for s in range(21)]


def test_both_layers_have_the_parameters_of_mamba_ssm():
    one, both = (cls(16, d_state=4, headdim=8, ngroups=2) for cls in LAYERS)
    both.load_state_dict(one.state_dict())
    assert list(one.state_dict()) == ["dt_bias", "A_log", "D", "in_proj.weight", "conv1d.weight",
                                      "conv1d.bias", "norm.weight", "out_proj.weight"]
    dt = F.softplus(Mamba2(512, headdim=4, d_state=4).dt_bias)
    assert 0.001 <= dt.min() < 0.002 and 0.08 < dt.max() <= 0.1001


def test_shifted_multiply_adds_are_conv1d():
    for bias in (True, False):
        layer, _ = layer_and_tokens(Mamba2, conv_bias=bias)
        x = torch.randn(2, 11, layer.conv1d.weight.shape[0])
        torch.testing.assert_close(layer.convolve(x), layer.conv1d(x.mT)[..., :11].mT)


COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.mark.parametrize("cls, compiler", [
    (Mamba2, "aot_eager"), (BidirectionalMamba2, "aot_eager"),
    pytest.param(BidirectionalMamba2, "inductor", marks=COMPILER)])
def test_a_compiled_layer_equals_eager_forward_and_backward(cls, compiler):
    layer, u = layer_and_tokens(cls)
    tensors = [u, *layer.parameters()]
    results = []
    for call in (layer, torch.compile(layer, backend=compiler, fullgraph=True)):
        y = call(u)
        results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", LAYERS)
def test_export_and_deepcopy_leave_the_layer_as_it_was(cls):
    layer, u = layer_and_tokens(cls)
    wanted = layer(u)
    exported = torch.export.export(layer, (u.detach(),)).module()
    for call in (exported, copy.deepcopy(layer), layer):
        torch.testing.assert_close(call(u), wanted)


def test_auto_says_once_what_it_takes(capsys):
    mamba2_ref.say_once.cache_clear()
    for _ in range(2):
        assert choose_scan("auto", torch.device("cpu")) is ssd_chunked
    assert capsys.readouterr().err.count("scan on cpu by torch") == 1


def test_a_backend_that_is_not_there_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(mamba2_ref, "official_scan", lambda: (None, "ImportError: triton"))
    with pytest.raises(ValueError, match="pip install.*triton"):
        Mamba2(16, headdim=8, backend="mamba_ssm")
    with pytest.raises(ValueError, match="jax"):
        Mamba2(16, headdim=8, backend="jax")


@pytest.mark.parametrize("cls", LAYERS)
def test_a_kernel_of_ones_own_runs_inside_the_layer(cls):
    calls = []

    def kernel(x, dt, A, B, C, chunk_size, **options):
        calls.append(x.shape[0])
        return ssd_recurrent(x, dt, A, B, C, chunk_size, **options)
    (own, u), (torch_, _) = layer_and_tokens(cls, backend=kernel), layer_and_tokens(cls)
    torch.testing.assert_close(own(u), torch_(u))
    assert calls == [4 if cls is BidirectionalMamba2 else 2]  # both directions are one batch


def test_the_official_scan_replaces_ours_on_a_gpu_only(monkeypatch):
    monkeypatch.setattr(mamba2_ref, "official_scan", lambda: (ssd_recurrent, ""))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose_scan("auto", gpu) is choose_scan("mamba_ssm", gpu) is ssd_recurrent
    assert choose_scan("auto", cpu) is choose_scan("auto", gpu, torch.float64) is ssd_chunked


@pytest.mark.parametrize("form", [ssd_recurrent, *FORMS])
@pytest.mark.parametrize("change", [
    dict(dt=torch.zeros(2, 5, 3)), dict(B=torch.zeros(2, 5, 3, 5)), dict(C=torch.zeros(2, 5, 2, 4)),
    {name: torch.zeros(2, 4, 2, 5) for name in "BC"}, dict(x=torch.zeros(2, 0, 4, 3)),
    dict(chunk_size=0), dict(dt_limit=(1.0, 0.5)), dict(dt_limit=(-1.0, 0.5))])
def test_wrong_shapes_and_options_raise(form, change):
    with pytest.raises(ValueError, match="g divide h|invalid"):
        form(**draw(5)[0] | change)


@pytest.mark.parametrize("sizes", [dict(d_model=10), dict(ngroups=3), dict(headdim=0)])
def test_layers_with_wrong_sizes_raise(sizes):
    with pytest.raises(ValueError, match="divide"):
        Mamba2(**dict(d_model=16, headdim=8) | sizes)


def test_the_demonstration_shows_that_the_forms_agree():
    command = [sys.executable, "mamba2_ref.py"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    errors = [float(line.split()[-1]) for line in lines.splitlines()[1:]]
    assert len(errors) == 8 and max(errors) < 1e-6
