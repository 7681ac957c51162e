"""
The judge of Mamba2 kernels: is this function the selective scan that it claims to be?

    python -m pytest tests/test_kernel.py --kernel package.module:function [--device cuda] [--dtype float32,bfloat16]

The function has the signature of mamba_ssm's mamba_chunk_scan_combined. Without --kernel our own chunked form is
held to the same tests. Exit code 0: right, 1: wrong, as pytest's are. What a kernel lacks (it raises TypeError or
NotImplementedError) is reported as "not supported"; --require FEATURE, or all, makes it a failure.

Read in this order: CASES, one line per feature; `careful`, where the tolerances come from; `judge`; `explain`.

The tolerance of every tensor is measured, not guessed. The truth is the recurrence in float64 on the very inputs
that the kernel got. Beside it `careful` runs the chunked algorithm in float64, with an error put in wherever a
careful kernel of that dtype rounds: operands of products in the dtype, sums and states in float32, results in the
dtype. What eight such draws miss the truth by is what a right kernel may miss it by, times SLACK. Since the errors
go in at the summands, a result that is small because its summands cancel (dA, most of all) gets the tolerance of
its summands. A kernel that *sums* in half precision loses much more than one that rounds operands, and fails.
"""
import contextlib
import functools
import importlib
import math
import time
import traceback
import zlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import mamba2_ref

SLACK = 4            # a kernel may be this much worse than the careful one; margins measured are in the README
DRAWS = 8

# --- The cases: one line per feature --------------------------------------------------------------------------
# Sizes b l h p g n and the chunk q; steps dt and decay rates |A| log-uniform in a range; options by name.
# 6 heads in 2 groups and sizes that are no powers of two unless a case says otherwise.

BASE = dict(b=1, l=21, h=4, p=5, g=2, n=7, q=8, dt=(0.02, 0.3), A=(0.3, 3.0), mean=0.0, opts="final")
CASES = {
    "plain": dict(b=2, l=37, q=16, opts=""),
    # lengths
    "length-1": dict(l=1),
    "length-2": dict(l=2),
    "chunk-minus-1": dict(l=15, q=16),
    "chunk": dict(l=16, q=16),
    "chunk-plus-1": dict(l=17, q=16),
    "two-chunks-minus-1": dict(l=31, q=16),
    "two-chunks": dict(l=32, q=16),
    "many-chunks": dict(l=131, h=2, g=1, A=(0.03, 1.0)),
    "large-tiles": dict(l=100, h=2, g=1, p=40, n=36, q=64),
    # sizes
    "all-ones": dict(h=1, g=1, p=1, n=1),
    "odd-sizes": dict(b=3, h=6, p=3, n=11),
    "three-groups": dict(h=9, g=3, l=11),
    "one-group": dict(h=3, g=1),
    "group-per-head": dict(h=3, g=3),
    # options, alone and together
    "D": dict(opts="D"),
    "D-headdim": dict(opts="D-headdim"),
    "z": dict(opts="z"),
    "z+D": dict(opts="z D"),
    "dt_bias": dict(opts="dt_bias"),
    "dt_softplus": dict(opts="dt_softplus"),
    "dt_softplus-wide": dict(opts="dt_softplus dt_bias", dt=(0.003, 30.0), A=(0.03, 0.3)),
    "dt_limit": dict(opts="dt_limit"),
    "initial_states": dict(opts="initial_states"),
    "final_states": dict(opts="final"),
    "final_states-only": dict(opts="final dy-zero"),
    "both-states": dict(opts="initial_states final"),
    "all": dict(b=2, opts="D-headdim z dt_bias dt_softplus dt_limit initial_states final"),
    # packed sequences: where the borders lie; each further row has its own a token later
    "seq_idx-at-chunk": dict(b=2, opts="seq_idx=8"),
    "seq_idx-before-chunk": dict(opts="seq_idx=7,15"),
    "seq_idx-after-chunk": dict(opts="seq_idx=9,17"),
    "seq_idx-short": dict(l=29, opts="seq_idx=1,2,5,25"),
    "seq_idx-all": dict(b=2, opts="seq_idx=3,8,19 D z dt_bias dt_softplus initial_states final"),
    # steps and rates from tiny to such that exp underflows
    "dt-tiny": dict(dt=(1e-6, 1e-4)),
    "A-tiny": dict(A=(1e-7, 1e-4), opts="initial_states final"),
    "A-huge": dict(A=(50.0, 5000.0), dt=(0.1, 1.0), opts="initial_states final"),
    "A-dt-mixed": dict(A=(1e-3, 1e3), dt=(1e-3, 10.0), opts="initial_states final"),
    "seq_idx-A-huge": dict(A=(50.0, 5000.0), dt=(0.1, 1.0), opts="seq_idx=3,8 final"),
    # sums in which a kernel that accumulates in half precision loses its digits
    "running-sum": dict(l=150, h=2, g=1, q=128, dt=(0.15, 0.6), A=(0.5, 1.5)),
    "long-memory": dict(l=300, h=1, g=1, q=4, dt=(0.05, 0.1), A=(0.01, 0.03), mean=1.0),
    "long-chunk": dict(l=512, h=1, g=1, p=3, n=5, q=512, dt=(0.05, 0.1), A=(0.01, 0.03), mean=1.0),
    # how the tensors lie in memory, and running twice
    "views": dict(b=2, opts="views z initial_states final seq_idx=10"),
    "views-D": dict(opts="views D"),
    "dy-expanded": dict(opts="dy-expanded final"),
    "repeats": dict(b=2, opts="repeats D z initial_states final"),
}
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
GRADS = "x dt A B C D z dt_bias initial_states".split()
HEAD = {"final_states": 1, "dinitial_states": 1, "dA": 0, "dD": 0, "ddt_bias": 0}   # axis of the head or group; else 2


