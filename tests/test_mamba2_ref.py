"""The three forms of the scan against each other, the fast form against its plain twin, and the layers."""
from pathlib import Path

import pytest
import torch

import mamba2_ref
from mamba2_ref import (BidirectionalMamba2, Mamba2, choose_backend, ssd, ssd_bidirectional, ssd_chunked, ssd_chunked_plain,
                        ssd_quadratic, ssd_recurrent)

ROOT = Path(__file__).resolve().parent.parent
FORMS = {"quadratic": lambda chunk_size, **k: ssd_quadratic(**k), "plain": ssd_chunked_plain, "chunked": ssd_chunked}
OPTIONS = ("D", "D2", "z", "dt_bias", "initial_states", "seq_idx", "dt_softplus", "dt_limit")


def draw(l, options=(), b=2, h=4, p=3, g=2, n=5, dtype=torch.float64, seed=0):
    make = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype).requires_grad_()
    tensors = dict(x=randn(b, l, h, p), dt=(randn(b, l, h).detach().abs() * 0.5).requires_grad_(),
                   A=(-randn(h).detach().abs() - 0.05).requires_grad_(), B=randn(b, l, g, n), C=randn(b, l, g, n))
    shapes = dict(D=(h,), D2=(h, p), z=(b, l, h, p), dt_bias=(h,), initial_states=(b, h, p, n))
    tensors |= {name[:1] if name[0] == "D" else name: randn(*shape) for name, shape in shapes.items() if name in options}
    rest = {}
    if "seq_idx" in options:
        rest["seq_idx"] = (torch.rand(b, l, generator=make) < 0.2).long().cumsum(1)
    if "dt_softplus" in options:
        rest["dt_softplus"] = True
    if "dt_limit" in options:
        rest["dt_limit"] = (0.1, 0.8)
    return tensors, rest


def run(form, tensors, rest, states=True):
    """[y, final state] and the gradient of every tensor, for one fixed random loss."""
    out = form(**tensors, **rest, **({"return_final_states": True} if states else {}))
    out = list(out) if states else [out]
    make = torch.Generator().manual_seed(1)
    loss = sum((o.double() * torch.randn(o.shape, generator=make, dtype=torch.float64)).sum() for o in out)
    names = ["y", "final_states"][: len(out)] + ["d" + name for name in tensors]
    return dict(zip(names, out + list(torch.autograd.grad(loss, list(tensors.values())))))


def worst(got, wanted):
    """RMS error over RMS of the reference, and largest error over largest entry: the worst tensor of all."""
    errors = {}
    for name, ref in wanted.items():
        error, ref = (got[name] - ref).detach().double(), ref.detach().double()
        assert torch.isfinite(error).all(), name
        errors[name] = max((error.square().mean() / ref.square().mean().clamp(min=1e-30)).sqrt().item(),
                           (error.abs().max() / ref.abs().max().clamp(min=1e-15)).item())
    return max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("l, Q", [(1, 4), (3, 4), (4, 4), (5, 4), (8, 4), (21, 8), (6, 64), (7, 1)])
def test_forms_agree_over_lengths_and_chunks(form, l, Q, monkeypatch):
    monkeypatch.setattr(mamba2_ref, "_SEGMENT", 200)                # several segments even at these sizes
    tensors, rest = draw(l, OPTIONS)
    name, error = worst(run(lambda **k: FORMS[form](chunk_size=Q, **k), tensors, rest), run(ssd_recurrent, tensors, rest))
    assert error < 1e-12, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [()] + [(o,) for o in OPTIONS] + [("initial_states", "seq_idx"), ("dt_bias", "dt_softplus"), ("D", "z")])
@pytest.mark.parametrize("h, g", [(4, 1), (6, 3), (4, 4)])
def test_forms_agree_over_options_and_groups(form, options, h, g):
    tensors, rest = draw(11, options, h=h, g=g)
    name, error = worst(run(lambda **k: FORMS[form](chunk_size=4, **k), tensors, rest), run(ssd_recurrent, tensors, rest))
    assert error < 1e-12, name


