"""Mamba2: one function written three ways, and the layers around it.

Dao and Gu 2024, "state-space duality", arXiv 2405.21060; LinGen fig. 3. A *selective state space
model* can be read as a recurrence, as a masked attention matrix, or as chunks that use the matrix
inside and the recurrence between. Per head, with v_t = dt_t x_t, a_t = dt_t A and one number A < 0:

    recurrent   h_t = exp(a_t) h_{t-1} + v_t B_t^T      y_t = h_t C_t
    quadratic   y   = (L o (C B^T)) v                   L_ij = exp(a_{j+1} + ... + a_i) for i >= j
    chunked     the quadratic form inside each chunk of Q tokens, one state per chunk for the past

The state h_t is a p x n matrix, 0 before the first token. Each token multiplies it by exp(a_t) and
adds v_t B_t^T; the output is h_t times C_t. So C_t works as a query, B_t as a key, v_t as a value.
*Selective* means that dt, B and C depend on the input: a large dt forgets the past and adds much,
dt = 0 changes nothing. L_ij is the decay from token j to token i (o multiplies entry by entry). All
three are the same function; the tests compare each with the recurrence in float64.

    b batch   l length   h heads   p headdim   n d_state   g groups of heads that share B and C
    r = h / g heads of a group     c chunks    Q chunk_size    i, j positions    h_t: the state
    x, y, z, v (b, l, h, p)   dt, a (b, l, h)   A (h)   B, C (b, l, g, n)   state (b, h, p, n)
"""
import functools
import importlib
import importlib.util
import math
import sys
import types

import torch
import torch.nn.functional as F
from torch import nn

INF = math.inf


# --- What mamba-ssm adds around the scan; on a first reading, skip to form 1 ----------------------

def with_options(form):
    """Give a form mamba-ssm's arguments, without cu_seqlens and return_varlen_states. The form gets
    the final dt, a = dt A, the first state, Q, and `starts` (b, l), True where seq_idx changes."""
    def ssd(x, dt, A, B, C, chunk_size=32, D=None, z=None, dt_bias=None, initial_states=None,
            seq_idx=None, dt_softplus=False, dt_limit=(0.0, INF), return_final_states=False):
        (b, l, h, p), (g, n) = x.shape, B.shape[2:]
        if dt.shape != (b, l, h) or not B.shape == C.shape == (b, l, g, n) or h % g or not l:
            raise ValueError("dt must be (b, l, h), B and C (b, l, g, n), g divide h, l >= 1: "
                             f"got {[tuple(t.shape) for t in (x, dt, B, C)]}")
        if chunk_size < 1 or not 0 <= dt_limit[0] <= dt_limit[1]:
            raise ValueError(f"invalid chunk_size or dt_limit: {chunk_size}, {dt_limit}")
        with no_autocast(x.device):
            dtypes = (t.dtype for t in (x, dt, A, B, C))
            dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
            dt, A, B, C = (t.to(dtype) for t in (dt, A, B, C))      # x follows in dt x and in D x
            if dt_bias is not None:
                dt = dt + dt_bias.to(dtype)
            dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
            state = x.new_zeros(b, h, p, n) if initial_states is None else initial_states
            starts = None
            if seq_idx is not None:
                starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
            Q = min(chunk_size, l)
            y, state = form(x, dt, dt * A, B, C, state.to(dtype), starts, Q)
            y = skip_and_gate(y, x, D, z)
        return (y, state) if return_final_states else y

    ssd.__name__ = form.__name__
    ssd.__doc__ = form.__doc__ + """

    chunk_size: tokens per chunk, at least 1. It changes the speed; two of the forms ignore it.
    D (h) or (h, p): skip, y + D x. z (b, l, h, p): gate, y silu(z), after the skip.
    dt_bias (h), dt_softplus, dt_limit: dt becomes clamp(softplus or identity (dt + dt_bias)).
    initial_states (b, h, p, n): the state before the first token.
    seq_idx (b, l), integer: several sequences packed in one row; where the number changes, the
        state is reset. The initial state belongs to the first sequence.
    Returns y in the dtype of x; with return_final_states also the last state, at least float32."""
    return ssd


