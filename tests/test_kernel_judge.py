"""
Proof of the judge: kernels broken on purpose are caught and the fault is named; right kernels pass.

`kernel` is a right chunked scan of some fifty lines, and each entry of FAULTS is one line of it done wrong: the
faults that real kernels had, and those that one fears. Of each it is asked that it is caught, by the case and in the
dtype named, with a hint that says what is wrong.
"""
import importlib.util
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mamba2_ref
from test_kernel import CASES, DTYPES, chunked, explain, judge, parse, report, shrink

ROOT = Path(__file__).resolve().parent.parent

# fault: (case that must catch it, dtype, what the hints or the verdict must say)
FAULTS = {
    # seen in real kernels
    "exp before the mask": ("A-huge", "float32", "mask before exp"),
    "gradient of dt A wrong from the second tile on": ("large-tiles", "float32", "the gradient of the running sum of dt A"),
    "y wrong from headdim 32 on": ("large-tiles", "float32", "only for headdim 32 and beyond"),
    "one gradient too few": ("plain", "float32", "backward must return one value per argument"),
    "D skipped": ("D", "float32", "D x is left out"),
    "final state of the last full chunk": ("final_states", "float32", "the length is no multiple of the chunk"),
    "groups in turn": ("plain", "float32", "heads take their groups in turn"),
    "leak inside a chunk": ("seq_idx-before-chunk", "float32", "leaks over borders inside a chunk"),
    "leak between chunks": ("seq_idx-at-chunk", "float32", "leaks over borders that lie between two chunks"),
    "running sum in half": ("running-sum", "bfloat16", "its error grows along the chunk: the running sum"),
    "refuses lengths": ("chunk-plus-1", "float32", "refuses a length that is no multiple of the chunk"),
    # precision
    "state in half": ("long-memory", "bfloat16", "too little precision"),
    "products summed in half": ("long-chunk", "bfloat16", "too little precision"),
    "products in tf32": ("plain", "float32", "--tf32 admits"),
    "final state returned in half": ("final_states", "bfloat16", "final_states is torch.bfloat16, not torch.float32"),
    # forward
    "gate before D": ("z+D", "float32", "the gate is applied before D x is added"),
    "bias after softplus": ("dt_softplus-wide", "float32", "dt_bias is added after softplus"),
    "clamp before softplus": ("all", "float32", "dt is clamped before softplus"),
    "initial state ignored": ("initial_states", "float32", "initial_states are ignored"),
    "no state between chunks": ("two-chunks", "float32", "no state passes from chunk to chunk"),
    "decay of the state ignores the token's own step": ("two-chunks", "float32", "y: only from the second chunk on"),
    "batch row 0 for B": ("plain", "float32", "only for batch 1"),
    "diagonal missing": ("plain", "float32", "a token does not see itself"),
    "last chunk never written": ("chunk-plus-1", "float32", "never written"),
    "final state transposed": ("final_states", "float32", "final_states are written transposed"),
    "strides of x ignored": ("views", "float32", "wrong for inputs with odd strides"),
    # backward
    "final state detached": ("both-states", "float32", "the gradient of the final states is dropped"),
    "states detached": ("two-chunks", "float32", "before the last chunk"),
    "dt detached from dt x": ("plain", "float32", "only ddt is wrong"),
    "dB of one head per group": ("plain", "float32", "only dB is wrong"),
    "dA of the first batch row": ("plain", "float32", "only dA is wrong"),
    "dz twice": ("z", "float32", "dz is off by the factor 2"),
    "dD zero": ("D", "float32", "dD is zero throughout"),
    "x without gradient": ("plain", "float32", "dx is zero throughout, or None"),
    "dy taken as contiguous": ("dy-expanded", "float32", "a gradient of y with stride 0"),
    # manners
    "writes into dt": ("dt_limit", "float32", "writes into its inputs"),
    "a race": ("repeats", "float32", "repeats differ"),
}


class Bend(torch.autograd.Function):
    """The identity, with a gradient that is bent."""

    @staticmethod
    def forward(ctx, t, bend):
        ctx.bend = bend
        return t.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.bend(grad), None