@pytest.mark.parametrize("form", [*FORMS, "both"])
def test_a_state_may_also_grow(form):
    """A is negative in every Mamba2, but nothing in the mathematics asks for it."""
    tensors, rest = draw(11)
    with torch.no_grad():
        tensors["A"][::2] *= -1
    scan, wanted = FORMS.get(form, ssd_bidirectional), ssd_recurrent
    if form == "both":
        wanted = lambda x, dt, A, B, C: (ssd_recurrent(x, dt, A, B, C)
                                         + ssd_recurrent(x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1)).flip(1))
    name, error = worst(run(lambda **k: scan(chunk_size=4, **k), tensors, rest, states=form != "both"),
                        run(wanted, tensors, rest, states=form != "both"))
    assert error < 1e-12, name


@pytest.mark.parametrize("both", [False, True])
def test_gradcheck(both):
    tensors, _ = draw(7, b=1, h=2, g=1, p=2, n=2)
    form = ssd_bidirectional if both else ssd_chunked
    assert torch.autograd.gradcheck(lambda *args: form(*args, chunk_size=3), list(tensors.values()))


@pytest.mark.parametrize("l, Q", [(1, 4), (4, 4), (9, 4), (21, 8), (6, 64)])
@pytest.mark.parametrize("h, g", [(4, 1), (6, 3)])
def test_bidirectional_is_the_sum_of_both_directions(l, Q, h, g, monkeypatch):
    monkeypatch.setattr(mamba2_ref, "_SEGMENT", 200)
    tensors, rest = draw(l, ("D", "z", "dt_bias", "dt_softplus", "dt_limit"), h=h, g=g)

    def two_scans(x, dt, A, B, C, D, z, **k):
        y = ssd_recurrent(x, dt, A, B, C, **k) + ssd_recurrent(x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1), **k).flip(1)
        return (y + D[:, None] * x) * torch.nn.functional.silu(z)
    name, error = worst(run(lambda **k: ssd_bidirectional(chunk_size=Q, **k), tensors, rest, states=False),
                        run(two_scans, tensors, rest, states=False))
    assert error < 1e-12, name


def test_packed_sequences_are_sequences_of_their_own():
    tensors, _ = draw(17, ("initial_states",), b=1)
    t = {name: v.detach() for name, v in tensors.items()}
    seq_idx = torch.tensor([[0] * 3 + [1] * 5 + [7] * 9])           # a border inside a chunk, and one on its edge
    packed = ssd_chunked(**t, seq_idx=seq_idx, chunk_size=4)
    start = 0
    for length in (3, 5, 9):
        cut = {name: v[:, start : start + length] if name in ("x", "dt", "B", "C") else v for name, v in t.items()}
        if start:
            del cut["initial_states"]
        torch.testing.assert_close(packed[:, start : start + length], ssd_recurrent(**cut), rtol=1e-12, atol=1e-12)
        start += length


@pytest.mark.parametrize("form", FORMS)
def test_halves_of_a_sequence_join_through_the_state(form):
    tensors, _ = draw(13)
    t = {name: v.detach() for name, v in tensors.items()}
    cut = lambda s: {name: v if name == "A" else v[:, s] for name, v in t.items()}
    whole, end = FORMS[form](chunk_size=4, **t, return_final_states=True)
    first, state = FORMS[form](chunk_size=4, **cut(slice(0, 6)), return_final_states=True)
    second, state = FORMS[form](chunk_size=4, **cut(slice(6, 13)), initial_states=state, return_final_states=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_rounds_only_at_the_end(dtype):
    tensors, rest = draw(200, ("D", "z", "initial_states"), dtype=dtype)
    y, state = ssd_chunked(**tensors, **rest, return_final_states=True)
    assert y.dtype == dtype and state.dtype == torch.float32
    exact, exact_state = ssd_recurrent(**{name: v.double() for name, v in tensors.items()}, **rest, return_final_states=True)
    eps = torch.finfo(dtype).eps
    rms = lambda a, b: ((a.double() - b).square().mean() / b.square().mean()).sqrt().item()
    assert rms(y, exact) < (0.5 * eps if dtype != torch.float32 else 20 * eps)
    assert rms(state, exact_state) < 1e-5                           # sums and states stay in float32
    for name, grad in zip(tensors, torch.autograd.grad(y.float().sum() + state.sum(), tensors.values())):
        assert grad.dtype == dtype and torch.isfinite(grad).all(), name


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3, 1e30])
def test_any_decay_gives_finite_values_and_gradients(size, both):
    tensors, _ = draw(40, dtype=torch.float32)
    tensors["dt"] = (tensors["dt"].detach() * size).requires_grad_()
    out = run(lambda **k: (ssd_bidirectional if both else ssd_chunked)(chunk_size=8, **k), tensors, {}, states=False)
    for name, value in out.items():
        assert torch.isfinite(value).all(), name


