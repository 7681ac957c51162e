"""Mamba2: one function written three ways, and the layers around it.

Dao and Gu 2024, "state-space duality", arXiv 2405.21060; LinGen fig. 3. A *selective state space
model* can be read as a recurrence, as a masked attention matrix, or as chunks that use the matrix
inside and the recurrence between. Per head, with v_t = dt_t x_t and a_t = dt_t A <= 0:

    recurrent   h_t = exp(a_t) h_{t-1} + v_t B_t^T      y_t = h_t C_t
    quadratic   y   = (L o C B^T) v                     L_ij = exp(a_{j+1} + ... + a_i) for i >= j
    chunked     the quadratic form inside each chunk of Q tokens, one state per chunk for the past

In words: the state h is a small matrix. Each token fades it by exp(a_t), writes v_t into it at the
address B_t, and reads it at the address C_t. *Selective* means that dt, B and C are made from the
token itself: a large dt forgets and writes much, a dt near 0 lets the token pass by. L_ij is what
is left of token j when token i reads, and C_i B_j is how well their addresses meet (o multiplies
entry by entry). All three are the same function; the recurrence in float64 is the judge.

    b batch   l length   h heads   p headdim   n d_state   g groups of heads that share B and C
    r = h / g heads of a group     c chunks    Q chunk_size    i, j positions    h_t: the state

    x, y, z (b, l, h, p)   dt (b, l, h)   A (h)   B, C (b, l, g, n)   state (b, h, p, n)
"""
import contextlib
import importlib
import importlib.util
import math
import sys
import types

import torch
import torch.nn.functional as F
from torch import nn

INF = math.inf


# --- What mamba-ssm adds around the scan, for all forms -------------------------------------------

def with_options(form):
    """Give a form, of the final steps dt, a = dt A, and `starts` (b, l), True where a packed
    sequence begins, the arguments of mamba-ssm's scan."""
    def ssd(x, dt, A, B, C, chunk_size=32, D=None, z=None, dt_bias=None, initial_states=None,
            seq_idx=None, dt_softplus=False, dt_limit=(0.0, INF), return_final_states=False):
        check(chunk_size, dt_limit, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias,
              initial_states=initial_states, seq_idx=seq_idx)
        state, starts, dtype = initial_states, None, torch.float32
        with no_autocast(x.device):
            for tensor in (x, dt, A, B, C):
                dtype = torch.promote_types(dtype, tensor.dtype)
            dt, A, B, C = dt.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype)
            if dt_bias is not None:
                dt = dt + dt_bias.to(dtype)
            dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
            if state is None:
                state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])
            if seq_idx is not None:
                starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
            Q = min(chunk_size, x.shape[1])
            y, state = form(x, dt, dt * A, B, C, state.to(dtype), starts, Q)
            y = skip_and_gate(y, x, D, z)
        return (y, state) if return_final_states else y

    ssd.__name__ = form.__name__
    ssd.__doc__ = form.__doc__ + """

    x (b, l, h, p), dt (b, l, h), A (h), B and C (b, l, g, n), where g divides h.
    chunk_size: tokens per chunk, at least 1. It changes the speed; two of the forms ignore it.
    D (h) or (h, p): skip, y + D x. z (b, l, h, p): gate, y silu(z), after the skip.
    dt_bias (h), dt_softplus, dt_limit: the step is clamp(softplus(dt + dt_bias), *dt_limit).
    initial_states (b, h, p, n): the state before the first token.
    seq_idx (b, l), integer: several sequences packed in one row; where the number changes, the
        state is emptied. The initial state belongs to the first sequence.
    Returns y (b, l, h, p) in the dtype of x; with return_final_states also the last state
    (b, h, p, n), in at least float32. Raises ValueError where a shape does not fit."""
    return ssd


