"""Proof of the judge: kernels broken on purpose are caught and the fault is named; right kernels
pass.

The broken kernels stand in broken_kernels.py, by kind. Of each it is asked that the right scan
passes the case named and that the broken one fails it, with a hint that says what is wrong. Each
runs that case alone.
"""
import functools
import importlib.util
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import broken_kernels
import mamba2_ref
from kernel_judge import (
    DTYPES, SIGNATURES, Settings, explain, judge, judge_case, parse, report, shrink, spell)

ROOT = Path(__file__).resolve().parent.parent
PLAIN = Settings(compile_backend="aot_eager")
scan = broken_kernels.scan


def said(kernel, case, dtype, settings=PLAIN):
    """Judge a broken kernel; everything that the verdict says of it."""
    outcome = judge_case(kernel, case, DTYPES[dtype], settings)
    assert outcome.status == "wrong", outcome
    return "\n".join(
        [outcome.why, outcome.where, outcome.note, *explain(kernel, outcome, settings)]
    )


def is_right(kernel, case, dtype="float32", settings=PLAIN):
    outcome = judge_case(kernel, case, DTYPES[dtype], settings)
    assert outcome.status == "right", (case, dtype, outcome)
    return outcome


# --- Broken kernels are caught --------------------------------------------------------------------

LISTS = {
    "mathematics": {
        fault: (scan(fault), *rest) for fault, rest in broken_kernels.MATHEMATICS.items()
    },
    "sizes": broken_kernels.SIZES,
    "layouts": broken_kernels.LAYOUTS,
    "calls": broken_kernels.CALLS,
    "values": broken_kernels.VALUES,
}
BROKEN = [(kind, fault) for kind, faults in LISTS.items() for fault in faults]


@functools.cache
def the_right_scan_passes(case, dtype):
    return is_right(scan(), case, dtype)


@pytest.mark.parametrize("kind, fault", BROKEN)
def test_a_broken_kernel_is_caught_and_its_fault_named(kind, fault):
    kernel, case, dtype, says = LISTS[kind][fault]
    the_right_scan_passes(case, dtype)
    text = said(kernel, case, dtype)
    assert says in text, text


@pytest.mark.parametrize("fault", broken_kernels.STATE)
def test_a_kernel_that_keeps_state_is_caught(fault):
    make, case, dtype, says = broken_kernels.STATE[fault]
    the_right_scan_passes(case, dtype)
    text = said(make(), case, dtype)
    assert says in text, text


@pytest.mark.parametrize("fault", broken_kernels.CHEATS)
def test_a_kernel_that_cheats_is_caught(fault):
    make, case, says = broken_kernels.CHEATS[fault]
    with broken_kernels.everything_put_back():
        text = said(make(), case, "float32")
    assert says in text, text
    is_right(scan(), case)                              # the judge is as it was


@pytest.mark.parametrize("name", ["varlen", "step", "bidirectional", "layer"])
def test_broken_kernels_of_the_other_signatures_are_caught(name):
    settings = Settings(SIGNATURES[name])
    right, faults = broken_kernels.OTHERS[name]
    for fault, (kernel, case, says) in faults.items():
        is_right(right, case, settings=settings)
        text = said(kernel, case, "float32", settings)
        assert says in text, (fault, text)


def test_each_kind_has_three_broken_kernels():
    for faults in (*LISTS.values(), broken_kernels.STATE, broken_kernels.CHEATS):
        assert len(faults) >= 3
    assert all(len(faults) >= 3 for _, faults in broken_kernels.OTHERS.values())


# --- Sound kernels are accepted -------------------------------------------------------------------


def form(name):
    function = getattr(mamba2_ref, name)
    if name.startswith("ssd_chunked"):
        return function
    return lambda x, dt, A, B, C, chunk_size, **kw: function(x, dt, A, B, C, **kw)