def parse(spec):
    """"feature:l=17,opts=D+z" -> (feature, the whole case)."""
    feature, _, changes = spec.partition(":")
    if feature not in CASES:
        raise pytest.UsageError(f"--case: no feature {feature!r}; there are {', '.join(CASES)}")
    case = BASE | CASES[feature]
    for change in filter(None, changes.split(",")):
        key, _, value = change.partition("=")
        case[key] = value.replace("+", " ").replace(";", ",") if key == "opts" else int(value)
    return feature, case


def spell(feature, case):
    start = BASE | CASES[feature]
    changes = [f"{k}=" + (v.replace(",", ";").replace(" ", "+") if k == "opts" else str(v))
               for k, v in case.items() if v != start[k]]
    return ":".join(filter(None, [feature, ",".join(changes)]))


def build(feature, case, dtype, device="cpu"):
    """Return the tensors that get a gradient, the other arguments, and the gradients of y and the final state."""
    b, l, h, p, g, n = (case[k] for k in "blhpgn")
    opts = dict(o.partition("=")[::2] for o in case["opts"].split())
    random = torch.Generator().manual_seed(zlib.crc32(feature.encode()))
    normal = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    spread = lambda low, high, *shape: low * (high / low) ** torch.rand(*shape, generator=random, dtype=torch.float64)
    biased = lambda *shape: case["mean"] + normal(*shape) * (0.5 if case["mean"] else 1)
    single = torch.promote_types(dtype, torch.float32)       # parameters and states stay in float32, as in mamba_ssm

    t = {"x": biased(b, l, h, p), "dt": spread(*case["dt"], b, l, h), "B": biased(b, l, g, n), "C": biased(b, l, g, n)}
    # The rates of the heads span the whole range in every draw.
    exponents = torch.linspace(0, 1, h, dtype=torch.float64)[torch.randperm(h, generator=random)]
    t["A"] = -case["A"][0] * (case["A"][1] / case["A"][0]) ** exponents
    if "dt_softplus" in opts:
        t["dt"] = t["dt"] + torch.log(-torch.expm1(-t["dt"]))                        # softplus undoes it
    if "dt_bias" in opts:
        t["dt_bias"] = normal(h) * (1 if "dt_softplus" in opts else 0.01)
        t["dt"] = t["dt"] - t["dt_bias"]
    if "D" in opts:
        t["D"] = normal(h)
    if "D-headdim" in opts:
        t["D"] = normal(h, p)
    if "z" in opts:
        t["z"] = normal(b, l, h, p)
    if "initial_states" in opts:
        t["initial_states"] = biased(b, h, p, n)
    kw = {}
    if "dt_softplus" in opts:
        kw["dt_softplus"] = True
    if "dt_limit" in opts:
        kw["dt_limit"] = (0.06, 0.15)
    if "final" in opts:
        kw["return_final_states"] = True
    if "seq_idx" in opts:
        borders = torch.tensor([int(s) for s in opts["seq_idx"].split(",")])
        at = torch.arange(l) - torch.arange(b)[:, None]                              # (b, l)
        kw["seq_idx"] = (at[..., None] >= borders).sum(-1).int().to(device)
    dy, dfinal = normal(b, l, h, p) + case["mean"], normal(b, h, p, n) + case["mean"]
    dy, dfinal = (dy * ("dy-zero" not in opts)).to(dtype).to(device), dfinal.to(single).to(device)
    t = {k: v.to(single if k in ("A", "D", "dt_bias", "initial_states") else dtype).to(device) for k, v in t.items()}
    if "views" in opts:
        t, dy, dfinal = {k: odd(v) for k, v in t.items()}, odd(dy), odd(dfinal)
        kw = {k: odd(v) if k == "seq_idx" else v for k, v in kw.items()}
    if "dy-expanded" in opts:                                   # what y.sum().backward() sends
        dy = dy[:1, :1, :1, :1].expand_as(dy)
    return t, kw, dy, dfinal if "final" in opts else None


def odd(t):
    """The same values behind odd strides: the first two axes swapped in memory, two unused numbers behind each row."""
    room = F.pad(t.transpose(0, 1) if t.dim() > 1 else t[:, None], (0, 2), value=77).contiguous()
    return room.transpose(0, 1)[tuple(map(slice, t.shape))] if t.dim() > 1 else room[:, 0]


# --- The truth, and what a careful kernel may miss it by -------------------------------------------------------


def run(kernel, t, kw, dy, dfinal, q):
    """Forward and backward: {"y", "final_states", "dx", "ddt", ...}. No gradients where the kernel has no backward."""
    leaves = {k: v.detach().requires_grad_() for k, v in t.items()}
    x, dt, A, B, C, *_ = (leaves[k] for k in ("x", "dt", "A", "B", "C"))
    out = kernel(x, dt, A, B, C, q, **{k: v for k, v in leaves.items() if k not in ("x", "dt", "A", "B", "C")}, **kw)
    pair = isinstance(out, tuple)
    if pair != (dfinal is not None):
        raise Wrong(f"returned {'a tuple' if pair else 'one tensor'} with return_final_states={not pair}")
    out = dict(zip(("y", "final_states"), out if pair else (out,), strict=False))
    if not all(o.requires_grad for o in out.values()):
        raise Wrong("an output does not require grad: the path back to the inputs is cut")
    try:
        grads = torch.autograd.grad(list(out.values()), list(leaves.values()), [dy, dfinal][: len(out)], allow_unused=True)
    except NotImplementedError:
        return {k: o.detach() for k, o in out.items()}
    return {k: o.detach() for k, o in out.items()} | {"d" + k: g for k, g in zip(leaves, grads, strict=True)}