def check(chunk_size, dt_limit, **tensors):
    x, B = tensors["x"], tensors["B"]
    if x.dim() != 4 or B.dim() != 4 or 0 in x.shape + B.shape or x.shape[2] % B.shape[2]:
        raise ValueError("x must be (batch, length, nheads, headdim), B (batch, length, ngroups, "
                         f"d_state), ngroups divide nheads: got {tuple(x.shape)}, {tuple(B.shape)}")
    if chunk_size < 1 or not 0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError("chunk_size must be at least 1, dt_limit 0 <= low <= high: "
                         f"got {chunk_size}, {dt_limit}")
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    fits = {"x": (b, l, h, p), "dt": (b, l, h), "A": (h,), "B": (b, l, g, n), "C": (b, l, g, n),
            "D": (h,), "z": (b, l, h, p), "dt_bias": (h,), "initial_states": (b, h, p, n),
            "seq_idx": (b, l)}
    for name, tensor in tensors.items():
        shape = fits[name] if tensor is None else tuple(tensor.shape)
        if shape != fits[name] and (name, shape) != ("D", (h, p)):
            raise ValueError(f"{name} must be {fits[name]} to fit x {tuple(x.shape)}, got {shape}")


def no_autocast(device):
    """In bfloat16 a running sum stops moving once it is 256 times what is added."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)   # TF32: see set_float32_matmul_precision


def skip_and_gate(y, x, D, z):
    """(y + D x) silu(z), in the dtype of the sums; then back to the dtype of x."""
    if D is not None:
        y = torch.addcmul(y, x.to(y.dtype), (D if D.dim() == 2 else D[:, None]).to(y.dtype))
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)


# --- Form 1: the recurrence, the judge ------------------------------------------------------------

@with_options
def ssd_recurrent(x, dt, a, B, C, state, starts, chunk_size):
    """The recurrence, one token at a time: slow, obvious, in float64 the judge of all else."""
    v, a, B, C = per_head(x, dt, a, B, C, starts)
    ys = []
    for t in range(x.shape[1]):
        added = v[:, t, :, :, None] * B[:, t, :, None, :]                   # (b, h, p, n)
        state = a[:, t, :, None, None].exp() * state + added
        ys.append((state @ C[:, t, :, :, None]).squeeze(-1))                # (b, h, p)
    return torch.stack(ys, 1), state


def per_head(x, dt, a, B, C, starts):
    """v, a, and B, C (b, l, h, n); a decay of exp(-inf) = 0 empties the state at `starts`."""
    a = a if starts is None else a.masked_fill(starts[..., None], -INF)
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))
    return dt[..., None] * x, a, B, C


# --- Form 2: the matrix, or why this is attention -------------------------------------------------

def segment_sums(a):
    """(..., l) -> (..., l, l): a_{j+1} + ... + a_i for i >= j, and -inf above the diagonal.

    Summed term by term: a difference of two running sums would lose digits. The mask goes in before
    the exponential: exp of a large positive entry above the diagonal would overflow, and masking it
    to 0 afterwards gives 0 * inf = NaN in the backward pass.
    """
    l = a.shape[-1]
    lower = torch.ones(l, l, dtype=torch.bool, device=a.device).tril()
    sums = a[..., None].expand(*a.shape, l).masked_fill(~lower.tril(-1), 0).cumsum(-2)
    return sums.masked_fill(~lower, -INF)


@with_options
def ssd_quadratic(x, dt, a, B, C, state, starts, chunk_size):
    """The same as one lower-triangular attention matrix per head: O(l^2) time and memory.

    L o (C B^T) is attention without softmax: C asks, B answers, v is the value, and L forgets."""
    return masked_matrix(*per_head(x, dt, a, B, C, starts), state)


def masked_matrix(v, a, B, C, state):
    v, a, B, C = (t.transpose(1, 2) for t in (v, a, B, C))                  # (b, h, l, .)
    L, decay = segment_sums(a).exp(), a.cumsum(-1).exp()[..., None]         # (b, h, l, l)
    # 1. What tokens read from each other. 2. What they add to the state, decayed to the end.
    y = (L * (C @ B.mT)) @ v                                                # (b, h, l, p)
    added = v.mT @ (L[:, :, -1, :, None] * B)                               # (b, h, p, n)
    # 3. What survives of the first state, plus what was added. 4. What tokens read from the first.
    return (y + decay * (C @ state.mT)).transpose(1, 2), decay[:, :, -1:] * state + added


# --- Form 3: chunks, or why this is linear --------------------------------------------------------

@with_options
def ssd_chunked_plain(x, dt, a, B, C, state, starts, chunk_size):
    """The matrix inside each chunk, the state from chunk to chunk: the twin of `ssd_chunked`."""
    ys, inputs = [], per_head(x, dt, a, B, C, starts)
    for chunk in zip(*(t.split(chunk_size, 1) for t in inputs)):
        y, state = masked_matrix(*chunk, state)
        ys.append(y)
    return torch.cat(ys, 1), state


# --- The same arranged for speed ------------------------------------------------------------------

SEGMENT = {"cpu": 2**18, "other": 2**28}        # numbers in the largest tensor of a segment
GROUP = 32                                      # chunks whose states one matrix passes on


@with_options
def ssd_chunked(x, dt, a, B, C, state, starts, chunk_size):
    """The chunked scan, O(length) in time and memory: what the layers run on."""
    return FastScan.apply(x, dt, a, B, C, state, starts, chunk_size)


def take(t, c, Q):
    """The chunks c of t: (b, l, h, ...) -> (b h, k, Q, ...). Zeros fill up."""
    t = t[:, c.start * Q : c.stop * Q]
    missing = (c.stop - c.start) * Q - t.shape[1]
    if missing:
        t = torch.cat([t, t.new_zeros(t.shape[0], missing, *t.shape[2:])], 1)
    return t.transpose(1, 2).flatten(0, 1).unflatten(1, (-1, Q))


def put(t, whole, c):
    """The reverse: t (b h, k, Q, ...) becomes the chunks c of `whole` (b, c Q, h, ...)."""
    Q, (b, _, h) = t.shape[2], whole.shape[:3]
    whole[:, c.start * Q : c.stop * Q] = t.flatten(1, 2).unflatten(0, (b, h)).transpose(1, 2)


def add_product(t, a, b):
    """t + a @ b, in place, for two axes of matrices."""
    t.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    return t


def carry(decay, added, state):
    """Step 3: the states that enter k chunks (S, k, s), and the one that leaves the last (S, s).
    The same trick once more: a matrix of decays inside groups of chunks, then groups of groups.
    decay (S, k), of whole chunks; added (S, k, s); state (S, s)."""
    k = decay.shape[1]
    if k == 1:
        return state[:, None], added[:, 0] + decay * state
    K = min(k, GROUP)
    decay = F.pad(decay, (0, -k % K), value=1).unflatten(1, (-1, K))        # (S, m, K)
    added = F.pad(added, (0, 0, 0, -k % K)).unflatten(1, (-1, K))           # (S, m, K, s)
    later = torch.ones(K, K, dtype=torch.bool, device=decay.device).tril(-1)
    W = torch.where(later, decay[..., None], 1).cumprod(2).tril()           # (S, m, K, K)
    W = F.threshold(W, 2**-100, 0)                                          # denormals are slow
    into = W[..., 0] * decay[..., :1]                                       # (S, m, K)
    ends = (W[:, :, -1:] @ added).squeeze(2)                                # (S, m, s)
    entering, final = carry(into[:, :, -1], ends, state)                    # (S, m, s)
    W, into = F.pad(W[:, :, :-1], (0, 0, 1, 0)), F.pad(into[:, :, :-1], (1, 0), value=1)
    states = add_product(W @ added, into[..., None], entering[:, :, None])  # (S, m, K, s)
    return states.flatten(1, 2)[:, :k], final


class Chunks:
    """What both passes need. Each head is a row of the batch: S = b h rows, N = b g for groups."""

    def __init__(self, x, dt, a, B, C, starts, Q):
        (b, l, h, p), n, N = x.shape, B.shape[3], B.shape[0] * B.shape[2]
        self.inputs, self.Q, count = (x, B, C), Q, -(-l // Q)
        # A segment stays in a CPU's cache; a GPU takes far more chunks at a time.
        size = SEGMENT["cpu" if x.device.type == "cpu" else "other"]
        step = max(1, size // (b * h * max(Q * Q, Q * p, Q * n, p * n)))
        self.segments = [slice(i, min(i + step, count)) for i in range(0, count, step)]
        whole = slice(0, count)
        self.dt = take(dt, whole, Q).contiguous()                           # (S, c, Q)
        # exp(a) as 2^(a log2 e): the same, and several times faster on CPUs. 2^least is 0.
        least = 1.2 * math.log2(torch.finfo(a.dtype).tiny)
        log = (take(a, whole, Q) * math.log2(math.e)).clamp(min=least)
        # Exponents are differences of two running sums: fewer digits than term by term, but fast.
        # Above the diagonal they are positive, and elsewhere by rounding, so they are cut before
        # exp: at 0, unless A > 0 lets the state grow.
        self.sums, self.most = log.cumsum(2), log.clamp(min=0).sum(2, keepdim=True)
        self.into = self.sums.exp2()                        # decay from a chunk's start to a token
        self.out = (self.sums[:, :, -1:] - self.sums).clamp(max=self.most).exp2()   # to its end
        self.mask = dt.new_ones(Q, Q).tril().expand(N, count, Q, Q)         # who may read whom
        if starts is not None:                              # no decay crosses a sequence's start
            passed = take(starts[..., None].expand(a.shape), whole, Q).cumsum(2)
            self.into = self.into.masked_fill(passed > 0, 0)
            self.out = self.out.masked_fill(passed < passed[:, :, -1:], 0)
            passed = passed.unflatten(0, (N, -1))[:, 0]                     # (N, c, Q)
            self.mask = self.mask * (passed[..., None] == passed[:, :, None])

    def cut(self, c):
        """x, v (S, k, Q, p), B, C (N, k, Q, n), B_out, C_in (S, k, Q, n), L and G of chunks c."""
        (x, B, C), dt = (take(t, c, self.Q) for t in self.inputs), self.dt[:, c]
        v = dt[..., None] * x                               # as dt, the first, lies in memory
        into, out = (t[:, c, :, None].unflatten(0, (len(B), -1)) for t in (self.into, self.out))
        L = self.sums[:, c, :, None] - self.sums[:, c, None]                # (S, k, Q, Q)
        L = L.clamp_(max=self.most[:, c, :, None]).exp2_().unflatten(0, (len(B), -1))
        G = (C @ B.mT).mul_(self.mask[:, c])                # (N, k, Q, Q), one for r heads
        return x, v, B, C, (B[:, None] * out).flatten(0, 1), (C[:, None] * into).flatten(0, 1), L, G


class FastScan(torch.autograd.Function):
    """The four steps of `masked_matrix`, some chunks at a time. Kept for the backward pass are
    the inputs and the state that enters each chunk; the matrices are made again."""

    @staticmethod
    def forward(ctx, x, dt, a, B, C, state, starts, Q):
        chunks, states, shape = Chunks(x, dt, a, B, C, starts, Q), [], state.shape
        y = dt.new_empty(x.shape[0], chunks.dt[0, :, :].numel(), *x.shape[2:])
        state = state.flatten(0, 1).flatten(1)                              # (S, p n)
        for c in chunks.segments:
            _, v, _, _, B_out, C_in, L, G = chunks.cut(c)
            entering, state = carry(chunks.into[:, c, -1], (v.mT @ B_out).flatten(2), state)
            entering = entering.unflatten(2, shape[2:])                     # (S, k, p, n)
            M = L.mul_(G[:, None]).flatten(0, 1)                            # (S, k, Q, Q)
            put(add_product(M @ v, C_in, entering.mT), y, c)
            if any(ctx.needs_input_grad):
                states.append(entering)
        ctx.save_for_backward(x, dt, a, B, C, starts, *states)
        ctx.Q = Q
        return y[:, : x.shape[1]], state.view(shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dstate):
        with no_autocast(dy.device):
            return FastScan.gradients(ctx, dy, dstate)

    @staticmethod
    def gradients(ctx, dy, dstate):
        x, dt, a, B, C, starts, *states = ctx.saved_tensors
        chunks, shape, Q = Chunks(x, dt, a, B, C, starts, ctx.Q), dstate.shape, ctx.Q
        size = x.shape[0], chunks.dt[0].numel()
        dx, ddt, da, dB, dC = (dt.new_empty(*size, *t.shape[2:]) for t in (x, dt, a, B, C))
        dstate = dstate.reshape(-1, shape[2] * shape[3])                    # (S, p n)
        for c, entering in reversed(list(zip(chunks.segments, states))):
            x_c, v, B_c, C_c, B_out, C_in, L, G = chunks.cut(c)
            dy_c, by_group = take(dy, c, Q).contiguous(), L.shape[:2]       # (S, k, Q, p), (N, r)
            into, out, decay = chunks.into[:, c], chunks.out[:, c], chunks.into[:, c, -1]
            # The gradient of the states runs against the states, through the same decays.
            asked = (dy_c.mT @ C_in).flatten(2)                             # (S, k, p n)
            leaving, dstate = carry(decay.flip(1), asked.flip(1), dstate)
            leaving = leaving.flip(1).unflatten(2, shape[2:])               # (S, k, p, n)
            # y = M v + C_in H^T with M = L o G, G = C B^T; a chunk adds v^T B_out to the state.
            dM = (dy_c @ v.mT).unflatten(0, by_group).mul_(L)               # dM o L
            dG = dM.sum(1).mul_(chunks.mask[:, c])                          # (N, k, Q, Q)
            M = L.mul_(G[:, None]).flatten(0, 1)                            # (S, k, Q, Q)
            dv = add_product(M.mT @ dy_c, B_out, leaving.mT)                # (S, k, Q, p)
            dC_c = (dy_c @ entering).mul_(into[..., None]).unflatten(0, by_group)
            dB_c = (v @ leaving).mul_(out[..., None]).unflatten(0, by_group)
            put(dG @ B_c + dC_c.sum(1), dC, c)                              # sums over r heads
            put(dG.mT @ C_c + dB_c.sum(1), dB, c)
            # The exponent of L_ij sums a over j+1..i: dM_ij M_ij is a gradient for each of these,
            # so rows minus columns are summed up. Those of C_in and B_out span the tokens up to i,
            # and after j. The diagonal has exponent 0; it would cancel, but not without rounding.
            dM = dM.mul_(G.tril_(-1)[:, None]).flatten(0, 1)                # (S, k, Q, Q)
            d_into = dC_c.mul_(C_c[:, None]).sum(-1).flatten(0, 1)          # (S, k, Q)
            d_out = dB_c.mul_(B_c[:, None]).sum(-1).flatten(0, 1)
            d_decay = (entering * leaving).sum((2, 3)) * decay              # (S, k)
            up_to = (dM.sum(-1) - dM.sum(-2) + d_into).flip(2).cumsum(2).flip(2)
            after = F.pad(d_out.cumsum(2)[..., :-1], (1, 0))
            put(up_to + after + d_decay[..., None], da, c)
            put((x_c * dv).sum(-1), ddt, c)
            put(dv.mul_(chunks.dt[:, c, :, None]), dx, c)
        dx, ddt, da, dB, dC = (t[:, : x.shape[1]] for t in (dx, ddt, da, dB, dC))
        return dx.to(x.dtype), ddt, da, dB, dC, dstate.view(shape), None, None


def ssd_bidirectional(x, dt, A, B, C, chunk_size=32, D=None, z=None, dt_bias=None,
                      dt_softplus=False, dt_limit=(0.0, INF), scan=ssd_chunked):
    """The scan plus the scan of the flipped sequence (LinGen fig. 3); D and the gate on the sum.
    Both directions lie side by side in the batch, so that `scan` runs once."""
    x2, dt2, B2, C2 = (torch.cat([t, t.flip(1)]) for t in (x, dt, B, C))    # (2 b, l, ...)
    y = scan(x2, dt2, A, B2, C2, chunk_size, dt_bias=dt_bias, dt_softplus=dt_softplus,
             dt_limit=dt_limit)
    forward, backward = y.chunk(2)
    return skip_and_gate(forward + backward.flip(1), x, D, z)


# --- Backends: whose scan runs --------------------------------------------------------------------

BACKENDS = ("torch", "mamba_ssm", "auto")
FOUND = {}                                      # "scan": mamba-ssm's or None; "why"; "said"


def find_official():
    """Import mamba-ssm's Triton scan, but not the package's __init__: that needs compiled code."""
    spec = None if "mamba_ssm" in sys.modules else importlib.util.find_spec("mamba_ssm")
    if spec:
        sys.modules["mamba_ssm"] = types.ModuleType("mamba_ssm")
        sys.modules["mamba_ssm"].__path__ = spec.submodule_search_locations
    try:
        module = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        FOUND.update(scan=module.mamba_chunk_scan_combined, why="")
    except Exception as error:                  # a broken installation fails in many ways
        FOUND.update(scan=None, why=f"{type(error).__name__}: {error}")
    for name in [name for name in sys.modules if spec and name.split(".")[0] == "mamba_ssm"]:
        del sys.modules[name]                   # whoever imports it next gets the real package


def choose_scan(backend, device, dtype=torch.float32):
    """The function behind a backend: a name of BACKENDS, or a function like mamba-ssm's itself."""
    if callable(backend) or backend == "torch":
        return ssd_chunked if backend == "torch" else backend
    if backend not in BACKENDS:
        raise ValueError(f"backend must be a function or one of {BACKENDS}, got {backend!r}")
    on_gpu = device.type == "cuda" and dtype != torch.float64       # the kernels know no float64
    if "scan" not in FOUND and (on_gpu or backend == "mamba_ssm"):
        find_official()
    scan = FOUND.get("scan") if on_gpu else None
    if backend == "mamba_ssm" and not scan:
        raise ValueError(f'backend "mamba_ssm" cannot run on {device} in {dtype}. It needs a GPU, '
                         "triton, and MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-build-isolation "
                         f"--no-deps mamba-ssm. {FOUND['why']}")
    if backend == "auto" and "said" not in FOUND and not torch.compiler.is_compiling():
        FOUND["said"] = True
        print("scan on", device, "by", "mamba_ssm" if scan else "torch", file=sys.stderr)
    return scan or ssd_chunked