def in_log_space(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
                 dt_softplus=False, dt_limit=(0.0, math.inf), return_final_states=False):
    """A scan by doubling: pairs (log decay, state) are combined over distances 1, 2, 4, ..."""
    wide = torch.promote_types(x.dtype, torch.float32)
    r = x.shape[2] // B.shape[2]
    step = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias
    step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)
    log = step * A                                                              # (b, l, h)
    Bs, Cs = (t.to(wide).repeat_interleave(r, 2) for t in (B, C))
    state = (step[..., None] * x.to(wide))[..., None] * Bs[:, :, :, None]       # (b, l, h, p, n)
    if initial_states is not None:
        first = state[:, :1] + log[:, :1, :, None, None].exp() * initial_states[:, None]
        state = torch.cat([first, state[:, 1:]], 1)
    distance = 1
    while distance < x.shape[1]:
        before = F.pad(state, (0, 0, 0, 0, 0, 0, distance, 0))[:, : x.shape[1]]
        state = state + log[..., None, None].exp() * before
        log = log + F.pad(log, (0, 0, distance, 0))[:, : x.shape[1]]
        distance *= 2
    y = (state * Cs[:, :, :, None]).sum(-1)
    if D is not None:
        y = y + x * (D if D.dim() == 2 else D[:, None])
    if z is not None:
        y = y * F.silu(z.to(wide))
    return (y.to(x.dtype), state[:, -1]) if return_final_states else y.to(x.dtype)


def with_other_strides(*args, **kwargs):
    out = scan()(*args, **kwargs)
    y = out[0] if isinstance(out, tuple) else out
    y = y.transpose(1, 3).contiguous().transpose(1, 3)
    return (y, out[1].mT.contiguous().mT) if isinstance(out, tuple) else y


class Operand(torch.autograd.Function):
    """Rounded to bfloat16 on both ways, as the operand of a product is."""

    @staticmethod
    def forward(ctx, t):
        return t.bfloat16().to(t.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad.bfloat16().to(grad.dtype)


def half_operands(x, dt, A, B, C, chunk_size, **kw):
    """The operands of the products in bfloat16 once more, the sums in float32."""
    if x.dtype == torch.bfloat16:
        x, B, C = (Operand.apply(t) for t in (x, B, C))
    return scan()(x, dt, A, B, C, chunk_size, **kw)


def with_atomics(x, dt, A, B, C, chunk_size, **kw):
    """Sums in an order that differs from call to call."""
    order = torch.randperm(B.shape[-1])
    if kw.get("initial_states") is not None:
        kw["initial_states"] = kw["initial_states"][..., order]
    out = scan()(x, dt, A, B[..., order], C[..., order], chunk_size, **kw)
    if not isinstance(out, tuple):
        return out
    return out[0], out[1][..., order.argsort()]


def for_powers_of_two(x, dt, A, B, C, chunk_size, **kw):
    for name, size in (
        ("headdim", x.shape[3]),
        ("d_state", B.shape[3]),
        ("chunk_size", chunk_size),
    ):
        if size & (size - 1) or size < 16:
            raise ValueError(f"{name} must be a power of two and at least 16, got {size}")
    return scan()(x, dt, A, B, C, chunk_size, **kw)


def forward_alone(*args, **kwargs):
    with torch.no_grad():
        return scan()(*args, **kwargs)


def with_softplus_and_bias(x, dt, A, B, C, chunk_size, dt_bias, **kw):
    """No argument dt_softplus: it is always on."""
    return scan()(x, dt, A, B, C, chunk_size, dt_bias=dt_bias, dt_softplus=True, **kw)


SMALL = [
    name
    for kind in ("lengths", "options", "packed", "values")
    for name in SIGNATURES["scan"].kinds[kind]
]
FEW = [
    "plain",
    "chunk-plus-1",
    "all",
    "seq_idx-before-chunk",
    "A-dt-mixed",
    "views",
    "final-used-alone",
    "fresh-values-all",
    "repeats",
]


@pytest.mark.parametrize("name", ["ssd_recurrent", "ssd_quadratic", "ssd_chunked_plain"])
def test_our_other_forms_are_accepted(name):
    verdict = judge(form(name), dtypes="float32,bfloat16", cases=SMALL, allow_delegation=True)
    assert verdict.ok and not verdict.of("not supported"), verdict


def test_the_right_scan_is_accepted_in_every_small_case():
    """So every refusal above is the fault's doing."""
    kinds = [name for kind, cases in SIGNATURES["scan"].kinds.items() for name in cases
             if kind not in ("sizes", "thorough") and not name.startswith("compile")]
    verdict = judge(scan(), dtypes="float32", cases=kinds)
    assert verdict.ok and not verdict.of("not supported"), verdict


@pytest.mark.parametrize(
    "kernel, dtypes, cases",
    [
        (
            in_log_space,
            "float64,float32,bfloat16",
            [c for c in FEW if "seq_idx" not in c and c != "views"],
        ),
        (with_other_strides, "float32,float16", FEW),
        (half_operands, "bfloat16", FEW),
        (with_atomics, "float32,bfloat16", FEW),
    ],
)
def test_a_sound_kernel_is_accepted(kernel, dtypes, cases):
    verdict = judge(kernel, dtypes=dtypes, cases=cases)
    assert verdict.ok and not verdict.of("not supported"), verdict


def test_atomics_are_admitted_and_noted():
    verdict = judge(with_atomics, dtypes="float32", cases="repeats")
    assert verdict.ok and "repeats differ by rounding" in str(verdict), verdict


def test_a_kernel_for_certain_shapes_is_judged_at_them():
    away = judge(for_powers_of_two, dtypes="float32", cases=FEW)
    assert not away.ok and not away.of("wrong") and "--shape" in str(away), away
    at_home = judge(for_powers_of_two, dtypes="float32", cases=FEW,
                    shape="headdim=16,d_state=32,chunk=16")
    assert at_home.ok and not at_home.of("not supported"), at_home


def test_a_kernel_without_a_backward_pass_has_a_verdict_of_its_own():
    with_gradients = judge(forward_alone, dtypes="float32", cases=["plain", "all"])
    assert not with_gradients.ok and "--forward-only" in str(with_gradients)
    verdict = judge(
        forward_alone, dtypes="float32", cases=["plain", "all", "views"], forward_only=True
    )
    assert verdict.ok and "forward only" in str(verdict), verdict


def test_options_that_are_always_applied_are_admitted():
    cases = ["plain", "D", "z", "final_states"]
    assert not judge(with_softplus_and_bias, dtypes="float32", cases=cases).ok
    verdict = judge(
        with_softplus_and_bias, dtypes="float32", cases=cases, always="dt_softplus,dt_bias"
    )
    assert verdict.ok and len(verdict.of("right")) == 4, verdict


def test_tf32_products_are_admitted_only_when_asked_for():
    in_tf32 = scan("products in tf32")
    assert judge_case(in_tf32, "plain", torch.float32).status == "wrong"
    assert judge_case(in_tf32, "plain", torch.float32, Settings(tf32=True)).status == "right"
    assert (
        judge_case(scan("groups in turn"), "plain", torch.float32, Settings(tf32=True)).status
        == "wrong"
    )


def test_delegation_is_admitted_only_when_asked_for():
    assert not judge(mamba2_ref.ssd_chunked, dtypes="float32", cases="plain").ok
    assert judge(mamba2_ref.ssd_chunked, dtypes="float32", cases="plain", allow_delegation=True).ok


def raising(error, backward=False):
    """The right scan, but with z it raises `error`."""
    def kernel(x, dt, A, B, C, chunk_size, z=None, **kw):
        if z is not None:
            raise error
        return scan()(x, dt, A, B, C, chunk_size, **kw)
    return kernel


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError("no z"),
        ValueError("z is not supported"),
        AssertionError("a gate is not implemented"),
        RuntimeError("selective_scan only supports z of None"),
        ValueError("headdim must be 64"),
    ],
)
def test_what_is_said_to_be_lacking_is_not_called_wrong(error):
    assert judge_case(raising(error), "z", torch.float32).status == "not supported"
    assert judge_case(raising(error), "plain", torch.float32).status == "right"


