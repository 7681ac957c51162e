"""Kernels broken on purpose, by kind, for the judge's own tests.

`scan(fault)` is a right chunked scan of some fifty lines, or one line of it done wrong: the faults
that real kernels had, and those that one fears. The other kernels are that scan with something
around it.
"""
import contextlib
import gc
import itertools
import math
import sys

import torch
import torch.nn.functional as F

import mamba2_ref

# fault: (case that must catch it, dtype, what the hints or the verdict must say)
MATHEMATICS = {
    # seen in real kernels
    "exp before the mask": ("A-huge", "float32", "mask before exp"),
    "gradient of dt A wrong from the second tile on": (
        "large-tiles",
        "float32",
        "the gradient of the running sum of dt A",
    ),
    "y wrong from headdim 32 on": ("large-tiles", "float32", "headdim from 32 on"),
    "one gradient too few": ("plain", "float32", "backward must return one value per argument"),
    "D skipped": ("D", "float32", "D x is left out"),
    "final state of the last full chunk": (
        "final_states",
        "float32",
        "the length is no multiple of the chunk",
    ),
    "groups in turn": ("plain", "float32", "heads take their groups in turn"),
    "leak inside a chunk": ("seq_idx-before-chunk", "float32", "leaks over borders inside a chunk"),
    "leak between chunks": (
        "seq_idx-at-chunk",
        "float32",
        "leaks over borders that lie between two chunks",
    ),
    "running sum in half": (
        "running-sum",
        "bfloat16",
        "its error grows along the chunk: the running sum",
    ),
    "refuses lengths": (
        "chunk-plus-1",
        "float32",
        "refuses a length that is no multiple of the chunk",
    ),
    # precision
    "state in half": ("long-memory", "bfloat16", "too little precision"),
    "products summed in half": ("long-chunk", "bfloat16", "too little precision"),
    "products in tf32": ("plain", "float32", "--tf32 admits"),
    "final state returned in half": (
        "final_states",
        "bfloat16",
        "final_states is torch.bfloat16, not torch.float32",
    ),
    # forward
    "gate before D": ("z+D", "float32", "the gate is applied before D x is added"),
    "bias after softplus": ("dt_softplus-wide", "float32", "dt_bias is added after softplus"),
    "clamp before softplus": ("all", "float32", "dt is clamped before softplus"),
    "initial state ignored": ("initial_states", "float32", "initial_states are ignored"),
    "no state between chunks": ("two-chunks", "float32", "no state passes from chunk to chunk"),
    "decay of the state ignores the token's own step": (
        "two-chunks",
        "float32",
        "y: only from the second chunk on",
    ),
    "batch row 0 for B": ("plain", "float32", "only for batch 1"),
    "diagonal missing": ("plain", "float32", "a token does not see itself"),
    "last chunk never written": ("chunk-plus-1", "float32", "never written"),
    "final state transposed": ("final_states", "float32", "final_states are written transposed"),
    "strides of x ignored": ("views", "float32", "wrong for inputs with odd strides"),
    # backward
    "final state detached": (
        "both-states",
        "float32",
        "the gradient of the final states is dropped",
    ),
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


def scan(fault=None):
    """A right chunked scan for fault=None, else one with that fault."""

    calls = itertools.count()

    def chunks(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=None,
        z=None,
        dt_bias=None,
        initial_states=None,
        seq_idx=None,
        dt_softplus=False,
        dt_limit=(0.0, math.inf),
        return_final_states=False,
    ):
        is_ = lambda *names: fault in names
        b, l, h, p = x.shape
        g, n = B.shape[2:]
        half, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        if is_("refuses lengths") and l % chunk_size:
            raise AssertionError                    # without a word
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
            tf32 = lambda t: Bend.apply(
                t + ((t.detach().view(torch.int32) & -8192).view(torch.float32) - t.detach()),
                lambda d: d,
            )
            values, Bs, Cs = tf32(values), tf32(Bs), tf32(Cs)
        packed = torch.zeros(b, l, dtype=torch.int64) if seq_idx is None else seq_idx.long()
        if is_("leak inside a chunk"):
            packed = packed[:, torch.arange(l) // chunk_size * chunk_size]
        state = (
            torch.zeros(b, h, p, n, dtype=wide)
            if initial_states is None or is_("initial state ignored")
            else initial_states
        )
        before, ys, full = packed[:, 0], [], state
        for i in range(0, l, chunk_size):
            c = slice(i, min(i + chunk_size, l))
            s, sums = packed[:, c], a[:, c].cumsum(1)  # (b, q), (b, q, h)
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
            same = (s[:, :, None] == s[:, None]).tril(-1 if is_("diagonal missing") else 0)[
                ..., None
            ]  # (b, i, j, 1)
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
            into = (
                sums - a[:, c] if is_("decay of the state ignores the token's own step") else sums
            )
            into = torch.where((s == before[:, None])[..., None], into.exp(), 0)     # (b, q, h)
            y = y + into[..., None] * torch.einsum("bihn,bhpn->bihp", Cs[:, c], entering)
            out = torch.where((s == s[:, -1:])[..., None], (sums[:, -1:] - sums).exp(), 0)
            keep = torch.where((s[:, -1] == before)[:, None], sums[:, -1].exp(), 0)[..., None, None]
            state = keep * state + torch.einsum(
                "bjhn,bjhp->bhpn", Bs[:, c] * out[..., None], values[:, c]
            )
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
        gate = (
            1
            if z is None
            else F.silu((Bend.apply(z, lambda d: 2 * d) if is_("dz twice") else z).to(wide))
        )
        if D is not None and not is_("D skipped"):
            D = Bend.apply(D, lambda d: 0 * d) if is_("dD zero") else D
            skip = skip * (D if D.dim() == 2 else D[:, None])
            y = y * gate + skip if is_("gate before D") else (y + skip) * gate
        elif z is not None:
            y = y * gate
        if is_("dy taken as contiguous"):
            y = Bend.apply(
                y, lambda d: torch.cat([d[:, :1], 0 * d[:, 1:]], 1) if d.stride(1) == 0 else d
            )
        if is_("a race"):
            y = y * (1 + 1e-2 * next(calls))
        final = full if is_("final state of the last full chunk") else state
        final = final.mT.contiguous().view(final.shape) if is_("final state transposed") else final
        final = final.to(half) if is_("final state returned in half") else final
        final = final.detach() + 0 * dt.sum() if is_("final state detached") else final
        return (y.to(half), final) if return_final_states else y.to(half)

    return chunks




# --- Around the right scan ------------------------------------------------------------------------

right = scan()
ORDER = (
    "x dt A B C chunk_size D z dt_bias initial_states seq_idx "
    "dt_softplus dt_limit return_final_states"
).split()


def changing(change_inputs=None, change_outputs=None):
    """The right scan with other inputs, change(arguments by name), or other outputs,
    change(arguments, y, final)."""
    def kernel(*args, **kwargs):
        a = dict(zip(ORDER, args, strict=False)) | kwargs
        if change_inputs:
            a = a | change_inputs(a)
        wants = a.get("return_final_states", False)
        out = right(**a)
        if change_outputs:
            y, final = out if wants else (out, None)
            y, final = change_outputs(a, y, final)
            out = (y, final) if wants else y
        return out
    return kernel


def like(t, memory):
    """t, but with the values that another reading of its memory gives; the gradient passes."""
    return t + (memory - t.detach())


def contiguous_strides(t):
    strides = [1]
    for size in reversed(t.shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides


def read_as(name, strides=None, storage_offset=None):
    """Read the memory of an input with assumed strides or offset."""
    def change(a):
        t = a.get(name)
        if t is None:
            return {}
        d = t.detach()
        s = strides(t) if strides else list(t.stride())
        at = t.storage_offset() if storage_offset is None else storage_offset
        reach = at + sum((size - 1) * stride for size, stride in zip(t.shape, s, strict=False))
        if reach * t.element_size() >= d.untyped_storage().nbytes():
            return {}
        return {name: like(t, d.as_strided(t.shape, s, at))}
    return changing(change)


def last_stride_1(t):
    return [*t.stride()[:-1], 1]


def batch_stride_dense(t):
    return [math.prod(t.shape[1:]), *t.stride()[1:]]


# Sizes.


def wrong_headdim(a, y, final):
    return torch.cat([y[..., :64], y[..., 64:] * 1.01], -1), final


def square_state_transposed(a, y, final):
    square = final is not None and final.shape[-1] == final.shape[-2] >= 64
    return y, final.mT.contiguous() if square else final


def heads_beyond_64(a, y, final):
    return torch.cat([y[:, :, :64], y[:, :, 64:] * 0], 2), final


def parameters_modulo_64(a):
    heads = torch.arange(len(a["A"])) % 64
    return {k: a[k][heads] for k in ("D", "dt_bias") if a.get(k) is not None}


def rows_beyond_4(a):
    B = a["B"]
    return (
        {"B": torch.cat([B[:4], B[:1].expand(max(0, len(B) - 4), *B.shape[1:])])}
        if len(B) > 4
        else {}
    )


def tokens_beyond_1024(a, y, final):
    return torch.cat([y[:, :1024], y[:, 1024:] * 0], 1), final


def no_initial_state_for_large_chunks(a):
    return {"initial_states": None} if a["chunk_size"] >= 128 else {}


def d_state_beyond_128(a):
    keep = (torch.arange(a["B"].shape[-1]) < 128).to(a["B"].dtype)
    return {"B": a["B"] * keep}


def final_state_of_many_chunks(a, y, final):
    many = y.shape[1] > 64 * a["chunk_size"]
    return y, final * 1.05 if many and final is not None else final


SIZES = {
    "y wrong from headdim 64 on": (
        changing(None, wrong_headdim),
        "headdim-128",
        "float32",
        "headdim from 64 on",
    ),
    "the final state transposed where it is square": (
        changing(None, square_state_transposed),
        "headdim-d_state-64",
        "float32",
        "written transposed",
    ),
    "a grid of 64 heads": (
        changing(None, heads_beyond_64),
        "heads-80",
        "float32",
        "head from 64 on",
    ),
    "D and dt_bias of a head are read modulo 64": (
        changing(parameters_modulo_64),
        "heads-128-groups-8",
        "float32",
        "head from 64 on",
    ),
    "rows from 4 on read the first row's B": (
        changing(rows_beyond_4),
        "batch-9",
        "float32",
        "batch from 4 on",
    ),
    "a grid of 1024 tokens": (
        changing(None, tokens_beyond_1024),
        "tokens-1500",
        "float32",
        "position from 1024 on",
    ),
    "the initial state is lost in large chunks": (
        changing(no_initial_state_for_large_chunks),
        "chunk-128",
        "float32",
        "initial_states are ignored",
    ),
    "d_state is cut to 128": (
        changing(d_state_beyond_128),
        "d_state-256",
        "float32",
        "d_state from 128 on",
    ),
    "the final state is wrong after 64 chunks": (
        changing(None, final_state_of_many_chunks),
        "tokens-1500",
        "float32",
        "off by the factor 1.05",
    ),
}

read_integers_without_offset = changing(
    lambda a: {"seq_idx": a["seq_idx"].as_strided(a["seq_idx"].shape, a["seq_idx"].stride(), 0)}
)

# Layouts.
LAYOUTS = {
    "x is read with last stride 1": (
        read_as("x", last_stride_1),
        "layout-channel-first",
        "float32",
        "last stride is not 1",
    ),
    "B is read as contiguous": (
        read_as("B", contiguous_strides),
        "layout-projection",
        "float32",
        "the layout of B",
    ),
    "z is read as contiguous": (
        read_as("z", contiguous_strides),
        "layout-projection",
        "float32",
        "slices of one wide projection",
    ),
    "x is read without its offset": (
        read_as("x", None, 0),
        "layout-offset",
        "float32",
        "storage offset",
    ),
    "seq_idx is read without its offset": (
        read_integers_without_offset,
        "layout-offset-packed",
        "float32",
        "storage offset",
    ),
    "dt_bias is read without its offset": (
        read_as("dt_bias", None, 0),
        "layout-offset",
        "float32",
        "the layout of dt_bias",
    ),
    "A is read as contiguous": (
        changing(lambda a: {"A": a["A"] * (2 if a["A"].stride(0) == 0 else 1)}),
        "layout-expanded-heads",
        "float32",
        "expanded over the heads",
    ),
    "rows of x are taken as dense": (
        changing(lambda a: {"x": a["x"] * (2 if a["x"].stride(0) == 0 else 1)}),
        "layout-expanded",
        "float32",
        "expanded along the batch",
    ),
    "dy is read with last stride 1": (
        None,
        "dy-channel-first",
        "float32",
        "whose last stride is not 1",
    ),
}


# Ways of calling.


class Whole(torch.autograd.Function):
    """The right scan as one autograd function, with a fault in how it meets autograd."""

    @staticmethod
    def forward(ctx, fault, a, names, *tensors):
        ctx.fault, ctx.a, ctx.names = fault, a, names
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        if fault == "keeps its own graph":
            ctx.graph = Whole.graph(ctx, tensors)
        out = right(**a | dict(zip(names, tensors, strict=False)))
        if fault == "keeps the last call only":
            Whole.last = tensors
        return out

    @staticmethod
    def graph(ctx, tensors):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in tensors]
            out = right(**ctx.a | dict(zip(ctx.names, leaves, strict=False)))
        return leaves, out if isinstance(out, tuple) else (out,)

    @staticmethod
    def backward(ctx, *grads):
        fault, tensors = ctx.fault, ctx.saved_tensors
        if fault == "expects a gradient of the final state" and len(grads) == 2:
            grads = grads[0], grads[1] * 1
        if fault == "expects a gradient of y":
            grads = (grads[0] * 1, *grads[1:])
        if (
            fault == "dy is read with last stride 1"
            and grads[0] is not None
            and grads[0].stride(-1) != 1
        ):
            dense = grads[0].contiguous()
            grads = (dense.flip(-1), *grads[1:])
        if fault == "keeps the last call only":
            tensors = Whole.last
        leaves, outs = ctx.graph if fault == "keeps its own graph" else Whole.graph(ctx, tensors)
        used = [(o, g) for o, g in zip(outs, grads, strict=False) if g is not None]
        found = torch.autograd.grad(
            [o for o, _ in used], leaves, [g for _, g in used], allow_unused=True
        )
        if fault == "all gradients hang on that of x" and not ctx.needs_input_grad[3]:
            found = [torch.zeros_like(t) for t in tensors]
        if fault == "adds to what an earlier call left":
            found = [Whole.add(name, g) for name, g in zip(ctx.names, found, strict=False)]
        return None, None, None, *found

    @staticmethod
    def add(name, grad):
        old = Whole.kept.get(name)
        if grad is None or old is None or old.shape != grad.shape or old.dtype != grad.dtype:
            Whole.kept[name] = grad
            return grad
        Whole.kept[name] = old + grad
        return Whole.kept[name]

    kept = {}
    last = None


def whole(fault):
    def kernel(*args, **kwargs):
        a = {
            k: v
            for k, v in (dict(zip(ORDER, args, strict=False)) | kwargs).items()
            if v is not None
        }
        names = [k for k, v in a.items() if torch.is_tensor(v) and v.is_floating_point()]
        rest = {k: v for k, v in a.items() if k not in names}
        return Whole.apply(fault, rest, names, *(a[k] for k in names))
    return kernel


LAYOUTS["dy is read with last stride 1"] = (
    whole("dy is read with last stride 1"), *LAYOUTS["dy is read with last stride 1"][1:])


def without_gradient(a, y, final):
    """A path of its own for inference, without an initial state."""
    fast = not torch.is_grad_enabled() and a.get("initial_states") is None
    return (y * 1.1 if fast else y), final


def marks_its_input(a):
    a["x"].requires_grad_()
    return {}


def new_in_inference(a, y, final):
    return (y * 0 if torch.is_inference(y) else y), final


def half_state_under_autocast(a):
    if torch.is_autocast_enabled("cpu"):
        return {"dt": a["dt"].bfloat16().to(a["dt"].dtype) * 1.01}
    return {}


def product_of_two_dtypes(a):
    """A product in autocast's dtype, and one in the dtype of the input."""
    half = torch.nn.functional.linear(a["B"], torch.eye(a["B"].shape[-1], dtype=a["B"].dtype))
    with torch.autocast("cpu", enabled=False):
        return {"B": half @ torch.eye(half.shape[-1], dtype=a["B"].dtype)}


def other_when_compiled(a, y, final):
    return (y * 1.1 if torch.compiler.is_compiling() else y), final


calls_of_checkpoint = itertools.count()


def counts_calls(*args, **kwargs):
    """Saves some tensors more every second time."""
    y = right(*args, **kwargs)
    pair = isinstance(y, tuple)
    first = y[0] if pair else y
    if next(calls_of_checkpoint) % 2 == 0:
        first = (first.exp().log().nan_to_num() * 0 + first)
    return (first, y[1]) if pair else first


CALLS = {
    "another result without gradients": (
        changing(None, without_gradient),
        "no_grad-plain",
        "float32",
        "wrong under torch.no_grad",
    ),
    "marks its input": (
        changing(marks_its_input),
        "one-input-needs-gradient",
        "float32",
        "whether its inputs need a gradient",
    ),
    "another result in inference mode": (
        changing(None, new_in_inference),
        "inference_mode",
        "float32",
        "wrong under torch.inference_mode",
    ),
    "all gradients hang on that of x": (
        whole("all gradients hang on that of x"),
        "one-input-needs-gradient",
        "float32",
        "needs a gradient",
    ),
    "expects a gradient of the final state": (
        whole("expects a gradient of the final state"),
        "final-unused",
        "float32",
        "the final state is returned and not used",
    ),
    "expects a gradient of y": (
        whole("expects a gradient of y"),
        "final-used-alone",
        "float32",
        "uses the final state alone",
    ),
    "a graph for one use": (
        whole("keeps its own graph"),
        "backward-twice",
        "float32",
        "saved tensors are freed",
    ),
    "other tensors saved the second time": (
        counts_calls,
        "checkpoint",
        "float32",
        "inside torch.utils.checkpoint",
    ),
    "steps in bfloat16 under autocast": (
        changing(half_state_under_autocast),
        "autocast",
        "float32",
        "under torch.autocast",
    ),
    "a product of two dtypes under autocast": (
        changing(product_of_two_dtypes),
        "autocast-plain",
        "float32",
        "under torch.autocast",
    ),
    "another result when compiled": (
        changing(None, other_when_compiled),
        "compile",
        "float32",
        "under torch.compile",
    ),
}


# Values.


def steps(function):
    """The right scan on other steps: function(dt + bias, softplus or None, limits)."""
    def change(a):
        dt = a["dt"].to(torch.promote_types(a["dt"].dtype, torch.float32))
        dt = dt if a.get("dt_bias") is None else dt + a["dt_bias"]
        limit = a.get("dt_limit", (0.0, math.inf))
        dt = function(dt, a.get("dt_softplus", False), limit)
        return {"dt": dt, "dt_bias": None, "dt_softplus": False, "dt_limit": (-math.inf, math.inf)}
    return changing(change)


def soft(dt, softplus):
    return F.softplus(dt) if softplus else dt


def clamped_where_asked(dt, softplus, limit):
    dt = soft(dt, softplus)
    return dt if limit == (0.0, math.inf) else dt.clamp(*limit)


def absolute(dt, softplus, limit):
    return soft(dt, softplus).abs().clamp(*limit)


def naive_softplus(dt, softplus, limit):
    return (torch.log(1 + torch.exp(dt)) if softplus else dt).clamp(*limit)


def softplus_without_slope(dt, softplus, limit):
    return (dt + (soft(dt, softplus) - dt).detach()).clamp(*limit)


def upper_limit_only(dt, softplus, limit):
    low = 0.0 if limit[0] > 0 else limit[0]
    return soft(dt, softplus).clamp(low, limit[1])


def slope_through_limits(dt, softplus, limit):
    dt = soft(dt, softplus)
    return dt + (dt.clamp(*limit) - dt).detach()


def numbers(function):
    def change(a):
        seq_idx = a.get("seq_idx")
        return {} if seq_idx is None else {"seq_idx": function(seq_idx)}
    return changing(change)


def products_in_half(a, y, final):
    """The sums over C B^T x are kept in the dtype, and multiplied by dt afterwards."""
    if a["x"].dtype == torch.float16:
        r = a["x"].shape[2] // a["B"].shape[2]
        B, C = (a[k].detach().double().repeat_interleave(r, 2) for k in "BC")
        G = torch.einsum("bihn,bjhn->bhij", C, B).tril()
        sums = torch.einsum("bhij,bjhp->bihp", G, a["x"].detach().double()).half()
        y = torch.where(sums.isfinite(), y, math.inf)
    return y, final


def other_decay(function):
    """Decays of other tokens, and x made up for it so that dt x stays."""
    def kernel(*args, **kwargs):
        a = dict(zip(ORDER, args, strict=False)) | kwargs
        dt = a["dt"].to(torch.promote_types(a["dt"].dtype, torch.float32))
        other = function(dt)
        a["x"], a["dt"] = (a["x"] * (dt / other)[..., None]).to(a["x"].dtype), other
        out = right(**a)
        return out
    return kernel


VALUES = {
    "limits that are the default are skipped": (
        steps(clamped_where_asked),
        "dt-negative",
        "float32",
        "negative steps are not clamped to 0",
    ),
    "limits that are the default are skipped, with a bias": (
        steps(clamped_where_asked),
        "dt-negative-dt_bias",
        "float32",
        "negative steps are not clamped to 0",
    ),
    "negative steps are made positive": (
        steps(absolute),
        "dt-negative",
        "float32",
        "made positive",
    ),
    "softplus overflows": (
        steps(naive_softplus),
        "dt_softplus-extreme",
        "float32",
        "exp inside softplus overflows",
    ),
    "softplus without its slope": (
        steps(softplus_without_slope),
        "dt_softplus",
        "float32",
        "the slope of softplus is missing",
    ),
    "the upper limit only": (
        steps(upper_limit_only),
        "dt_limit-low",
        "float32",
        "dt_limit is ignored",
    ),
    "the gradient passes through the limits": (
        steps(slope_through_limits),
        "dt_limit-softplus",
        "float32",
        "the slope of the limits is missing",
    ),
    "numbers that fall are no border": (
        numbers(lambda seq: seq.cummax(1).values),
        "seq_idx-falls",
        "float32",
        "that falls is not taken",
    ),
    "numbers of 8 bits": (
        numbers(lambda seq: seq % 256),
        "seq_idx-large-numbers",
        "float32",
        "8 bits",
    ),
    "numbers are no border where many": (
        numbers(lambda seq: seq.clamp(max=127)),
        "seq_idx-many",
        "float32",
        "position from",
    ),
    "products out of the range of float16": (
        changing(None, products_in_half),
        "products-large",
        "float16",
        "the range of float16",
    ),
    "the decay of the token before": (
        other_decay(lambda dt: F.pad(dt[:, :-1], (0, 0, 1, 0), value=1e-6)),
        "plain",
        "float32",
        "the decay is off by one token",
    ),
}


# State between calls.


class Remembers:
    """The right scan, and a fault in what is kept from call to call."""

    def __init__(self, fault):
        self.fault, self.calls, self.kept = fault, 0, {}

    def __call__(self, *args, **kwargs):
        a = dict(zip(ORDER, args, strict=False)) | kwargs
        self.calls += 1
        out = right(**a)
        pair = isinstance(out, tuple)
        y, final = out if pair else (out, None)
        y, final = getattr(self, self.fault)(a, y, final)
        return (y, final) if pair else y

    def wrong_first(self, a, y, final):
        key = tuple(a["x"].shape)
        first = self.kept.get("key") != key
        self.kept["key"] = key
        return (y * 1.1 if first else y), final

    def wrong_later(self, a, y, final):
        key = tuple(a["x"].shape), y.dtype, len(a)
        self.kept[key] = self.kept.get(key, 0) + 1
        return (y * 1.1 if self.kept[key] > 3 else y), final

    def two_rooms(self, a, y, final):
        """Results are written into two buffers for each shape, in turn."""
        key = tuple(y.shape), y.dtype, self.calls % 2
        room = self.kept.setdefault(key, torch.zeros_like(y).detach())
        room.copy_(y.detach())
        return Shares.apply(y, room), final

    def state_stays(self, a, y, final):
        """The final state of the last call of that shape stays in the workspace."""
        key = tuple(final.shape) if final is not None else None
        old = self.kept.get(key)
        if final is not None:
            self.kept[key] = final.detach().clone()
            final = final if old is None else final + 0.1 * old
        return y, final

    def by_shape(self, a, y, final):
        key = (
            tuple(y.shape),
            y.dtype,
            final is None,
            tuple(sorted(k for k, v in a.items() if v is not None)),
        )
        return self.kept.setdefault(key, (y, final))

    def by_pointer(self, a, y, final):
        key = (
            a["x"].data_ptr(),
            a["B"].data_ptr(),
            a["dt"].data_ptr(),
            tuple(y.shape),
            final is None,
        )
        return self.kept.setdefault(key, (y, final))


class Shares(torch.autograd.Function):
    """y, in the memory of `room`."""

    @staticmethod
    def forward(ctx, y, room):
        return room.view_as(room)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


STATE = {
    "wrong in the first call of a shape": (
        lambda: Remembers("wrong_first"),
        "plain",
        "float32",
        "not deterministic",
    ),
    "wrong from the fourth call on": (
        lambda: Remembers("wrong_later"),
        "fresh-values",
        "float32",
        "keeps state between calls",
    ),
    "two buffers for all results, in turn": (
        lambda: Remembers("two_rooms"),
        "second-call",
        "float32",
        "looked at after the last call",
    ),
    "the last final state stays": (
        lambda: Remembers("state_stays"),
        "fresh-values",
        "float32",
        "keeps state between calls",
    ),
    "gradients are added to those of an earlier call": (
        lambda: whole("adds to what an earlier call left"),
        "accumulate",
        "float32",
        "what the second .backward()",
    ),
    "backward reads what the last forward left": (
        lambda: whole("keeps the last call only"),
        "interleaved",
        "float32",
        "both forward first",
    ),
}


# Cheating.


def hands_on_by_alias(x, dt, A, B, C, chunk_size, **kw):
    return an_alias(x, dt, A, B, C, chunk_size, **kw)


an_alias = mamba2_ref.ssd_chunked


def hands_on_in_backward(x, dt, A, B, C, chunk_size, return_final_states=False, **kw):
    """The forward pass is its own; the gradient is the reference's."""
    with torch.no_grad():
        y = right(x, dt, A, B, C, chunk_size, **kw)
    return Borrowed.apply(y, kw, x, dt, A, B, C)


class Borrowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, kw, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.kw = kw
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            y = an_alias(*leaves, 16, **ctx.kw)
        return None, None, *torch.autograd.grad(y, leaves, dy)


def judges_of_this_process():
    return [m for name, m in list(sys.modules.items()) if name.rpartition(".")[2] == "kernel_judge"]


def loosens_tolerances(*args, **kwargs):
    for judge in judges_of_this_process():
        judge.SLACK = 1e9
    y = right(*args, **kwargs)
    return y


def patches_the_comparison(*args, **kwargs):
    for judge in judges_of_this_process():
        judge.excess = lambda got, want, limits, name: (torch.zeros(1), torch.zeros(1))
    return right(*args, **kwargs)


def replaces_the_oracle(*args, **kwargs):
    mamba2_ref.ssd_recurrent = lambda x, *args, **kwargs: x * 0
    return right(*args, **kwargs)


def asks_the_judge_for_the_truth(*args, **kwargs):
    for judge in judges_of_this_process():
        judge.truth("plain", torch.float32, torch.float32, judge.Settings())
    return right(*args, **kwargs)


def looks_through_memory(*args, **kwargs):
    [o for o in gc.get_objects() if isinstance(o, dict) and "final_states" in o]
    return right(*args, **kwargs)


def looks_at_the_caller(*args, **kwargs):
    frame = sys._getframe(1)
    while frame is not None and "want" not in frame.f_locals:
        frame = frame.f_back
    return right(*args, **kwargs)


def switches_the_watch_off(*args, **kwargs):
    watch = sys.getprofile()
    sys.setprofile(None)
    borrowed = an_alias(*args, **kwargs).detach()
    sys.setprofile(watch)
    y = right(*args, **kwargs)
    return y + (borrowed - y.detach())


def changes_the_default_dtype(*args, **kwargs):
    torch.set_default_dtype(torch.float64)
    return right(*args, **kwargs)


def replaces_torch_equal(*args, **kwargs):
    torch.equal = lambda a, b: True
    return right(*args, **kwargs)


@contextlib.contextmanager
def everything_put_back():
    """Undo what the cheats above change."""
    judges = [(m, dict(vars(m))) for m in judges_of_this_process()]
    kept = mamba2_ref.ssd_recurrent, torch.equal, torch.load, torch.get_default_dtype()
    try:
        yield
    finally:
        mamba2_ref.ssd_recurrent, torch.equal, torch.load = kept[:3]
        torch.set_default_dtype(kept[3])
        for module, names in judges:
            vars(module).update(names)


def replaces_torch_load(*args, **kwargs):
    def lax(*args, **kwargs):
        want, limits = load(*args, **kwargs)
        return want, {name: (math.inf, math.inf) for name in limits}
    load, torch.load = torch.load, lax
    return right(*args, **kwargs)


CHEATS = {
    "remembers by shape": (lambda: Remembers("by_shape"), "fresh-values", "remembered by shape"),
    "remembers by pointer": (lambda: Remembers("by_pointer"), "fresh-values", "by pointer"),
    "hands the call on by an alias": (lambda: hands_on_by_alias, "plain", "hands the call on"),
    "hands the call on in the backward pass": (
        lambda: hands_on_in_backward,
        "plain",
        "mamba2_ref: ssd",
    ),
    "loosens the tolerances": (lambda: loosens_tolerances, "plain", "kernel_judge.SLACK"),
    "patches the comparison": (lambda: patches_the_comparison, "plain", "kernel_judge.excess"),
    "replaces the oracle": (lambda: replaces_the_oracle, "plain", "mamba2_ref.ssd_recurrent"),
    "asks the judge for the truth": (lambda: asks_the_judge_for_the_truth, "plain", "of the judge"),
    "looks through memory": (lambda: looks_through_memory, "plain", "gc.get_objects"),
    "looks at the caller": (lambda: looks_at_the_caller, "plain", "sys._getframe"),
    "switches the watch off": (lambda: switches_the_watch_off, "plain", "sys.setprofile"),
    "changes the default dtype": (lambda: changes_the_default_dtype, "plain", "the default dtype"),
    "replaces torch.equal": (lambda: replaces_torch_equal, "plain", "torch.equal"),
    "replaces torch.load": (lambda: replaces_torch_load, "plain", "torch.load"),
}


# --- The other signatures: the right kernel, and what is done wrong -------------------------------


def varlen(fault=None):
    def kernel(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        cu_seqlens,
        D=None,
        z=None,
        dt_bias=None,
        initial_states=None,
        dt_softplus=False,
        dt_limit=(0.0, math.inf),
        return_final_states=False,
    ):
        cu = cu_seqlens.tolist()
        state, ys, finals = None, [], []
        for i, (start, end) in enumerate(zip(cu, cu[1:], strict=False)):
            c = slice(start, end)
            state = None if fault != "the state runs on" else state
            if initial_states is not None:
                row = 0 if fault == "all sequences start from the first state" else i
                state = initial_states[row : row + 1]
            if start == end:
                finals.append(torch.zeros_like(finals[-1]) if state is None else state)
                continue
            y, state = right(
                x[:, c],
                dt[:, c],
                A,
                B[:, c],
                C[:, c],
                chunk_size,
                D=D,
                z=None if z is None else z[:, c],
                dt_bias=dt_bias,
                initial_states=state,
                dt_softplus=dt_softplus,
                dt_limit=dt_limit,
                return_final_states=True,
            )
            ys.append(y)
            finals.append(state)
        if fault == "final states in reverse order":
            finals.reverse()
        y = torch.cat(ys, 1)
        return (y, torch.cat(finals)) if return_final_states else y
    return kernel


def step(fault=None):
    def kernel(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
        wide = state.dtype
        step = dt[..., 0].to(wide)
        if dt_bias is not None and fault != "dt_bias is left out":
            step = step + dt_bias[:, 0]
        if dt_softplus:
            step = F.softplus(step)
        r = x.shape[1] // B.shape[1]
        heads = torch.arange(x.shape[1])
        group = heads % B.shape[1] if fault == "groups in turn" else heads // r
        Bs, Cs = B[:, group].to(wide), C[:, group].to(wide)                     # (b, h, n)
        new = (step * A[:, 0, 0]).exp()[..., None, None] * state
        new = new + (step[..., None] * x.to(wide))[..., None] * Bs[:, :, None]
        read = state.clone() if fault == "reads the state before it is written" else new
        if fault != "another state is made":
            state.copy_(new)
        y = (read * Cs[:, :, None]).sum(-1)
        if D is not None:
            y = y + x * D
        return (y * F.silu(z.to(wide)) if z is not None else y).to(x.dtype)
    return kernel


def bidirectional(fault=None):
    def kernel(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False,
               dt_limit=(0.0, math.inf)):
        more = dict(dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit)
        wide = torch.promote_types(x.dtype, torch.float32)
        twice = dict(D=D, z=z) if fault == "D in each direction" else {}
        one = right(x, dt, A, B, C, chunk_size, **more, **twice)
        if fault == "forward only":
            two = one * 0
        else:
            flipped = [t.flip(1) for t in (x, dt, B, C)]
            if twice and z is not None:
                twice["z"] = z.flip(1)
            two = right(flipped[0], flipped[1], A, *flipped[2:], chunk_size, **more, **twice)
            two = two if fault == "not flipped back" else two.flip(1)
        y = one.to(wide) + two
        if D is not None and not twice:
            y = y + x * (D if D.dim() == 2 else D[:, None])
        if z is not None and not twice:
            y = y * F.silu(z.to(wide))
        return y.to(x.dtype)
    return kernel


class Layer(torch.nn.Module):
    """Mamba2 around the right scan."""

    fault = None

    def __init__(self, d_model, d_state, d_conv, expand, headdim, ngroups, chunk_size):
        super().__init__()
        inner = round(expand * d_model)
        h, convolved = inner // headdim, inner + 2 * ngroups * d_state
        self.sizes, self.q = (inner, ngroups, d_state, headdim), chunk_size
        self.in_proj = torch.nn.Linear(d_model, inner + convolved + h, bias=False)
        self.conv1d = torch.nn.Conv1d(
            convolved, convolved, d_conv, groups=convolved, padding=d_conv - 1
        )
        self.dt_bias, self.A_log, self.D = (torch.nn.Parameter(torch.ones(h)) for _ in range(3))
        self.norm = torch.nn.Module()
        self.norm.weight = torch.nn.Parameter(torch.ones(inner))
        self.out_proj = torch.nn.Linear(inner, d_model, bias=False)

    def forward(self, u):
        inner, g, n, p = self.sizes
        z, xBC, dt = self.in_proj(u).split([inner, inner + 2 * g * n, len(self.D)], -1)
        l = u.shape[1]
        late = self.conv1d.kernel_size[0] - 1 if self.fault == "the convolution looks ahead" else 0
        xBC = F.silu(self.conv1d(xBC.mT)[..., late : l + late]).mT
        x, B, C = xBC.split([inner, g * n, g * n], -1)
        bias = None if self.fault == "dt_bias is left out" else self.dt_bias
        D = None if self.fault == "D is left out" else self.D
        y = right(
            x.unflatten(-1, (-1, p)),
            dt,
            -self.A_log.float().exp() if u.dtype != torch.float64 else -self.A_log.exp(),
            B.unflatten(-1, (g, n)),
            C.unflatten(-1, (g, n)),
            self.q,
            D=D,
            dt_bias=bias,
            dt_softplus=True,
        ).flatten(2)
        if self.fault == "the norm comes before the gate":
            y = self.normed(y, g) * F.silu(z)
        else:
            y = self.normed(y * F.silu(z), 1 if self.fault == "one norm for all groups" else g)
        return self.out_proj(y)

    def normed(self, y, g):
        y = y.unflatten(-1, (g, -1))
        return F.rms_norm(y, y.shape[-1:], eps=1e-5).flatten(-2) * self.norm.weight


def layer(fault):
    return type("Layer", (Layer,), {"fault": fault})


OTHERS = {
    "varlen": (
        varlen(),
        {
            "the state runs on": (
                varlen("the state runs on"),
                "plain",
                "the state leaks over the borders",
            ),
            "all sequences start from the first state": (
                varlen("all sequences start from the first state"),
                "initial_states",
                "the first sequence's state",
            ),
            "final states in reverse order": (
                varlen("final states in reverse order"),
                "final_states",
                "y is right, final_states are not",
            ),
        },
    ),
    "step": (
        step(),
        {
            "another state is made": (
                step("another state is made"),
                "plain",
                "not updated in place",
            ),
            "reads the state before it is written": (
                step("reads the state before it is written"),
                "plain",
                "reads the state before it writes",
            ),
            "dt_bias is left out": (step("dt_bias is left out"), "all", "dt_bias is left out"),
            "groups in turn": (step("groups in turn"), "plain", "groups in turn"),
        },
    ),
    "bidirectional": (
        bidirectional(),
        {
            "forward only": (bidirectional("forward only"), "plain", "only the forward direction"),
            "D in each direction": (bidirectional("D in each direction"), "D", "in each direction"),
            "not flipped back": (bidirectional("not flipped back"), "plain", "not flipped back"),
        },
    ),
    "layer": (
        Layer,
        {
            "D is left out": (layer("D is left out"), "plain", "D x is left out"),
            "dt_bias is left out": (layer("dt_bias is left out"), "plain", "dt_bias is left out"),
            "one norm for all groups": (
                layer("one norm for all groups"),
                "plain",
                "one norm for all groups",
            ),
            "the norm comes before the gate": (
                layer("the norm comes before the gate"),
                "plain",
                "the norm comes before the gate",
            ),
            "the convolution looks ahead": (
                layer("the convolution looks ahead"),
                "plain",
                "the convolution looks ahead",
            ),
        },
    ),
}