# --- The layers -----------------------------------------------------------------------------------

class Mamba2(nn.Module):
    """The Mamba2 layer: u (b, l, d_model) -> (b, l, d_model), each output seeing the tokens so far.

    One projection makes z, x, B, C and dt. A short depthwise convolution lets x, B and C see their
    last d_conv tokens; then the scan, the gated norm, and the projection back. The parameters are
    those of `mamba_ssm.modules.mamba2.Mamba2`: a state_dict of the one loads into the other."""

    share_ahead = 0                             # of the convolution's taps: they read later tokens

    def __init__(self, d_model, d_state=128, d_conv=4, expand=2, headdim=64, ngroups=1,
                 A_init_range=(1, 16), dt_min=0.001, dt_max=0.1, dt_init_floor=1e-4,
                 dt_limit=(0.0, INF), bias=False, conv_bias=True, chunk_size=32, backend="auto"):
        super().__init__()
        d_inner = int(expand * d_model)
        if min(d_inner, d_state, d_conv, headdim, ngroups, chunk_size) < 1:
            raise ValueError("the sizes of Mamba2 must be at least 1")
        if d_inner % (headdim * ngroups):
            raise ValueError("headdim * ngroups must divide expand * d_model: "
                             f"got {headdim} * {ngroups} and {d_inner}")
        self.d_model, self.d_inner, self.d_state, self.d_conv = d_model, d_inner, d_state, d_conv
        self.headdim, self.ngroups, self.nheads = headdim, ngroups, d_inner // headdim
        self.dt_limit, self.chunk_size, self.backend = dt_limit, chunk_size, backend
        if backend != "auto":                   # a backend that is not there is an error at once
            choose_scan(backend, torch.device("cuda"))
        d_conv_in = d_inner + 2 * ngroups * d_state                         # x, B, C
        self.in_proj = nn.Linear(d_model, d_inner + d_conv_in + self.nheads, bias=bias)
        self.conv1d = nn.Conv1d(d_conv_in, d_conv_in, d_conv, groups=d_conv_in, padding=d_conv - 1,
                                bias=conv_bias)
        # The inverse of softplus at steps drawn log-uniformly: short to long memories.
        dt = torch.empty(self.nheads).uniform_(math.log(dt_min), math.log(dt_max))
        dt = dt.exp().clamp(min=dt_init_floor)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = nn.RMSNorm(d_inner)
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)

    def forward(self, u, seq_idx=None):
        if u.dim() != 3 or u.shape[-1] != self.d_model:
            raise ValueError(f"u must be (batch, length, {self.d_model}), got {tuple(u.shape)}")
        d_bc = self.ngroups * self.d_state
        z, xBC, dt = self.in_proj(u).split([self.d_inner, self.d_inner + 2 * d_bc, self.nheads], -1)
        x, B, C = F.silu(self.convolve(xBC, seq_idx)).split([self.d_inner, d_bc, d_bc], -1)
        x = x.unflatten(-1, (-1, self.headdim))                             # (b, l, h, p)
        B, C = (t.unflatten(-1, (self.ngroups, -1)) for t in (B, C))        # (b, l, g, n)
        options = {} if seq_idx is None else {"seq_idx": seq_idx}
        A = -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()
        y = self.mix(choose_scan(self.backend, u.device, u.dtype), x, dt, A, B, C, self.chunk_size,
                     D=self.D, dt_bias=self.dt_bias, dt_softplus=True, dt_limit=self.dt_limit,
                     **options)
        y = (y.flatten(2) * F.silu(z)).unflatten(-1, (self.ngroups, -1))    # RMS norm per group
        y = F.rms_norm(y, y.shape[-1:], eps=1e-5).flatten(-2) * self.norm.weight
        return self.out_proj(y)

    def mix(self, scan, *arguments, **options):
        return scan(*arguments, **options)

    def convolve(self, x, seq_idx):
        """conv1d as d_conv shifted multiply-adds: several times faster on CPUs. x (b, l, d)."""
        l, k = x.shape[1], self.d_conv
        ahead = int(k * self.share_ahead)
        padded = F.pad(x, (0, 0, k - 1 - ahead, ahead))
        weight = self.conv1d.weight[:, 0].mT.to(x.dtype)                    # (k, d)
        out = x.new_zeros(1) if self.conv1d.bias is None else self.conv1d.bias.to(x.dtype)
        for tap in range(k):
            shifted = padded[:, tap : tap + l]
            if seq_idx is not None and tap < k - 1:     # no tap reaches into another sequence
                there = F.pad(seq_idx, (k - 1 - tap, 0), value=-1)[:, :l]
                shifted = shifted * (there == seq_idx)[..., None]
            out = torch.addcmul(out, shifted, weight[tap])
        return out


class BidirectionalMamba2(Mamba2):
    """Mamba2 in both directions: every output sees every token.

    Choice, the paper being silent: both directions share all weights, so that a state_dict of
    Mamba2 loads, and their outputs are added before the gated norm. The convolution looks to both
    sides: with d_conv = 4 at one token before, the token itself and two after."""

    share_ahead = 0.5

    def mix(self, scan, *arguments, **options):
        return ssd_bidirectional(*arguments, scan=scan, **options)


if __name__ == "__main__":
    torch.manual_seed(0)
    randn = torch.randn(3, 1, 300, 4, 16)
    inputs = randn[0], torch.rand(1, 300, 4), -torch.rand(4), randn[1, :, :, :1], randn[2, :, :, :1]
    judge = ssd_recurrent(*(t.double() for t in inputs))
    print("300 tokens, 4 heads: RMS error over RMS, against the recurrence in float64")
    for form in (ssd_recurrent, ssd_quadratic, ssd_chunked_plain, ssd_chunked):
        for dtype in (torch.float64, torch.float32):
            error = form(*(t.to(dtype) for t in inputs)) - judge
            print(f"{form.__name__:18} {str(dtype):14} {error.norm() / judge.norm():.1e}")