@pytest.mark.parametrize(
    "error",
    [
        TypeError("'NoneType' object is not iterable"),
        AssertionError(),
        KeyError("z"),
        RuntimeError("shape '[2, 3]' is invalid for input of size 5"),
    ],
)
def test_an_accident_is_called_wrong(error):
    assert judge_case(raising(error), "z", torch.float32).status == "wrong"


def test_a_type_error_counts_as_lacking_only_from_the_signature():
    def no_z(x, dt, A, B, C, chunk_size, D=None, return_final_states=False):
        return scan()(x, dt, A, B, C, chunk_size, D=D, return_final_states=return_final_states)

    def passes_on(*args, **kwargs):
        return no_z(*args, **kwargs)

    def loses_z_inside(x, dt, A, B, C, chunk_size, z=None, **kw):
        return no_z(x, dt, A, B, C, chunk_size, z=z, **kw)

    assert judge_case(no_z, "z", torch.float32).status == "not supported"
    assert judge_case(passes_on, "z", torch.float32).status == "not supported"
    assert judge_case(loses_z_inside, "z", torch.float32).status == "wrong"


def test_float64_computed_in_float32_is_lacking_not_wrong():
    def narrow(v):
        return v.float() if torch.is_tensor(v) and v.is_floating_point() else v

    def kernel(*args, **kw):
        return scan()(*map(narrow, args), **{k: narrow(v) for k, v in kw.items()}).double()

    assert judge_case(kernel, "plain", torch.float64).why == "takes float64 but computes in float32"