def no_autocast(device):
    """A context without autocast, which would round the operands of products to half precision."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


def skip_and_gate(y, x, D, z):
    """(y + D x) silu(z), in the dtype of the sums; then back to the dtype of x."""
    if D is not None:
        y = torch.addcmul(y, x.to(y.dtype), (D if D.dim() == 2 else D[:, None]).to(y.dtype))
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)


# --- Form 1: the recurrence, the reference --------------------------------------------------------

@with_options
def ssd_recurrent(x, dt, a, B, C, state, starts, Q):
    """The recurrence, one token at a time: slow; in float64 the reference for all else."""
    v, a, B, C = per_head(x, dt, a, B, C, starts)
    ys = []
    for t in range(x.shape[1]):
        added = v[:, t, :, :, None] * B[:, t, :, None, :]                   # (b, h, p, n)
        state = a[:, t, :, None, None].exp() * state + added
        ys.append((state @ C[:, t, :, :, None]).squeeze(-1))                # (b, h, p)
    return torch.stack(ys, 1), state


def per_head(x, dt, a, B, C, starts):
    """v, a, and B, C (b, l, h, n). A decay of exp(-inf) = 0 resets the state at `starts`."""
    a = a if starts is None else a.masked_fill(starts[..., None], -INF)
    B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))
    return dt[..., None] * x, a, B, C


# --- Form 2: the matrix, or why this is attention -------------------------------------------------

def segment_sums(a):
    """(..., l) -> (..., l, l): a_{j+1} + ... + a_i for i >= j, and -inf above the diagonal.

    Column j keeps a_i in its rows i > j and is summed downwards, term by term: a difference of two
    running sums would lose digits. The exponential of -inf is 0."""
    l = a.shape[-1]
    lower = torch.ones(l, l, dtype=torch.bool, device=a.device).tril()
    sums = a[..., None].expand(*a.shape, l).masked_fill(~lower.tril(-1), 0).cumsum(-2)
    return sums.masked_fill(~lower, -INF)


@with_options
def ssd_quadratic(x, dt, a, B, C, state, starts, Q):
    """The same as one lower-triangular attention matrix per head: O(l^2) time and memory.

    L o (C B^T) is attention without softmax: C is the query, B the key, v the value, L a mask."""
    return one_chunk(*per_head(x, dt, a, B, C, starts), state)


def one_chunk(v, a, B, C, state):
    """One chunk (or the whole sequence), in four steps -> its outputs and the state after it."""
    v, a, B, C = (t.transpose(1, 2) for t in (v, a, B, C))                  # (b, h, l, .)
    L = segment_sums(a).exp()                                               # (b, h, l, l)
    decay = a.cumsum(-1).exp()[..., None]       # from the state before token 0: (b, h, l, 1)
    y = (L * (C @ B.mT)) @ v                    # 1. what tokens read from each other
    y = y + decay * (C @ state.mT)              # 2. what they read from the first state
    added = v.mT @ (L[:, :, -1, :, None] * B)   # 3. what they add to it, decayed to the end
    state = decay[:, :, -1:] * state + added    # 4. the state after the last token
    return y.transpose(1, 2), state             # (b, l, h, p), (b, h, p, n)


# --- Form 3: chunks, or why this is linear --------------------------------------------------------

@with_options
def ssd_chunked_plain(x, dt, a, B, C, state, starts, Q):
    """The matrix inside each chunk, the state from chunk to chunk: what `ssd_chunked` computes."""
    ys, inputs = [], per_head(x, dt, a, B, C, starts)
    for chunk in zip(*(t.split(Q, 1) for t in inputs)):
        y, state = one_chunk(*chunk, state)
        ys.append(y)
    return torch.cat(ys, 1), state


# --- The same arranged for speed ------------------------------------------------------------------
# On a first reading, skip to `ssd_bidirectional`: what follows computes nothing new.
# N = b g; K chunks at once, a segment, k its slice; H: h_t^T at borders (n, r p); G masked C B^T.
SEGMENT = {"cpu": 2**18, "other": 2**28}        # numbers in the largest tensor of a segment


@with_options
def ssd_chunked(x, dt, a, B, C, state, starts, Q):
    """The chunked scan, O(length) in time and memory: for the layers. No second derivatives."""
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    # The heads of a group share B and C, so one product serves the r p columns of all.
    state = state.unflatten(1, (g, -1)).permute(0, 1, 4, 2, 3).reshape(b * g, n, -1)    # (N, n, rp)
    if starts is not None:
        starts = in_chunks(starts[..., None].expand(b, l, g), Q, g)         # (N, c, Q, 1)
    x, dt, a, B, C = (in_chunks(t, Q, g) for t in (x, dt, a, B, C))         # x (N, c, Q, r, p)
    y, state = FastScan.apply(x, dt, a, B.squeeze(3), C.squeeze(3), state, starts)
    y = y.unflatten(0, (b, g)).movedim(1, 3).flatten(3, 4).flatten(1, 2)    # (b, c Q, h, p)
    return y[:, :l], state.unflatten(2, (-1, p)).permute(0, 2, 3, 1).reshape(b, h, p, n)


def in_chunks(t, Q, g):
    """(b, l, g r, ...) -> (N, c, Q, r, ...); B, C: r = 1. Padded by 0: dt = 0 changes no state."""
    missing = -t.shape[1] % Q
    if missing:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing))
    return t.unflatten(1, (-1, Q)).unflatten(3, (g, -1)).movedim(3, 1).flatten(0, 1)


def carry(decay, states):
    """Step 4, in place. decay (N, K, 1, r p); states (N, K + 1, n, r p): state 0, then increments.

    For j = 0 ... K - 1: states[j + 1] += decay[j] states[j]. Join chunks in pairs, recurse over the
    pairs, then fill in the states inside pairs: some 2 K products in log2(K) rounds of calls."""
    even, odd, pairs = states[:, ::2], states[:, 1::2], decay.shape[1] // 2
    if pairs:
        even[:, 1:].addcmul_(decay[:, 1::2], odd[:, :pairs])            # increments of two chunks
        carry(decay[:, : 2 * pairs : 2] * decay[:, 1::2], even)         # states 0, 2, 4, ...
    odd.addcmul_(decay[:, ::2], even[:, : odd.shape[1]])                # states 1, 3, 5, ...


class Chunks:
    """What both passes need: the decays, for all chunks, and the matrices, for some."""

    def __init__(self, x, dt, a, B, C, starts):
        (N, c, Q, r), p, n = a.shape, x.shape[4], B.shape[3]
        self.inputs, self.dt_heads = (x, B, C), dt.mT.contiguous()          # (N, c, r, Q)
        # exp(a) as 2^(a log2 e): on CPUs exp is many times slower where its result underflows.
        least = 1.2 * math.log2(torch.finfo(a.dtype).tiny)      # 2^least is 0, not even subnormal
        a2 = (a * math.log2(math.e)).clamp(min=least)           # finite, or inf - inf would follow
        # Exponents are differences of two running sums: fewer digits than term by term, but fast.
        # By rounding, and where j > i, they can be positive. So they are clamped before exp2:
        # at 0, or for A > 0 at the sum of the positive terms. from_start sums terms of one sign.
        sums, most = a2.cumsum(2), a2.clamp(min=0).sum(2, keepdim=True)
        self.sums, self.most = sums.mT.contiguous(), most.mT[..., None]     # (N,c,r,Q), (N,c,r,1,1)
        # Decays from chunk start to token and from token to chunk end; then the causal mask.
        from_start, to_end = sums.exp2(), (sums[:, :, -1:] - sums).clamp(max=most).exp2()
        self.mask = a.new_ones(Q, Q).tril().expand(N, c, Q, Q)
        if starts is not None:                              # nothing crosses a sequence's start
            passed = starts.cumsum(2)                                       # (N, c, Q, 1)
            from_start = from_start.masked_fill(passed > 0, 0)
            to_end = to_end.masked_fill(passed < passed[:, :, -1:], 0)
            self.mask = self.mask * (passed == passed.mT)
        self.from_start, self.to_end = from_start[..., None], to_end[..., None]
        self.dt_to_end = (to_end * dt)[..., None]
        # A segment stays in a CPU's cache; a GPU takes far more chunks at a time.
        size = SEGMENT["cpu" if x.device.type == "cpu" else "other"]
        step = max(1, size // (N * r * max(Q * Q, Q * p, p * n)))
        self.segments = [slice(i, min(i + step, c)) for i in range(0, c, step)]

    def cut(self, k):
        """For slice k: B, C (N, K, Q, n), v = dt x (N, K, r, Q, p), v_to_end (N, K, Q, r p), decay
        (N, K, 1, r p), L (N, K, r, Q, Q), wrong where j > i, and G, 0 there (N, K, 1, Q, Q)."""
        x, B, C = (t[:, k] for t in self.inputs)
        v = self.dt_heads[:, k, ..., None] * x.transpose(2, 3)
        decay = self.from_start[:, k, -1:, :, 0].repeat_interleave(x.shape[4], 3)
        L = self.sums[:, k, :, :, None] - self.sums[:, k, :, None]
        L = L.clamp_(max=self.most[:, k]).exp2_()
        G = (C @ B.mT).mul_(self.mask[:, k])[:, :, None]                    # (N, K, 1, Q, Q)
        return B, C, v, (self.dt_to_end[:, k] * x).flatten(3), decay, L, G


class FastScan(torch.autograd.Function):
    """The four steps of `one_chunk`, some chunks at a time. The inputs and the states at borders
    of chunks are kept for the backward pass; the matrices are computed again."""

    @staticmethod
    def forward(ctx, x, dt, a, B, C, state, starts):
        chunks, borders, y = Chunks(x, dt, a, B, C, starts), [], dt.new_empty(x.shape)
        for k in chunks.segments:
            B_k, C_k, v, v_to_end, decay, L, G = chunks.cut(k)
            H = torch.cat([state[:, None], B_k.mT @ v_to_end], 1)           # 3. (N, K + 1, n, r p)
            carry(decay, H)                                                 # 4.
            y[:, k] = (L.mul_(G) @ v).transpose(2, 3)                       # 1.; below 2.
            y[:, k].addcmul_(chunks.from_start[:, k], (C_k @ H[:, :-1]).unflatten(3, x.shape[3:]))
            state = H[:, -1]
            if any(ctx.needs_input_grad):
                borders.append(H)
        ctx.save_for_backward(x, dt, a, B, C, starts, *borders)
        return y, state.clone()     # else the last border would be shared with the caller

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dH):
        x, dt, a, B, C, starts, *borders = ctx.saved_tensors
        dx, ddt, da, dB, dC = (dt.new_empty(t.shape) for t in (x, dt, a, B, C))
        with no_autocast(dy.device):
            chunks, heads = Chunks(x, dt, a, B, C, starts), x.shape[3:]
            for k, H in reversed(list(zip(chunks.segments, borders))):
                B_k, C_k, v, v_to_end, decay, L, G = chunks.cut(k)
                # The gradient of the states runs backwards in time, through the same decays.
                decayed_dy = (chunks.from_start[:, k] * dy[:, k]).flatten(3)    # (N, K, Q, r p)
                dS = torch.cat([dH[:, None], (C_k.mT @ decayed_dy).flip(1)], 1) # (N, K + 1, n, r p)
                carry(decay.flip(1), dS)
                H, dH_out, dH = H[:, :-1], dS[:, :-1].flip(1), dS[:, -1]    # before, after each
                # y = M v + from_start (C H), M = L o G, G = C B^T; B^T v_to_end joins the state.
                dy_k = dy[:, k].transpose(2, 3).contiguous()                # (N, K, r, Q, p)
                dM_L = (dy_k @ v.mT).mul_(L)                                # dM o L
                dG = dM_L.sum(2).mul_(chunks.mask[:, k])                      # (N, K, Q, Q)
                dC[:, k] = dG @ B_k + decayed_dy @ H.mT
                dB[:, k] = dG.mT @ C_k + v_to_end @ dH_out.mT
                d_v_to_end = B_k @ dH_out                                  # (N, K, Q, r p)
                dv = dx[:, k].copy_((L.mul_(G).mT @ dy_k).transpose(2, 3))  # view of dx; L is M now
                dv.addcmul_(chunks.to_end[:, k], d_v_to_end.unflatten(3, heads))
                ddt[:, k] = (x[:, k] * dv).sum(-1)      # via v only; autograd adds the part via a
                dv.mul_(dt[:, k, ..., None])                                # now dx
                # E = dM o M: gradient of L's exponents (base e); E_start, E_end, E_chunk: those of
                # from_start, to_end, decay. a_m is in L_ij with j < m <= i: rows minus columns of E
                # from m on, as i, j >= m cancel. It is in from_start of i >= m, to_end of j < m and
                # decay. The diagonal would cancel only up to rounding, so it is left out.
                E = dM_L.mul_(G.tril(-1))
                E_start = (decayed_dy * (C_k @ H)).unflatten(3, heads).sum(-1)      # (N, K, Q, r)
                E_end = (v_to_end * d_v_to_end).unflatten(3, heads).sum(-1)
                E_chunk = ((H * dH_out).sum(2, keepdim=True) * decay).unflatten(3, heads).sum(-1)
                tail = ((E.sum(-1) - E.sum(-2)).mT + E_start).flip(2).cumsum(2).flip(2)
                da[:, k] = tail + F.pad(E_end.cumsum(2)[:, :, :-1], (0, 0, 1, 0)) + E_chunk
        return dx.to(x.dtype), ddt, da, dB, dC, dH, None


def ssd_bidirectional(x, dt, A, B, C, chunk_size=32, D=None, z=None, dt_bias=None,
                      dt_softplus=False, dt_limit=(0.0, INF), scan=ssd_chunked):
    """scan(x) + flip(scan(flip(x))) (LinGen fig. 3), all inputs flipped; D and the gate on the sum.

    Both scans run in one call, as one batch. The diagonal term (C_i B_i) v_i counts twice."""
    x2, dt2, B2, C2 = (torch.cat([t, t.flip(1)]) for t in (x, dt, B, C))
    y = scan(x2, dt2, A, B2, C2, chunk_size, dt_bias=dt_bias, dt_softplus=dt_softplus,
             dt_limit=dt_limit)
    y, y_flipped = y.chunk(2)
    return skip_and_gate(y + y_flipped.flip(1), x, D, z)


# --- Backends: whose scan runs --------------------------------------------------------------------

BACKENDS = ("torch", "mamba_ssm", "auto")
say_once = functools.cache(print)


@functools.cache
def official_scan():
    """mamba-ssm's Triton scan and "", or None and the reason why it cannot be had."""
    stub = types.ModuleType("mamba_ssm")        # the package's own __init__ needs compiled code
    try:
        spec = importlib.util.find_spec("mamba_ssm")
        stub.__path__ = spec.submodule_search_locations if spec else []
        sys.modules.setdefault("mamba_ssm", stub)
        module = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        return module.mamba_chunk_scan_combined, ""
    except Exception as error:                  # a broken installation fails in many ways
        return None, f"{type(error).__name__}: {error}"
    finally:                                    # whoever imports it next gets the real package
        if sys.modules.get("mamba_ssm") is stub:
            del sys.modules["mamba_ssm"]