class Wrong(Exception):
    """The kernel broke its contract in a way that needs no comparison of numbers."""


def recurrent(x, dt, A, B, C, chunk_size, **kw):
    return mamba2_ref.ssd_recurrent(x, dt, A, B, C, **kw)


def chunked(x, dt, A, B, C, chunk_size, **kw):
    return mamba2_ref.ssd_chunked(x, dt, A, B, C, chunk_size, **kw)


class Rounding(torch.autograd.Function):
    """t (1 + u e) with random |e| <= 1, on the way forward and, independently, on the gradient."""
    random = torch.Generator().manual_seed(0)

    @staticmethod
    def errors(t):
        return torch.rand(t.shape, generator=Rounding.random, dtype=t.dtype) * 2 - 1

    @staticmethod
    def forward(ctx, t, forward, backward, least, errors=(None, None)):
        ctx.noise = backward, least, errors[1]
        return Rounding.noisy(t, forward, least, errors[0]) if forward else t.clone()

    @staticmethod
    def backward(ctx, grad):
        return Rounding.noisy(grad, *ctx.noise), None, None, None, None

    @staticmethod
    def noisy(t, u, least, e):
        return t + (u * t.abs() + least * (t != 0)) * (Rounding.errors(t) if e is None else e)


def careful(x, dt, A, B, C, q, *, u, u_sum, u_in, eps, least, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
            dt_softplus=False, dt_limit=(0.0, math.inf), return_final_states=False):
    """The chunked algorithm with rounding errors where a kernel has them. Every tensor has a leading axis of draws.

    u is the unit roundoff of what is stored in the tested dtype: results and operands of products. u_sum is that of
    what a kernel keeps in float32, times the root of the number of summands: a random walk of rounding errors.
    u_in is not 0 only where the inputs themselves are cut before a product, as to tf32. eps is what rounding loses of a 1.
    """
    op = lambda t: Rounding.apply(t, u, u, least)
    add = lambda t: Rounding.apply(t, u_sum, u_sum, 0.0)
    each = lambda t, like: add(t.expand_as(like) if t.shape != like.shape else t)   # noise on each summand of a gradient
    own = lambda t: Rounding.apply(t, u_in, u, least)                         # the gradient is stored in the dtype
    x, B, C, dt = own(x), own(B), own(C), Rounding.apply(dt, 0.0, u, least)   # (k, b, l, ...)
    b, l, h = dt.shape[1:]
    dt = dt if dt_bias is None else dt + each(dt_bias[:, None, None], dt)
    near_1 = lambda: eps * Rounding.errors(dt)
    if dt_softplus:                              # kernels compute log(1 + exp(dt)): the 1 costs a small step its digits
        dt = F.softplus(dt) + near_1()
    dt = dt.clamp(*dt_limit)
    if dt_bias is not None or dt_softplus or dt_limit != (0.0, math.inf):
        dt = op(dt)                                                           # some return the step to the dtype
    a = each(A[:, None, None], dt) * dt + near_1()    # (k, b, l, h); a recurrent kernel rounds exp(a), which may be near 1
    B, C = (t.repeat_interleave(h // t.shape[3], 3) for t in (B, C))          # (k, b, l, h, n)
    sequence = torch.zeros(b, l) if seq_idx is None else F.pad(seq_idx.diff(dim=1) != 0, (1, 0)).cumsum(1)
    before, state, ys = torch.zeros(b), initial_states, []
    if state is None:
        state = x.new_zeros(*x.shape[:2], *x.shape[3:], B.shape[-1])          # (k, b, h, p, n)
    # A state that hardly changes from chunk to chunk is rounded the same way in each: one error for all of them.
    stored = lambda t: Rounding.apply(t, u, u, least, same_errors)
    same_errors = Rounding.errors(state), Rounding.errors(state)
    for c in (slice(i, min(i + q, l)) for i in range(0, l, q)):
        s, sums, x_c, B_c, C_c = sequence[:, c], a[:, :, c].cumsum(2), x[:, :, c], B[:, :, c], C[:, :, c]
        start, end = add(sums), add(sums[:, :, -1:])                          # (k, b, i, h), (k, b, 1, h)
        same = (s[:, :, None] == s[:, None]).tril()[..., None]                # (b, i, j, 1)
        L = (start[:, :, :, None] - add(sums)[:, :, None]).masked_fill(~same, -math.inf).exp()
        M = op(torch.einsum("kbihn,kbjhn->kbijh", C_c, B_c) * L * dt[:, :, None, c])
        into = torch.where((s == before[:, None])[..., None], start.exp(), 0.0)          # (k, b, i, h)
        out = torch.where((s == s[:, -1:])[..., None], (end - add(sums)).exp(), 0.0) * dt[:, :, c]
        y = torch.einsum("kbijh,kbjhp->kbihp", M, x_c)
        ys.append(add(y + into[..., None] * torch.einsum("kbihn,kbhpn->kbihp", C_c, stored(state))))
        keep = torch.where((s[:, -1] == before)[:, None, None], end.exp(), 0.0)[:, :, 0, :, None, None]
        state = add(keep * state + torch.einsum("kbjhn,kbjhp->kbhpn", op(out[..., None] * B_c), x_c))
        before = s[:, -1]
    y = torch.cat(ys, 2)
    if D is not None:
        y = y + each((D if D.dim() == 3 else D[..., None])[:, None, None], x) * x
    if z is not None:
        y = op(y) * F.silu(own(z))
    y = Rounding.apply(y, u, u, least)
    return (y, state) if return_final_states else y


@functools.cache
def truth(spec, dtype, precision, tf32=False):
    """The oracle's results for a case whose inputs have `dtype`, and their tolerances for a kernel of `precision`.

    A tolerance is two numbers per head (or group): one for the root mean square error, one for the largest.
    """
    feature, case = parse(spec)
    t, kw, dy, dfinal = build(feature, case, dtype)
    double = lambda v: None if v is None else v.double()
    t, dy, dfinal = {k: v.double() for k, v in t.items()}, dy.double(), double(dfinal)
    want = run(recurrent, t, kw, dy, dfinal, case["q"])
    want = {k: torch.zeros_like(t[k[1:]]) if v is None else v for k, v in want.items()}

    eps = torch.finfo(torch.promote_types(precision, torch.float32)).eps / 2
    u_sum = eps * math.sqrt(max(case["b"] * case["l"], case["n"], case["p"]))
    u_in = 2**-10 if tf32 and precision == torch.float32 else 0.0               # the 13 bits that tf32 lacks are cut off
    u = max(torch.finfo(precision).eps / 2, u_sum, u_in)
    # float16 has an end at the bottom, too: below its smallest number the error no longer shrinks with the value.
    least = 2**-25 if precision == torch.float16 else 1e-40
    many = lambda v: v.expand(DRAWS, *v.shape)
    Rounding.random.manual_seed(0)
    draws = run(lambda *args, **kws: careful(*args, **kws, u=u, u_sum=u_sum, u_in=u_in, eps=eps, least=least),
                {k: many(v) for k, v in t.items()}, kw, many(dy), None if dfinal is None else many(dfinal), case["q"])
    limits = {}
    for name, value in want.items():
        assert value.isfinite().all() and draws[name].isfinite().all(), (spec, name)
        error = (draws[name] - value).movedim(1 + HEAD.get(name, 2), 0).flatten(1)          # (heads, the rest)
        floor = 4 * least if precision == torch.float16 else 1e-36
        limits[name] = tuple(SLACK * e.clamp(min=floor) for e in (error.square().mean(1).sqrt(), error.abs().amax(1)))
    return want, limits


def excess(got, want, limits, name):
    """Error over tolerance, per head (root mean square) and per element: above 1 is wrong."""
    error = (got.double() - want).movedim(HEAD.get(name, 2), 0)                                # (heads, ...)
    error = error.abs().nan_to_num(math.inf, math.inf)
    flat = error.reshape(len(error), -1)
    per_head = flat.square().mean(1).sqrt() / limits[0]
    per_element = (flat / limits[1][:, None]).view_as(error).movedim(0, HEAD.get(name, 2))
    return per_head, per_element


# --- The judge -----------------------------------------------------------------------------------------------------


class Poison(TorchDispatchMode):
    """Memory that nobody has written yet holds NaN, so that a kernel that reads or returns it is found out."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"):
            out.fill_(math.nan) if out.is_floating_point() else None
        return out


class Verdict:
    """What came out for one case: status "right", "wrong" or "not supported"; why; the worst error over its tolerance."""

    def __init__(self, status, why="", worst=0.0, where="", got=None, over=None):
        self.status, self.why, self.worst, self.where, self.got, self.over = status, why, worst, where, got, over


def judge(kernel, spec, dtype, device="cpu", tf32=False, poison=True, precision=None):
    """Run one case and compare every output and gradient with the truth. `over` holds error / tolerance by name."""
    feature, case = parse(spec)
    want, limits = truth(spec, dtype, precision or dtype, tf32)
    t, kw, dy, dfinal = build(feature, case, dtype, device)
    given = [*t.values(), dy, *(v for v in (kw.get("seq_idx"), dfinal) if v is not None)]
    before, runs = [v.clone() for v in given], []
    for _ in range(3 if "repeats" in case["opts"] else 1):
        try:
            with Poison() if poison else contextlib.nullcontext():
                got = run(kernel, t, kw, dy, dfinal, case["q"])
        except (TypeError, NotImplementedError) as error:
            return Verdict("not supported", f"{type(error).__name__}: {error}")
        except Wrong as error:
            return Verdict("wrong", str(error), math.inf, "call")
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}, {frame.line}"
            return Verdict("wrong", f"raised {type(error).__name__}: {error} ({at})", math.inf, "call")
        runs.append({k: torch.zeros_like(want[k]) if v is None else v.cpu() for k, v in got.items()})   # as autograd has it
    got = runs[0]
    lacks = [k for k in want if k not in got]                    # all the gradients, where there is no backward
    single = torch.promote_types(dtype, torch.float32)
    for name, value in want.items():
        if name in lacks:
            continue
        if got[name].shape != value.shape:
            return Verdict("wrong", f"{name} has shape {tuple(got[name].shape)}, not {tuple(value.shape)}", math.inf, name)
    for name, expected in (("y", dtype), ("final_states", single)):
        if name in got and got[name].dtype != expected and precision is None:
            if dtype == torch.float64:
                return Verdict("not supported", f"returns {name} in {got[name].dtype} for float64 inputs")
            return Verdict("wrong", f"{name} is {got[name].dtype}, not {expected}", math.inf, name)
    if any(not torch.equal(v, old) for v, old in zip(given, before, strict=True)):
        return Verdict("wrong", "the kernel writes into its inputs", math.inf, "inputs")

    over = {k: max(float(e.max()) for e in excess(got[k], want[k], limits[k], k)) for k in want if k not in lacks}
    where = max(over, key=over.get)
    verdict = Verdict("right" if over[where] <= 1 else "wrong", "", over[where], where, got, over)
    drift = max((float(e.max()) for other in runs[1:] for k in over                # sums in another order are no error,
                 for e in excess(other[k], got[k].double(), limits[k], k)), default=0.0)              # but a race is
    if drift > 0.5:
        verdict.status, verdict.why = "wrong", f"repeats differ, by {drift:.2g} of the tolerance"
        verdict.worst = max(verdict.worst, drift)
    elif verdict.status == "wrong" and dtype == torch.float64 and precision is None:
        if judge(kernel, spec, dtype, device, tf32, poison, precision=torch.float32).status == "right":
            verdict.status, verdict.why = "not supported", "takes float64 but computes in float32"
    elif verdict.status == "right" and lacks:
        verdict.status, verdict.why = "not supported", "no backward pass"
    elif verdict.status == "right" and drift > 0:
        verdict.status, verdict.why = "not supported", f"repeats differ, by {drift:.2g} of the tolerance"
    return verdict


# --- What is wrong, precisely enough to find the line ------------------------------------------------------------


def shrink(kernel, spec, dtype, seconds, **options):
    """The smallest case that is still wrong: drop options and halve sizes for as long as it is, and time allows."""
    feature, case = parse(spec)
    end, progress = time.monotonic() + seconds, True
    while progress:
        progress = False
        words = case["opts"].split()
        moves = [{"opts": " ".join(words[:i] + words[i + 1 :])} for i in range(len(words))]
        moves += [dict(b=1), dict(h=1, g=1), dict(h=2, g=2), dict(h=2, g=1), dict(p=1), dict(n=1)]
        moves += [dict(q=q, l=l) for q in (case["q"], 2, 4, 8) for l in (1, 2, q - 1, q, q + 1, 2 * q + 1, case["l"] // 2)]
        moves += [dict(p=case["p"] // 2), dict(n=case["n"] // 2), dict(l=case["l"] - 1)]
        size = lambda c: (len(c["opts"].split()), c["b"] * c["l"] * c["h"] * c["p"] * c["n"] * c["g"], c["q"])
        for move in moves:
            smaller = case | move
            if time.monotonic() > end:
                break
            if min(smaller[k] for k in "blhpgnq") < 1 or not size(smaller) < size(case) or size(smaller)[1] > size(case)[1]:
                continue
            if judge(kernel, spell(feature, smaller), dtype, **options).status == "wrong":
                case, progress = smaller, True
                break
    return spell(feature, case)


AXES = {"y": "batch position head headdim", "final_states": "batch head headdim state", "dA": "head", "ddt_bias": "head",
        "ddt": "batch position head", "dB": "batch position group state", "dC": "batch position group state",
        "dx": "batch position head headdim", "dz": "batch position head headdim", "dD": "head headdim",
        "dinitial_states": "batch head headdim state"}


def locate(name, verdict, spec, dtype, tf32=False):
    """Where the error starts, in words."""
    want, limits = truth(spec, dtype, dtype, tf32)
    q = parse(spec)[1]["q"]
    _, ratio = excess(verdict.got[name], want[name], limits[name], name)
    bad = ratio > 1 if bool((ratio > 1).any()) else ratio == ratio.max()       # else only the mean square is too large
    axes = AXES[name].split()
    spots = bad.nonzero()
    spot = min(spots.tolist(), key=lambda s: (s[1], *s)) if "position" in axes else spots[0].tolist()
    in_chunk = lambda axis, i: f" (chunk {i // q}, place {i % q})" if axis == "position" else ""
    words = [f"{axis} {i}{in_chunk(axis, i)}" for axis, i in zip(axes, spot, strict=False)]
    return (f"{name}: {int(bad.sum())} of {bad.numel()} wrong, first at {', '.join(words)}: "
            f"got {verdict.got[name][tuple(spot)]:.6g}, truth {want[name][tuple(spot)]:.6g}")


def without(kw, *names):
    return {k: v for k, v in kw.items() if k not in names}


def gate(function):
    """y as the oracle has it, but with another gate on z: function(the scan alone, D x, z)."""
    def variant(x, dt, A, B, C, q, D=None, z=None, return_final_states=False, **kw):
        y, final = mamba2_ref.ssd_recurrent(x, dt, A, B, C, return_final_states=True, **kw)
        skip = 0 if D is None else x * (D if D.dim() == 2 else D[:, None])
        y = function(y, skip, z) if z is not None else y + skip
        return (y, final) if return_final_states else y
    return variant


def step(function):
    """The oracle with another formula for the step: function(dt, dt_bias, dt_softplus, (low, high))."""
    def variant(x, dt, A, B, C, q, dt_bias=None, dt_softplus=False, dt_limit=(0.0, math.inf), **kw):
        bias = torch.zeros_like(A) if dt_bias is None else dt_bias
        soft = F.softplus if dt_softplus else lambda t: t
        return mamba2_ref.ssd_recurrent(x, function(dt, bias, soft, dt_limit), A, B, C, **kw)
    return variant


def borders(function):
    """The oracle with other borders between packed sequences: function(seq_idx, chunk) -> seq_idx."""
    def variant(x, dt, A, B, C, q, seq_idx=None, **kw):
        seq_idx = torch.zeros(x.shape[:2], dtype=torch.int64) if seq_idx is None else seq_idx.long()
        return mamba2_ref.ssd_recurrent(x, dt, A, B, C, seq_idx=function(seq_idx, q), **kw)
    return variant


def per_group(function):
    def variant(x, dt, A, B, C, q, **kw):
        heads, groups = torch.arange(x.shape[2]), B.shape[2]
        index = function(heads, len(heads) // groups, groups)
        return mamba2_ref.ssd_recurrent(x, dt, A, B[:, :, index], C[:, :, index], **kw)
    return variant


def blind(x, dt, A, B, C, q, return_final_states=False, **kw):
    """The oracle without what a token sees of itself, for cases that leave the step alone."""
    if set(kw) & {"z", "dt_bias", "dt_softplus", "dt_limit"}:
        raise NotImplementedError
    y, final = mamba2_ref.ssd_recurrent(x, dt, A, B, C, return_final_states=True, **kw)
    y = y - ((B * C).sum(-1).repeat_interleave(x.shape[2] // B.shape[2], 2) * dt)[..., None] * x
    return (y, final) if return_final_states else y


def transposed(state):
    """The state that a kernel meant which read or wrote the memory of `state` as (b, h, n, p)."""
    return state.flatten(2).unflatten(2, state.shape[:1:-1]).mT


# Known mistakes as mistaken oracles. A kernel whose outputs, or else whose gradients, are those of one has made it.
clamp = lambda t, limit: t.clamp(*limit)
chunk_of = lambda seq, q: torch.arange(seq.shape[1]) // q
MISTAKES = {
    "D x is left out": lambda *a, **kw: recurrent(*a, **without(kw, "D")),
    "only D[:, 0] is used, as if D had no headdim": lambda *a, **kw: recurrent(*a, **kw | {"D": kw["D"][:, 0]}),
    "the gate z is left out": lambda *a, **kw: recurrent(*a, **without(kw, "z")),
    "the gate is applied before D x is added": gate(lambda y, skip, z: y * F.silu(z) + skip),
    "the gate is sigmoid(z), not silu(z)": gate(lambda y, skip, z: (y + skip) * z.sigmoid()),
    "the gate is z, without silu": gate(lambda y, skip, z: (y + skip) * z),
    "dt_bias is left out": lambda *a, **kw: recurrent(*a, **without(kw, "dt_bias")),
    "dt_softplus is ignored": lambda *a, **kw: recurrent(*a, **without(kw, "dt_softplus")),
    "dt_bias is added after softplus": step(lambda dt, bias, soft, limit: clamp(soft(dt) + bias, limit)),
    "dt_limit is ignored": lambda *a, **kw: recurrent(*a, **without(kw, "dt_limit")),
    "dt is clamped before softplus": step(lambda dt, bias, soft, limit: soft(clamp(dt + bias, limit))),
    "dt is clamped from one side only": step(lambda dt, bias, soft, limit: soft(dt + bias).clamp(max=limit[1])),
    "initial_states are ignored": lambda *a, **kw: recurrent(*a, **without(kw, "initial_states")),
    "initial_states are read transposed":
        lambda *a, **kw: recurrent(*a, **kw | {"initial_states": transposed(kw["initial_states"])}),
    "seq_idx is ignored: the state leaks over the borders": borders(lambda seq, q: seq * 0),
    "the state leaks over borders inside a chunk": borders(lambda seq, q: seq[:, chunk_of(seq, q) * q]),
    "the state leaks over borders that lie between two chunks":
        borders(lambda seq, q: F.pad((seq.diff(dim=1) != 0) & (torch.arange(1, seq.shape[1]) % q > 0), (1, 0)).cumsum(1)),
    "the state is emptied one token late": borders(lambda seq, q: F.pad(seq, (1, 0))[:, :-1]),
    "the state is emptied one token early": borders(lambda seq, q: torch.cat([seq[:, 1:], seq[:, -1:]], 1)),
    "a token does not see itself: the diagonal of L is left out": blind,
    "no state passes from chunk to chunk": borders(lambda seq, q: seq * 10**6 + chunk_of(seq, q)),
    "heads take their groups in turn (head % ngroups), not in blocks": per_group(lambda head, r, g: head % g),
    "all heads use group 0": per_group(lambda head, r, g: head * 0),
    "B and C are exchanged": lambda x, dt, A, B, C, q, **kw: recurrent(x, dt, A, C, B, q, **kw),
    "A is taken with the wrong sign": lambda x, dt, A, B, C, q, **kw: recurrent(x, dt, -A, B, C, q, **kw),
    "x is not multiplied by dt": lambda x, dt, A, B, C, q, **kw: recurrent(x / dt[..., None], dt, A, B, C, q, **kw),
}


def explain(kernel, spec, dtype, verdict, **options):
    """Hints, the most telling first: what mistake it looks like, and in which part of the tensors it shows."""
    feature, case = parse(spec)
    tf32, l, q, hints = options.get("tf32", False), case["l"], case["q"], []
    want, limits = truth(spec, dtype, dtype, tf32)
    for word, what in (("views", "inputs with odd strides"), ("dy-expanded", "a gradient of y with stride 0, as y.sum() gives")):
        plain = spell(feature, case | {"opts": case["opts"].replace(word, "").strip()})
        if word in case["opts"] and judge(kernel, plain, dtype, **options).status == "right":
            return [f"right for contiguous tensors, wrong for {what}"]
    if verdict.got is None or verdict.why:
        if "number of gradients" in verdict.why:
            hints.append("backward must return one value per argument of forward, None for those without a gradient")
        elif verdict.why.startswith("raised") and (l % q or l < q):
            hints.append("refuses a length that is no multiple of the chunk" if judge(
                kernel, f"{feature}:l={2 * q}", dtype, **options).status == "right" else "")
        return [h for h in hints if h]
    got, over = verdict.got, verdict.over
    wrong = [k for k in over if over[k] > 1]
    forward = [k for k in wrong if k in ("y", "final_states")]
    t, kw, dy, dfinal = build(feature, case, dtype)
    t64, dy64, dfinal64 = {k: v.double() for k, v in t.items()}, dy.double(), None if dfinal is None else dfinal.double()

    # 1. Not a number.
    if any(not got[k].isfinite().all() for k in wrong):
        names = ", ".join(k for k in wrong if not got[k].isfinite().all())
        again = judge(kernel, spec, dtype, **options | {"poison": False})
        sums = (F.softplus(t64["dt"]) if "dt_softplus" in kw else t64["dt"]).mul(t64["A"]).abs()
        if again.got is not None and all(again.got[k].isfinite().all() for k in wrong):
            hints.append(f"{names}: memory that was allocated but never written is read or returned")
        elif float(sums.unfold(1, min(q, l), 1).sum(-1).max()) > 80:                 # exp of it is beyond float32
            hints.append(f"{names}: NaN or inf where |A dt| is large: exp of a positive difference overflows; mask before exp")
        else:
            hints.append(f"{names}: NaN or inf")

    # 2. A mistaken oracle that gives the same numbers.
    elif not_precision(kernel, spec, dtype, options):
        double = dict(t=t64, kw=kw, dy=dy64, dfinal=dfinal64, q=q)
        for words, mistake in MISTAKES.items():
            try:
                as_if = run(mistake, **double)
            except Exception:                                    # the mistake needs an option that this case lacks
                continue
            part = forward or [k for k in wrong if k in as_if]
            differs = [k for k in part if as_if[k] is not None and float(excess(as_if[k], want[k], limits[k], k)[0].max()) > 1]
            if differs == part and all(close(got[k], as_if[k], limits[k], k) for k in part):
                hints.append(words + ("" if forward else ", in the backward pass only"))
        if not forward and dfinal is not None and "dy-zero" not in case["opts"]:
            as_if = run(recurrent, **double | {"dfinal": dfinal64 * 0})
            if all(as_if[k] is not None and close(got[k], as_if[k], limits[k], k) for k in wrong):
                hints.append("the gradient of the final states is dropped")
        if not hints:
            for k in wrong:
                factor = float((got[k].double() * want[k]).sum() / want[k].square().sum())
                if abs(factor) > 1e-3 and close(got[k].double() / factor, want[k], limits[k], k):
                    hints.append(f"{k} is off by the factor {factor:.4g}")
                elif got[k].double().abs().max() == 0:
                    hints.append(f"{k} is zero throughout, or None")
                elif k == "final_states" and close(transposed(got[k]), want[k], limits[k], k):
                    hints.append("final_states are written transposed")
    # 3. Right in float32, so it is the arithmetic in half precision.
    else:
        how = "in tf32 or half precision" if dtype == torch.float32 else f"in {DTYPES_BY[dtype]}"
        growth = along(verdict, wrong, spec, dtype, tf32)
        hints.append(f"too little precision: something is summed {how} that a careful kernel keeps in float32" + growth
                     + ("; --tf32 admits such products" if dtype == torch.float32 else ""))

    # 4. Where it shows.
    if not forward:
        hints.append(f"forward is right; only {', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} wrong"
                     + {("dA", "ddt"): ": the gradient of the running sum of dt A", ("dA",): ": its sum over batch and length",
                        ("ddt",): ": what comes to it through dt x"}.get(tuple(sorted(set(wrong) - {"ddt_bias"})), ""))
    elif forward == ["final_states"]:
        hints.append("y is right, final_states are not" + (", and the length is no multiple of the chunk" if l % q else ""))
    hints += [h for k in wrong[:3] for h in pattern(k, verdict, spec, dtype, tf32)]
    return list(dict.fromkeys(hints))


DTYPES_BY = {d: name for name, d in DTYPES.items()}


def close(got, want, limits, name):
    return all(float(e.max()) <= 2 for e in excess(got, want, limits, name))


def not_precision(kernel, spec, dtype, options):
    """Is the mistake there in a finer dtype as well? (A kernel without one gets the benefit of the doubt.)"""
    finer = torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64
    return dtype == torch.float64 or judge(kernel, spec, finer, **options).status == "wrong"


def along(verdict, wrong, spec, dtype, tf32):
    """Does the error grow along the chunk (a running sum that restarts) or along the sequence (a state)?"""
    want, _ = truth(spec, dtype, dtype, tf32)
    case = parse(spec)[1]
    if "y" not in wrong:
        return ""
    error = (verdict.got["y"].double() - want["y"]).abs().mean((0, 2, 3)) / want["y"].abs().mean((0, 2, 3))   # (l,)
    if case["l"] >= 8 * case["q"]:
        half = len(error) // 2
        return ", and its error grows along the sequence: the state" if error[half:].mean() > 1.5 * error[:half].mean() else ""
    place = error[: case["q"]]
    half = len(place) // 2
    return ", and its error grows along the chunk: the running sum" if place[half:].mean() > 1.5 * place[:half].mean() else ""


def pattern(name, verdict, spec, dtype, tf32):
    """The part of a tensor to which its error is confined."""
    case, axes = parse(spec)[1], AXES[name].split()
    want, limits = truth(spec, dtype, dtype, tf32)
    _, ratio = excess(verdict.got[name], want[name], limits[name], name)
    bad, l, q, r = ratio > 1, case["l"], case["q"], case["h"] // case["g"]
    if not bad.any() or bad.all():
        return
    seen = {axis: set(bad.nonzero()[:, i].tolist()) for i, axis in enumerate(axes[: bad.dim()])}
    last = (l - 1) // q * q
    if "position" in seen and l > q:
        first, end = min(seen["position"]), max(seen["position"])
        if l % q and first >= last:
            yield f"{name}: only in the last, partial chunk"
        elif first >= q:
            yield f"{name}: only from the second chunk on"
        elif end < last:
            yield f"{name}: only before the last chunk"
        elif len({p % q for p in seen["position"]}) < min(4, q):
            yield f"{name}: only at place {', '.join(map(str, sorted({p % q for p in seen['position']})))} of a chunk"
    if "head" in seen and r > 1 and not any(h % r == 0 for h in seen["head"]):
        yield f"{name}: only for heads beyond the first of a group"
    for axis, size in zip("batch head group headdim state".split(), (case[k] for k in "bhgpn"), strict=True):
        if axis in seen and min(seen[axis]) > 0 and not (axis == "head" and r > 1 and min(seen[axis]) < r):
            yield f"{name}: only for {axis} {min(seen[axis])} and beyond"
        elif axis in seen and len(seen[axis]) == 1 and size > 1:
            yield f"{name}: only for {axis} {min(seen[axis])}"


def report(kernel, spec, dtype, verdict, kernel_name, seconds=15, **options):
    """The text of one failure: what, where, smallest case, hints, and the command that shows it again."""
    small = shrink(kernel, spec, dtype, seconds, **options)
    again = judge(kernel, small, dtype, **options)
    lines = [f"{parse(spec)[0]} in {DTYPES_BY[dtype]} is wrong: " + (verdict.why or ", ".join(
        f"{k} {v:.3g}x its tolerance" for k, v in sorted(verdict.over.items(), key=lambda kv: -kv[1]) if v > 1))]
    lines += [f"hint: {h}" for h in explain(kernel, spec, dtype, verdict, **options)]
    lines += [f"smallest case: {small}" + (f" ({again.why})" if again.why else "")]
    if again.over:
        lines += ["  " + locate(k, again, small, dtype, options.get("tf32", False)) for k, v in again.over.items() if v > 1]
    flags = f" --device {options['device']}" if options.get("device", "cpu") != "cpu" else ""
    lines += [f"again: python -m pytest tests/test_kernel.py --kernel {kernel_name} --dtype {DTYPES_BY[dtype]}{flags}"
              + (" --tf32" if options.get("tf32") else "") + f" --case '{small}'"]
    return "\n".join(lines)


# --- pytest --------------------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc):
    if "spec" in metafunc.fixturenames:
        option = metafunc.config.getoption
        dtypes = option("--dtype").split(",")
        unknown = [d for d in dtypes if d not in DTYPES]
        if unknown:
            raise pytest.UsageError(f"--dtype: {', '.join(unknown)}; known are {', '.join(DTYPES)}")
        required = set(filter(None, option("--require").split(","))) - {"all"} - set(CASES) - set(DTYPES)
        if required:
            raise pytest.UsageError(f"--require: no feature or dtype {', '.join(sorted(required))}")
        load(option("--kernel"))                                # before anything runs, if it cannot be found
        specs = [option("--case")] if option("--case") else list(CASES)
        metafunc.parametrize("spec, dtype", [(s, d) for s in specs for d in dtypes if parse(s)])


def load(path):
    module, _, name = path.partition(":")
    try:
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise pytest.UsageError(f"--kernel {path}: {error}. It reads package.module:function") from error


def test_kernel(spec, dtype, request, record_property):
    option = request.config.getoption
    kernel = load(option("--kernel"))
    options = dict(device=option("--device"), tf32=option("--tf32"))
    feature = parse(spec)[0]
    verdict = judge(kernel, spec, DTYPES[dtype], **options)
    record_property("verdict", [feature, dtype, verdict.status, verdict.worst, verdict.where])
    if verdict.status == "not supported":
        if {"all", feature, dtype} & set(option("--require").split(",")):
            pytest.fail(f"{feature} in {dtype} is required but not supported: {verdict.why}", pytrace=False)
        pytest.skip(f"not supported: {verdict.why}")
    if verdict.status == "wrong":
        pytest.fail(report(kernel, spec, DTYPES[dtype], verdict, option("--kernel"), **options), pytrace=False)


def table(rows):
    """The verdict, feature by dtype: the worst error of any output or gradient over its tolerance; above 1 is wrong."""
    cells = {(f, d): "not supported" if s == "not supported" else f"{w:.2f} {name}" if w <= 1 else f"WRONG {w:.3g} {name}"
             for f, d, s, w, name in rows}
    dtypes = [d for d in DTYPES if any(d == row[1] for row in rows)]
    yield "worst error over its tolerance, and where; above 1 is wrong"
    yield f"{'feature':22}" + "".join(f"{d:>26}" for d in dtypes)
    for feature in dict.fromkeys(row[0] for row in rows):
        yield f"{feature:22}" + "".join(f"{cells.get((feature, d), ''):>26}" for d in dtypes)
    count = [row[2] for row in rows]
    yield ", ".join(f"{count.count(s)} {s}" for s in ("right", "wrong", "not supported"))