# --- What a verdict says --------------------------------------------------------------------------


def nothing(*args, **kwargs):
    raise NotImplementedError("nothing yet")


def zeros(x, dt, A, B, C, chunk_size, **kw):
    return x * 0


def test_nothing_is_green_that_was_not_judged():
    start = time.process_time()
    verdict = judge(nothing)
    assert (
        not verdict.ok and "NOTHING JUDGED" in str(verdict) and "0 right, 0 wrong" in str(verdict)
    )
    assert time.process_time() - start < 60


def test_a_kernel_that_fails_everywhere_takes_seconds():
    start = time.process_time()
    verdict = judge(zeros)
    assert not verdict.ok and "were left out" in str(verdict), verdict
    assert time.process_time() - start < 60


def test_a_verdict_opens_with_a_summary_and_groups_its_causes():
    verdict = judge(scan("groups in turn"), dtypes="float32,bfloat16",
                    cases=["plain", "odd-sizes", "three-groups", "one-group", "D", "length-1"])
    lines = str(verdict).splitlines()
    assert (
        "WRONG" in lines[0] and "2 right, 10 wrong, 0 not supported; features: 6 judged" in lines[1]
    )
    assert lines[3] == "1 cause:" and "heads take their groups in turn" in lines[4]
    assert str(verdict).count("again: ") <= 3


def test_required_features_must_be_supported():
    lacks_z = raising(NotImplementedError("no z"))
    assert judge(lacks_z, dtypes="float32", cases=["plain", "z"]).ok
    for require in ("z", "all", "float32"):
        assert not judge(lacks_z, dtypes="float32", cases=["plain", "z"], require=require).ok


@pytest.mark.parametrize(
    "options",
    [
        dict(cases="no-such-feature"),
        dict(cases="plain:length=3"),
        dict(cases="plain:l=0"),
        dict(cases="plain:l=x"),
        dict(cases="plain:opts=skip"),
        dict(cases="plain:h=5"),
        dict(cases="plain:l"),
        dict(cases="plain:dt=3"),
        dict(cases="plain:opts=seq_idx=x"),
        dict(cases="plain:opts=call=twice"),
        dict(dtypes="int8"),
        dict(require="speed"),
        dict(shape="width=3"),
        dict(shape="headdim=0"),
        dict(always="speed"),
        dict(signature="attention"),
    ],
)
def test_unknown_keys_and_bad_values_are_refused(options):
    with pytest.raises(ValueError, match="--"):
        judge(scan(), **options)


def test_a_spec_is_read_back_as_it_is_spelled():
    for signature in SIGNATURES.values():
        for feature in signature.cases:
            case = parse(feature, signature)[1]
            changed = case | {"l": case["l"] + 1, "opts": case["opts"] + " z"}
            assert parse(spell(feature, changed, signature), signature)[1] == changed


def test_randomness_is_not_called_a_lack_of_precision():
    def noisy(*args, **kw):
        return scan()(*args, **kw) * (1 + 1e-3 * torch.rand(()))

    text = said(noisy, "plain", "float32")
    assert "not deterministic" in text and "precision" not in text


def test_no_factor_of_one_and_no_zero_gradient_where_y_is_wrong():
    def detached(x, dt, A, B, C, chunk_size, **kw):
        return scan()(x, dt.detach(), A, B, C, chunk_size, **kw) * 1.01 + 0 * dt.sum()

    text = said(detached, "plain", "float32")
    assert "zero throughout" not in text and "off by the factor 1\n" not in text


@pytest.mark.parametrize("fault, case, small", [
    ("groups in turn", "plain", dict(b=1, l=1, p=1, n=1)),
    ("no state between chunks", "many-chunks", dict(b=1, h=1, l=3, q=2, p=1, n=1, opts="")),
    ("y wrong from headdim 32 on", "large-tiles", dict(b=1, h=1, l=1, n=1, p=40)),
])
def test_the_smallest_failing_case_is_small(fault, case, small):
    spec = shrink(scan(fault), case, torch.float32, seconds=20)
    found = parse(spec)[1]
    assert {k: found[k] for k in small} == small, spec
    assert judge_case(scan(fault), spec, torch.float32).status == "wrong"