def choose_scan(backend, device, dtype=torch.float32):
    """The function behind a backend: a name of BACKENDS, or a function like mamba-ssm's itself."""
    if callable(backend) or backend == "torch":
        return ssd_chunked if backend == "torch" else backend
    if backend not in BACKENDS:
        raise ValueError(f"backend must be a function or one of {BACKENDS}, got {backend!r}")
    on_gpu = device.type == "cuda" and dtype != torch.float64       # the kernels know no float64
    scan, why = official_scan() if on_gpu else (None, "")
    if backend == "mamba_ssm" and not scan:
        raise ValueError(f'backend "mamba_ssm" cannot run on {device} in {dtype}. It needs a GPU, '
                         "triton, and MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-build-isolation "
                         f"--no-deps mamba-ssm. {why}")
    if backend == "auto" and not torch.compiler.is_compiling():
        say_once(f"scan on {device} by {'mamba_ssm' if scan else 'torch'}", file=sys.stderr)
    return scan or ssd_chunked


# --- The layers -----------------------------------------------------------------------------------

class Mamba2(nn.Module):
    """The Mamba2 layer: u (b, l, d_model) -> (b, l, d_model), each output seeing the tokens so far.

    One projection makes z, x, B, C and dt. A short depthwise convolution lets x, B and C see the
    last d_conv tokens; then the scan, the gated norm, and the projection back. The parameters are
    those of `mamba_ssm.modules.mamba2.Mamba2`: a state_dict of the one loads into the other."""

    both_directions = False

    def __init__(self, d_model, d_state=128, d_conv=4, expand=2, headdim=64, ngroups=1,
                 A_init_range=(1, 16), dt_min=0.001, dt_max=0.1, dt_init_floor=1e-4,
                 dt_limit=(0.0, INF), bias=False, conv_bias=True, chunk_size=32, backend="auto"):
        super().__init__()
        d_inner = int(expand * d_model)
        if min(d_inner, d_state, d_conv, headdim, ngroups) < 1 or d_inner % (headdim * ngroups):
            raise ValueError("sizes must be at least 1, headdim * ngroups divide expand * d_model: "
                             f"got {headdim} * {ngroups} and {d_inner}")
        self.d_model, self.d_inner, self.d_state, self.d_conv = d_model, d_inner, d_state, d_conv
        self.headdim, self.ngroups, self.nheads = headdim, ngroups, d_inner // headdim
        self.dt_limit, self.chunk_size, self.backend = dt_limit, chunk_size, backend
        if backend != "auto":                   # as if on a GPU: if missing, an error at once
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
        self.norm = nn.RMSNorm(d_inner)         # holds the weight; `forward` norms each group
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)

    def forward(self, u):
        d_bc = self.ngroups * self.d_state
        z, xBC, dt = self.in_proj(u).split([self.d_inner, self.d_inner + 2 * d_bc, self.nheads], -1)
        x, B, C = F.silu(self.convolve(xBC)).split([self.d_inner, d_bc, d_bc], -1)
        x = x.unflatten(-1, (-1, self.headdim))                             # (b, l, h, p)
        B, C = (t.unflatten(-1, (self.ngroups, -1)) for t in (B, C))        # (b, l, g, n)
        A = -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()
        scan = choose_scan(self.backend, u.device, u.dtype)
        if self.both_directions:
            scan = functools.partial(ssd_bidirectional, scan=scan)
        y = scan(x, dt, A, B, C, self.chunk_size, D=self.D, dt_bias=self.dt_bias,
                 dt_softplus=True, dt_limit=self.dt_limit)                  # (b, l, h, p)
        y = (y.flatten(2) * F.silu(z)).unflatten(-1, (self.ngroups, -1))    # gate, then norm
        y = F.rms_norm(y, y.shape[-1:], eps=1e-5).flatten(-2) * self.norm.weight
        return self.out_proj(y)

    def convolve(self, x):
        """d_conv shifted multiply-adds, with the parameters of conv1d. x (b, l, d) -> the same."""
        l, k = x.shape[1], self.d_conv
        ahead = k // 2 if self.both_directions else 0       # taps that read later tokens
        padded = F.pad(x, (0, 0, k - 1 - ahead, ahead))
        weight = self.conv1d.weight[:, 0].mT.to(x.dtype)                    # (k, d)
        out = x.new_zeros(1) if self.conv1d.bias is None else self.conv1d.bias.to(x.dtype)
        for tap in range(k):
            out = torch.addcmul(out, padded[:, tap : tap + l], weight[tap])
        return out


class BidirectionalMamba2(Mamba2):
    """Mamba2 in both directions: every output sees every token.
    Choices: both directions share all weights, so that a state_dict of Mamba2 loads. Their outputs
    are added before the gated norm. The convolution reads both sides: with d_conv = 4 one token
    before, the token itself and two after."""

    both_directions = True


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