def test_autocast_leaves_the_sums_in_float32():
    tensors, rest = draw(64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ssd_chunked(**tensors, **rest)
        gradients = torch.autograd.grad(inside.sum(), list(tensors.values()))           # backward inside autocast, too
    outside = ssd_chunked(**tensors, **rest)
    torch.testing.assert_close(inside, outside)
    torch.testing.assert_close(gradients, torch.autograd.grad(outside.sum(), list(tensors.values())))


def test_memory_and_time_are_linear_in_the_length():
    """Counted, not timed: products per token do not grow with the length."""
    from torch.utils.flop_counter import FlopCounterMode
    flops = {}
    for l in (512, 4096):
        t = {name: v.detach() for name, v in draw(l, b=1)[0].items()}
        with FlopCounterMode(display=False) as counter:
            ssd_chunked(**t)
        flops[l] = counter.get_total_flops()
    assert flops[512] > 0 and flops[4096] == 8 * flops[512]


def test_inputs_are_left_alone_and_strides_do_not_matter():
    tensors, rest = draw(10, ("D", "z", "initial_states"))
    before = {name: v.detach().clone() for name, v in tensors.items()}
    wanted = ssd_chunked(**tensors, **rest, chunk_size=4)
    odd = {name: torch.stack([v.detach(), v.detach()], -1)[..., 0] for name, v in tensors.items()}
    torch.testing.assert_close(ssd_chunked(**odd, chunk_size=4), wanted.detach(), rtol=1e-13, atol=1e-13)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


# --- The layers ---


def test_causal_layer_sees_only_the_past_and_bidirectional_sees_all():
    torch.manual_seed(0)
    u = torch.randn(1, 9, 16, dtype=torch.float64, requires_grad=True)
    causal, both = (make(16, d_state=4, headdim=8).double() for make in (Mamba2, BidirectionalMamba2))
    for t in range(9):
        reach = torch.autograd.grad(causal(u)[0, t].sum(), u)[0][0].abs().sum(-1) > 0
        assert reach.tolist() == [s <= t for s in range(9)]
        assert (torch.autograd.grad(both(u)[0, t].sum(), u)[0][0].abs().sum(-1) > 0).all()


def test_state_dict_passes_between_one_direction_and_both():
    one, both = Mamba2(16, d_state=4, headdim=8, ngroups=2), BidirectionalMamba2(16, d_state=4, headdim=8, ngroups=2)
    both.load_state_dict(one.state_dict())
    assert list(one.state_dict()) == ["dt_bias", "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "norm.weight", "out_proj.weight"]


def test_shifted_multiply_adds_are_conv1d():
    torch.manual_seed(0)
    layer = Mamba2(16, d_state=4, headdim=8)
    x = torch.randn(2, 11, layer.conv1d.weight.shape[0])
    torch.testing.assert_close(layer._convolve(x, None), layer.conv1d(x.mT)[..., :11].mT)


def test_layer_keeps_packed_sequences_apart():
    torch.manual_seed(0)
    layer, u = Mamba2(16, d_state=4, headdim=8), torch.randn(2, 11, 16)
    packed = layer(u, seq_idx=torch.tensor([[0] * 6 + [1] * 5] * 2))
    torch.testing.assert_close(packed, torch.cat([layer(u[:, :6]), layer(u[:, 6:])], 1))


def test_initial_steps_and_decays_lie_where_mamba2_puts_them():
    torch.manual_seed(0)
    layer = Mamba2(512, headdim=4, d_state=4)
    dt = torch.nn.functional.softplus(layer.dt_bias)
    assert 0.001 <= dt.min() < 0.002 and 0.08 < dt.max() <= 0.1001
    assert 1 <= layer.A_log.exp().min() < 1.5 and 15 < layer.A_log.exp().max() <= 16.001


# --- Backends and errors ---


def test_backends(capsys):
    assert choose_backend("torch", "cpu") == "torch" and choose_backend("auto", "cpu") == "torch"
    with pytest.raises(RuntimeError, match="pip install|CUDA GPU"):
        choose_backend("mamba_ssm", "cpu")
    with pytest.raises(ValueError, match="triton"):
        choose_backend("triton", "cpu")


def test_official_backend_is_called_with_both_directions(monkeypatch):
    """Our own scan in the place of mamba-ssm's: what the backend does around the kernel is right."""
    def kernel(*args, **options):
        assert args[0].dtype == torch.float32                       # Triton's kernels know no float64
        return ssd_chunked(*args, **options)
    monkeypatch.setattr(mamba2_ref, "_official_scan", lambda: (kernel, ""))
    monkeypatch.setattr(mamba2_ref, "choose_backend", lambda backend, device: "mamba_ssm" if backend == "auto" else backend)
    tensors, rest = draw(11, ("D", "z", "dt_bias", "dt_softplus"), dtype=torch.float32)
    t = {name: v.detach() for name, v in tensors.items()}
    torch.testing.assert_close(ssd(**t, **rest, chunk_size=4, both=True), ssd_bidirectional(**t, **rest, chunk_size=4))
    torch.testing.assert_close(ssd(**t, **rest, chunk_size=4), ssd_chunked(**t, **rest, chunk_size=4))
    with pytest.raises(TypeError, match="seq_idx"):
        ssd(**t, both=True, seq_idx=torch.zeros(2, 11, dtype=torch.long))


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(2, 3)), "x must be"), (dict(x=3), "x must be"), (dict(x=torch.zeros(2, 0, 4, 3)), "empty"),
    (dict(dt=torch.zeros(2, 5, 3)), "dt must have shape"), (dict(A=torch.zeros(3)), "A must have"), (dict(B=torch.zeros(2, 5, 3, 5)), "ngroups"),
    (dict(C=torch.zeros(2, 5, 2, 4)), "C must have"), (dict(D=torch.zeros(3)), "D must have"), (dict(z=torch.zeros(1)), "z must have"),
    (dict(dt_bias=torch.zeros(1)), "dt_bias must have"), (dict(initial_states=torch.zeros(2, 4, 5, 3)), "initial_states must"),
    (dict(seq_idx=torch.zeros(2, 5)), "integer"), (dict(dt=torch.zeros(2, 5, 4, dtype=torch.long)), "floating"),
    (dict(dt_limit=(1.0, 0.5)), "dt_limit"), (dict(dt_limit=(-1.0, 0.5)), "dt_limit"), (dict(A=None), "A must have"),
    (dict(B=torch.zeros(2, 5, 2, 5, device="meta")), "move them"),
])
@pytest.mark.parametrize("form", [ssd_recurrent, ssd_quadratic, ssd_chunked, ssd_chunked_plain])
def test_what_does_not_fit_is_named(form, change, message):
    good = {name: v.detach().float() for name, v in draw(5)[0].items()}
    with pytest.raises(ValueError, match=message):
        form(**{**good, **change})


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5, True, "32"])
def test_chunk_size_is_checked(chunk_size):
    good = {name: v.detach() for name, v in draw(5)[0].items()}
    for form in (ssd_chunked, ssd_chunked_plain, ssd_bidirectional):
        with pytest.raises(ValueError, match="chunk_size"):
            form(**good, chunk_size=chunk_size)


def test_layers_check_their_sizes():
    for wrong, message in ((dict(d_model=10, headdim=8), "multiple of headdim"), (dict(d_model=16, headdim=8, ngroups=3), "ngroups")):
        with pytest.raises(ValueError, match=message):
            Mamba2(**wrong)
    with pytest.raises(ValueError, match="d_model=16"):
        BidirectionalMamba2(16, headdim=8)(torch.zeros(1, 3, 15))