def test_the_report_says_where_and_how_to_see_it_again():
    outcome = judge_case(scan("groups in turn"), "plain", torch.float32)
    hints = explain(scan("groups in turn"), outcome, Settings())
    text = report(scan("groups in turn"), outcome, Settings(), "package:kernel", hints)
    for part in (
        "x its tolerance",
        "hint: heads take their groups in turn",
        "smallest case: plain:",
        "first at batch 0, position 0 (chunk 0, place 0)",
        "again: judge(kernel, dtypes='float32', cases=['plain:",
    ):
        assert part in text, text


# --- Other signatures, other frameworks, the command ----------------------------------------------


@pytest.mark.parametrize("name", ["varlen", "step", "bidirectional", "layer"])
def test_the_right_kernel_of_each_signature_is_accepted(name):
    verdict = judge(broken_kernels.OTHERS[name][0], signature=name, dtypes="float32,bfloat16")
    assert verdict.ok and not verdict.of("not supported"), str(verdict)


def test_a_module_is_judged_at_its_own_sizes():
    module = broken_kernels.Layer(
        d_model=12, d_state=5, d_conv=4, expand=2, headdim=8, ngroups=1, chunk_size=8
    )
    verdict = judge(module, signature="layer", dtypes="float32", cases=["plain", "fresh-values"])
    assert verdict.ok and not verdict.of("not supported"), verdict


def test_our_bidirectional_scan_is_accepted():
    verdict = judge(mamba2_ref.ssd_bidirectional, signature="bidirectional", dtypes="float32",
                    allow_delegation=True)
    assert verdict.ok and not verdict.of("not supported"), verdict


def in_numpy(x, dt, A, B, C, chunk_size, D=None, return_final_states=False):
    """A kernel of another framework: arrays in, arrays out."""
    import numpy as np
    r, state, ys = x.shape[2] // B.shape[2], 0, []
    dt = np.maximum(dt, 0)
    for i in range(x.shape[1]):
        b, c = (np.repeat(t[:, i], r, 1)[:, :, None] for t in (B, C))  # (b, h, 1, n)
        state = (
            np.exp(dt[:, i] * A)[..., None, None] * state
            + (dt[:, i, :, None] * x[:, i])[..., None] * b
        )
        ys.append((state * c).sum(-1))
    y = np.stack(ys, 1) + (0 if D is None else x * D.reshape(len(A), -1))
    return (y, state) if return_final_states else y


def test_arrays_come_in_through_the_adapter_of_the_manual():
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    text = next(part for part in page.split("```") if "def adapter" in part)
    call = text.splitlines()[-1]
    given = dict(scan_in_numpy=in_numpy, torch=torch)
    exec(text.removeprefix("python").replace(call, ""), given)
    cases = ["plain", "D", "z", "dt-negative", "final_states"]
    given |= dict(judge=functools.partial(judge, cases=cases))
    verdict = eval(call, given)
    assert len(verdict.of("right")) == 8 and len(verdict.of("not supported")) == 2, verdict


# For the command line, which wants a name to import.
broken = scan("groups in turn")


def command(*arguments):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "tests/test_kernel.py",
            "-p",
            "no:cacheprovider",
            *arguments,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_exit_codes_and_texts_of_the_command():
    ours = "tests.test_kernel_judge:"
    wrong = command(
        "--kernel", ours + "broken", "--dtype", "float32", "--case", "plain", "--case", "one-group"
    )
    assert wrong.returncode == 1, wrong.stdout + wrong.stderr
    assert "1 right, 1 wrong, 0 not supported" in wrong.stdout and "WRONG" in wrong.stdout
    again = next(line for line in wrong.stdout.splitlines() if line.startswith("again: "))
    spec = again.partition("--case ")[2].strip("'")
    assert judge_case(broken, spec, torch.float32).status == "wrong"
    parallel = (
        ["-n", "1"] if importlib.util.find_spec("xdist") else []
    )  # it also arrives from a worker
    right = command("--dtype", "float32", "--case", spec, *parallel)
    assert right.returncode == 0 and "1 right, 0 wrong" in right.stdout, right.stdout + right.stderr
    nothing = command("--kernel", ours + "nothing", "--dtype", "float32", "--case", "plain")
    assert nothing.returncode == 1 and "NOTHING JUDGED" in nothing.stdout
    refused = command("--kernel", ours + "missing", "--case", "plain")
    assert refused.returncode == 4 and "cannot be imported" in refused.stdout + refused.stderr
    refused = command("--case", "plain:length=3")
    assert refused.returncode == 4 and "no key 'length'" in refused.stdout + refused.stderr