class TooFew(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def kernel(fault=None):
    """A right chunked scan for fault=None, else one with that fault."""

    calls = itertools.count()

    def scan(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
             dt_softplus=False, dt_limit=(0.0, math.inf), return_final_states=False):
        is_ = lambda *names: fault in names
        b, l, h, p = x.shape
        g, n = B.shape[2:]
        half, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        if is_("refuses lengths") and l % chunk_size:
            raise ValueError(f"length {l} is not divisible by {chunk_size}")
        if is_("strides of x ignored"):
            x = x + (x.detach().as_strided(x.shape, (l * h * p, h * p, p, 1)) - x.detach())
        if is_("writes into dt"):
            dt.detach().clamp_(*dt_limit)
        step, bias = dt.to(wide), 0 if dt_bias is None else dt_bias
        step = step if is_("bias after softplus") else step + bias
        step = step.clamp(*dt_limit) if is_("clamp before softplus") else step
        step = F.softplus(step) if dt_softplus else step
        step = step + bias if is_("bias after softplus") else step
        step = step if is_("clamp before softplus") else step.clamp(*dt_limit)
        heads = torch.arange(h)
        heads = heads % g if is_("groups in turn") else heads // (h // g)
        if is_("one gradient too few"):
            x = TooFew.apply(x, dt)
        skip, xs = x, x.to(wide)
        Bs, Cs = B[:, :, heads].to(wide), C[:, :, heads].to(wide)                    # (b, l, h, n)
        if is_("batch row 0 for B"):
            Bs = Bs[:1].expand_as(Bs)
        if is_("dB of one head per group"):
            first = (torch.arange(h) % (h // g) == 0)[:, None]
            Bs = torch.where(first, Bs, Bs.detach())
        if is_("dA of the first batch row"):
            a = step * torch.cat([A[None, None], A.detach()[None, None].expand(b - 1, 1, h)])
        else:
            a = step * A
        values = xs * (step.detach() if is_("dt detached from dt x") else step)[..., None]
        if is_("x without gradient"):
            values, skip = values.detach() + 0 * step[..., None], x.detach()
        if is_("products in tf32") and wide == torch.float32:
            tf32 = lambda t: Bend.apply(t + ((t.detach().view(torch.int32) & -8192).view(torch.float32) - t.detach()), lambda d: d)
            values, Bs, Cs = tf32(values), tf32(Bs), tf32(Cs)
        packed = torch.zeros(b, l, dtype=torch.int64) if seq_idx is None else seq_idx.long()
        if is_("leak inside a chunk"):
            packed = packed[:, torch.arange(l) // chunk_size * chunk_size]
        state = torch.zeros(b, h, p, n, dtype=wide) if initial_states is None or is_("initial state ignored") else initial_states
        before, ys, full = packed[:, 0], [], state
        for i in range(0, l, chunk_size):
            c = slice(i, min(i + chunk_size, l))
            s, sums = packed[:, c], a[:, c].cumsum(1)                                # (b, q), (b, q, h)
            if is_("leak between chunks"):
                before = s[:, 0]
            if is_("running sum in half"):
                total, parts = torch.zeros_like(sums[:, 0]), []
                for k in range(sums.shape[1]):
                    total = (total + a[:, i + k]).to(half).to(wide)
                    parts.append(total)
                sums = torch.stack(parts, 1)
            if is_("gradient of dt A wrong from the second tile on"):
                sums = Bend.apply(sums, lambda d: torch.cat([d[:, :32], d[:, 32:] * 0.5], 1))
            same = (s[:, :, None] == s[:, None]).tril(-1 if is_("diagonal missing") else 0)[..., None]   # (b, i, j, 1)
            exponent = sums[:, :, None] - sums[:, None]                              # (b, i, j, h)
            if is_("exp before the mask"):
                L = exponent.exp().masked_fill(~same, 0)
            else:
                L = exponent.masked_fill(~same, -math.inf).exp()
            M = torch.einsum("bihn,bjhn->bijh", Cs[:, c], Bs[:, c]) * L
            if is_("products summed in half"):
                y = torch.zeros_like(values[:, c])
                for j in range(y.shape[1]):
                    y = (y + M[:, :, j, :, None] * values[:, i + j, None]).to(half).to(wide)
            else:
                y = torch.einsum("bijh,bjhp->bihp", M, values[:, c])
            entering = torch.zeros_like(state) if is_("no state between chunks") and i else state
            entering = entering.detach() if is_("states detached") and i else entering
            into = sums - a[:, c] if is_("decay of the state ignores the token's own step") else sums
            into = torch.where((s == before[:, None])[..., None], into.exp(), 0)     # (b, q, h)
            y = y + into[..., None] * torch.einsum("bihn,bhpn->bihp", Cs[:, c], entering)
            out = torch.where((s == s[:, -1:])[..., None], (sums[:, -1:] - sums).exp(), 0)
            keep = torch.where((s[:, -1] == before)[:, None], sums[:, -1].exp(), 0)[..., None, None]
            state = keep * state + torch.einsum("bjhn,bjhp->bhpn", Bs[:, c] * out[..., None], values[:, c])
            state = state.to(half).to(wide) if is_("state in half") else state
            full = state if (i + chunk_size) <= l else full
            before = s[:, -1]
            ys.append(y)
        y = torch.cat(ys, 1)
        if is_("y wrong from headdim 32 on"):
            y = torch.cat([y[..., :32], y[..., 32:] * 1.01], -1)
        if is_("last chunk never written"):
            end = l // chunk_size * chunk_size
            y = torch.cat([y[:, :end], torch.empty_like(y[:, end:])], 1)
        gate = 1 if z is None else F.silu((Bend.apply(z, lambda d: 2 * d) if is_("dz twice") else z).to(wide))
        if D is not None and not is_("D skipped"):
            D = Bend.apply(D, lambda d: 0 * d) if is_("dD zero") else D
            skip = skip * (D if D.dim() == 2 else D[:, None])
            y = y * gate + skip if is_("gate before D") else (y + skip) * gate
        elif z is not None:
            y = y * gate
        if is_("dy taken as contiguous"):
            y = Bend.apply(y, lambda d: torch.cat([d[:, :1], 0 * d[:, 1:]], 1) if d.stride(1) == 0 else d)
        if is_("a race"):
            y = y * (1 + 1e-2 * next(calls))
        final = full if is_("final state of the last full chunk") else state
        final = final.mT.contiguous().view(final.shape) if is_("final state transposed") else final
        final = final.to(half) if is_("final state returned in half") else final
        final = final.detach() + 0 * dt.sum() if is_("final state detached") else final
        return (y.to(half), final) if return_final_states else y.to(half)

    return scan


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_kernel_is_caught_and_its_fault_named(fault):
    case, dtype, says = FAULTS[fault]
    assert judge(kernel(), case, DTYPES[dtype]).status == "right"
    verdict = judge(kernel(fault), case, DTYPES[dtype])
    assert verdict.status == "wrong"
    said = [verdict.why, verdict.where, *explain(kernel(fault), case, DTYPES[dtype], verdict)]
    assert says in "\n".join(said), said


def test_every_case_catches_or_passes_what_it_should():
    """The right kernel passes every case in every dtype; so every refusal above is the fault's doing."""
    for case in CASES:
        for dtype in DTYPES.values():
            verdict = judge(kernel(), case, dtype)
            assert verdict.status == "right", (case, dtype, verdict.why, verdict.over)


@pytest.mark.parametrize("form", ["ssd_recurrent", "ssd_quadratic", "ssd_chunked_plain"])
def test_our_other_forms_are_accepted(form):
    function = getattr(mamba2_ref, form)
    takes_chunk = form == "ssd_chunked_plain"
    call = lambda x, dt, A, B, C, q, **kw: function(x, dt, A, B, C, **kw, **({"chunk_size": q} if takes_chunk else {}))
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            verdict = judge(call, case, dtype)
            assert verdict.status == "right", (case, dtype, verdict.why, verdict.over)


def test_tf32_products_are_admitted_only_when_asked_for():
    assert judge(kernel("products in tf32"), "plain", torch.float32).status == "wrong"
    assert judge(kernel("products in tf32"), "plain", torch.float32, tf32=True).status == "right"
    assert judge(kernel("groups in turn"), "plain", torch.float32, tf32=True).status == "wrong"


def test_what_is_lacking_is_not_called_wrong():
    def lacks_z(*args, z=None, **kw):
        if z is not None:
            raise NotImplementedError("no z")
        return chunked(*args, **kw)

    def no_backward(*args, **kw):
        class Forward(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, out):
                return out.clone()

            @staticmethod
            def backward(ctx, grad):
                raise NotImplementedError("backward")
        return Forward.apply(args[0], chunked(*args, **kw).detach())

    def float32_inside(*args, **kw):
        narrow = lambda v: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        return chunked(*map(narrow, args), **{k: narrow(v) for k, v in kw.items()}).double()

    assert judge(lacks_z, "z", torch.float32).status == "not supported"
    assert judge(lacks_z, "plain", torch.float32).status == "right"
    assert judge(no_backward, "plain", torch.float32).status == "not supported"
    assert judge(float32_inside, "plain", torch.float64).why == "takes float64 but computes in float32"


@pytest.mark.parametrize("fault, case, small", [
    ("groups in turn", "plain", dict(b=1, l=1, p=1, n=1)),
    ("no state between chunks", "many-chunks", dict(b=1, h=1, l=3, q=2, p=1, n=1, opts="")),
    ("y wrong from headdim 32 on", "large-tiles", dict(b=1, h=1, l=1, n=1, p=40)),
])
def test_the_smallest_failing_case_is_small(fault, case, small):
    spec = shrink(kernel(fault), case, torch.float32, seconds=20)
    found = parse(spec)[1]
    assert {k: found[k] for k in small} == small, spec
    assert judge(kernel(fault), spec, torch.float32).status == "wrong"


def test_the_report_says_where_and_how_to_see_it_again():
    verdict = judge(kernel("groups in turn"), "plain", torch.float32)
    text = report(kernel("groups in turn"), "plain", torch.float32, verdict, "package:kernel", seconds=5)
    for part in ("x its tolerance", "hint: heads take their groups in turn", "smallest case: plain:",
                 "first at batch 0, position 0 (chunk 0, place 0)", "--kernel package:kernel --dtype float32 --case 'plain:"):
        assert part in text, text


# For the command line, which wants a name to import.
broken = kernel("groups in turn")


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "pytest", "tests/test_kernel.py", "-p", "no:cacheprovider", *arguments],
                          cwd=ROOT, capture_output=True, text=True)


def test_exit_codes_and_table_of_the_command():
    wrong = command("--kernel", "tests.test_kernel_judge:broken", "--dtype", "float32", "-k", "plain or D-headdim or one-group")
    assert wrong.returncode == 1, wrong.stdout + wrong.stderr
    assert "1 right, 2 wrong, 0 not supported" in wrong.stdout and "WRONG" in wrong.stdout
    again = next(line for line in wrong.stdout.splitlines() if line.startswith("again: "))
    spec = again.partition("--case ")[2].strip("'")
    assert judge(broken, spec, torch.float32).status == "wrong"
    parallel = ["-n", "1"] if importlib.util.find_spec("xdist") else []           # the table also arrives from a worker
    right = command("--dtype", "float32", "--case", spec, *parallel)
    assert right.returncode == 0 and "1 right, 0 wrong" in right.stdout, right.stdout + right.stderr


if __name__ == "__main__":            # PYTHONPATH=. python tests/test_kernel_judge.py prints the table of the README
    print(f"{'fault':50}{'case':22}{'dtype':10}{'right':>7}{'broken':>10}  first hint")
    for fault, (case, dtype, _) in FAULTS.items():
        right, wrong = (judge(kernel(f), case, DTYPES[dtype]) for f in (None, fault))
        hint = ([wrong.why] if wrong.why else []) + explain(kernel(fault), case, DTYPES[dtype], wrong)
        print(f"{fault:50}{case:22}{dtype:10}{right.worst:7.2f}{wrong.worst:10.3g}  {hint[0] if hint else ''}")
    print("\nhalf precision, where it accumulates and where it only rounds: worst error over its tolerance")
    for case in ("running-sum", "long-memory", "long-chunk"):
        for dtype in ("bfloat16", "float16"):
            worst = {f: judge(kernel(f), case, DTYPES[dtype]).worst
                     for f in (None, "running sum in half", "state in half", "products summed in half")}
            print(f"{case:14}{dtype:10}" + "  ".join(f"{f or 'right'}: {w:.3g}" for f, w in worst.items()))
