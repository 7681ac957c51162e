"""Mamba2: one function written three ways, and the layers around it.

Dao and Gu 2024, "state-space duality", arXiv 2405.21060; LinGen fig. 3. A *selective state space model* can be
read as a recurrence, as a masked attention matrix, or as chunks that use the matrix inside and the recurrence
between. Per head, with v_t = dt_t x_t and a_t = dt_t A <= 0:

    recurrent   h_t = exp(a_t) h_{t-1} + v_t B_t^T       y_t = h_t C_t
    quadratic   y   = (L o C B^T) v                      L_ij = exp(a_{j+1} + ... + a_i) for i >= j, else 0
    chunked     the quadratic form inside each chunk of Q tokens, one state per chunk for the past

(o multiplies entry by entry.) In words: the state h is a small matrix. Each token fades it by exp(a_t), writes v_t
into it at the address B_t, and reads it at the address C_t. *Selective* means that dt, B and C are made from the
token itself (`Mamba2` below). A large dt forgets and writes much; a dt near 0 lets the token pass by. In the matrix,
L_ij is what is left of token j when token i reads, and C_i B_j is how well their addresses meet.

All three are the same function. The recurrence in float64 judges the others. The chunked form costs O(length), and
LinGen runs it. Reading order: `recurrence` (what), `masked_matrix` (why it is attention), `chunks` (why it is
linear), the layers; last `FastScan`, which is `chunks` arranged for speed, with its gradient written by hand.

    b batch    l length    h heads    p headdim    n d_state    g groups of heads that share B and C
    r = h / g  heads of a group       c chunks     Q chunk_size    i, j positions    h_t, with an index: the state

    x, y, z (b, l, h, p)   dt (b, l, h)   A (h)   B, C (b, l, g, n)   D (h) or (h, p)   state (b, h, p, n)
"""
import contextlib
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


# --- Form 1: the recurrence, the judge ------------------------------------------------------------


def recurrence(x, dt, a, B, C, state, starts, chunk_size=None):
    """One token at a time: slow, obvious, and in float64 the judge of everything else.

    Every form takes dt and a = dt A (b, l, h), the state before the first token, and `starts` (b, l), True
    where a packed sequence begins (or None). It returns y (b, l, h, p) and the last state.
    """
    v, a = dt[..., None] * x, empty_at(starts, a)
    B, C = per_head(B, x), per_head(C, x)                                       # (b, l, h, n)
    ys = []
    for t in range(x.shape[1]):
        state = a[:, t, :, None, None].exp() * state + v[:, t, :, :, None] * B[:, t, :, None, :]
        ys.append((state @ C[:, t, :, :, None]).squeeze(-1))                    # (b, h, p)
    return torch.stack(ys, 1), state


def empty_at(starts, a):
    """A decay of exp(-inf) = 0 empties the state where a packed sequence starts."""
    return a if starts is None else a.masked_fill(starts[..., None], -INF)


def per_head(B, x):
    """(b, l, g, n) -> (b, l, h, n): head k belongs to group k // r."""
    return B.repeat_interleave(x.shape[2] // B.shape[2], 2)


# --- Form 2: the matrix, or why this is attention -------------------------------------------------


def segment_sums(a):
    """(..., l) -> (..., l, l): a_{j+1} + ... + a_i for i >= j, and -inf above the diagonal.

    The sum is taken term by term: a difference of two running sums would lose digits. The mask goes in
    before the exponential: exp of a large positive entry above the diagonal would overflow, and masking it
    to 0 afterwards gives 0 * inf = NaN in the backward pass.
    """
    l = a.shape[-1]
    lower = torch.ones(l, l, dtype=torch.bool, device=a.device).tril()
    sums = a[..., None].expand(*a.shape, l).masked_fill(~lower.tril(-1), 0).cumsum(-2)
    return sums.masked_fill(~lower, -INF)


def masked_matrix(x, dt, a, B, C, state, starts, chunk_size=None):
    """The same function as one lower-triangular attention matrix per head: O(l^2) time and memory.

    L o (C B^T) is attention without softmax: C asks, B answers, v is the value, and L forgets.
    """
    v = (dt[..., None] * x).transpose(1, 2)                                     # (b, h, l, p)
    a = empty_at(starts, a).transpose(1, 2)                                     # (b, h, l)
    B, C = per_head(B, x).transpose(1, 2), per_head(C, x).transpose(1, 2)       # (b, h, l, n)
    L, decay = segment_sums(a).exp(), a.cumsum(-1).exp()                        # (b, h, l, l), (b, h, l)
    y = (L * (C @ B.mT)) @ v + decay[..., None] * (C @ state.mT)                # (b, h, l, p)
    final = v.mT @ (L[:, :, -1, :, None] * B) + decay[:, :, -1, None, None] * state
    return y.transpose(1, 2), final


# --- Form 3: chunks, or why this is linear --------------------------------------------------------


def chunks(x, dt, a, B, C, state, starts, chunk_size):
    """The chunked form as one would explain it, its gradient left to autograd: the twin of `FastScan`."""
    l, Q = x.shape[1], min(chunk_size, x.shape[1])
    v = split(dt[..., None] * x, Q)                                             # (b, c, h, Q, p)
    a = split(empty_at(starts, a), Q)                                           # (b, c, h, Q)
    B, C = split(per_head(B, x), Q), split(per_head(C, x), Q)                   # (b, c, h, Q, n)

    # 1. Inside a chunk: the quadratic form, with a matrix of Q x Q only.
    L = segment_sums(a).exp()                                                   # (b, c, h, Q, Q)
    y = (L * (C @ B.mT)) @ v                                                    # (b, c, h, Q, p)
    # 2. What each chunk adds to the state, decayed to the chunk's end.
    added = v.mT @ (L[..., -1, :, None] * B)                                    # (b, c, h, p, n)
    # 3. The recurrence, one step per chunk: what survives of the state, plus what was added.
    decay = a.cumsum(-1).exp()                                                  # (b, c, h, Q)
    entering = []
    for j in range(a.shape[1]):
        entering.append(state)
        state = decay[:, j, :, -1, None, None] * state + added[:, j]
    # 4. What each token reads from the state that entered its chunk.
    y = y + decay[..., None] * (C @ torch.stack(entering, 1).mT)
    return y.transpose(2, 3).flatten(1, 2)[:, :l], state


def split(t, Q):
    """(b, l, h, ...) -> (b, c, h, Q, ...). Zeros fill the last chunk: with dt = 0 a token changes nothing."""
    t = torch.cat([t, t.new_zeros(t.shape[0], -t.shape[1] % Q, *t.shape[2:])], 1)
    return t.unflatten(1, (-1, Q)).transpose(2, 3)


# --- What mamba-ssm adds around the scan, for all forms -------------------------------------------


def ssd_recurrent(x, dt, A, B, C, *, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
                  dt_softplus=False, dt_limit=(0.0, INF), return_final_states=False):
    """The recurrence. Names and argument order of all `ssd_` functions are mamba-ssm's.

    Args:
        x (b, l, h, p), dt (b, l, h), A (h), B and C (b, l, g, n), where g divides h.
        D (h) or (h, p): skip, y + D x. z (b, l, h, p): gate, y silu(z), after the skip.
        dt_bias (h), dt_softplus, dt_limit: the step is clamp(softplus(dt + dt_bias), *dt_limit).
        initial_states (b, h, p, n): the state before the first token.
        seq_idx (b, l), integer: several sequences packed in one row; where the number changes, the state is
            emptied. The initial state belongs to the first sequence.
    Returns y (b, l, h, p) in the dtype of x; with return_final_states also the last state (b, h, p, n), in
        float32 for half-precision inputs. Raises ValueError where a shape does not fit.
    """
    return run_form(recurrence, x, dt, A, B, C, 1, D, z, dt_bias, initial_states, seq_idx,
                    dt_softplus, dt_limit, return_final_states)


def ssd_quadratic(x, dt, A, B, C, *, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
                  dt_softplus=False, dt_limit=(0.0, INF), return_final_states=False):
    """The masked matrix, O(l^2). Arguments, results and errors as `ssd_recurrent`."""
    return run_form(masked_matrix, x, dt, A, B, C, 1, D, z, dt_bias, initial_states, seq_idx,
                    dt_softplus, dt_limit, return_final_states)


def ssd_chunked_plain(x, dt, A, B, C, chunk_size=32, D=None, z=None, dt_bias=None,
                      initial_states=None, seq_idx=None, dt_softplus=False, dt_limit=(0.0, INF),
                      return_final_states=False):
    """The chunks as explained: the slow twin of `ssd_chunked`. Arguments, results and errors as there."""
    return run_form(chunks, x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx,
                    dt_softplus, dt_limit, return_final_states)


def ssd_chunked(x, dt, A, B, C, chunk_size=32, D=None, z=None, dt_bias=None, initial_states=None,
                seq_idx=None, dt_softplus=False, dt_limit=(0.0, INF), return_final_states=False):
    """The chunked scan, O(length) in time and memory: what the layers below run on.

    chunk_size, at least 1, need not divide the length. It changes the speed, and the result only by rounding.
    All other arguments, the results and the errors are those of `ssd_recurrent`.
    """
    return run_form(fast_chunks, x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx,
                    dt_softplus, dt_limit, return_final_states)


def run_form(form, x, dt, A, B, C, chunk_size, D, z, dt_bias, state, seq_idx, dt_softplus, dt_limit,
             return_final_states):
    """Step sizes, sequence starts and state, then the form, then the skip and the gate.

    Sums and states are kept in at least float32, also under autocast: in bfloat16 a running sum stops moving
    once it is some 256 times larger than what is added.
    """
    check(x, dt, A, B, C, D, z, dt_bias, state, seq_idx)
    if not 0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit must be (low, high) with 0 <= low <= high, got {dt_limit}")
    if type(chunk_size) is not int or chunk_size < 1:
        raise ValueError(f"chunk_size must be a whole number of at least 1, got {chunk_size!r}")
    with sums_in_full_precision(x.device):
        dtype = torch.float32
        for t in (x, dt, A, B, C):
            dtype = torch.promote_types(dtype, t.dtype)
        dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
        dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
        state = x.new_zeros(*dt[:, 0].shape, x.shape[3], B.shape[3]) if state is None else state
        starts = None if seq_idx is None else F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        y, state = form(x, dt, dt * A.to(dtype), B.to(dtype), C.to(dtype), state.to(dtype), starts, chunk_size)
        y = skip_and_gate(y, x, D, z)
    return (y, state) if return_final_states else y


def check(x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None):
    """Raise ValueError, naming the argument, where shapes do not fit."""
    if x.dim() != 4 or B.dim() != 4 or 0 in x.shape or not x.is_floating_point():
        raise ValueError("x must be a float tensor (batch, length, nheads, headdim), not empty, and B (batch, length, "
                         f"ngroups, d_state): got x {tuple(x.shape)} {x.dtype}, B {tuple(B.shape)}")
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    if g < 1 or n < 1 or h % g:
        raise ValueError(f"ngroups must divide nheads, d_state be at least 1: got B {tuple(B.shape)}, nheads={h}")
    per_channel = D is not None and D.dim() == 2
    for name, tensor, shape in (
            ("dt", dt, (b, l, h)), ("A", A, (h,)), ("B", B, (b, l, g, n)), ("C", C, (b, l, g, n)),
            ("D", D, (h, p) if per_channel else (h,)), ("z", z, (b, l, h, p)), ("dt_bias", dt_bias, (h,)),
            ("initial_states", initial_states, (b, h, p, n)), ("seq_idx", seq_idx, (b, l))):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} to fit x {tuple(x.shape)}, got {tuple(tensor.shape)}")


def sums_in_full_precision(device):
    """Switch off autocast, which would round the operands of products."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def skip_and_gate(y, x, D, z):
    """(y + D x) silu(z), in the dtype of the sums; then back to the dtype of x."""
    if D is not None:
        y = torch.addcmul(y, x.to(y.dtype), (D if D.dim() == 2 else D[:, None]).to(y.dtype))
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)


def ssd_bidirectional(x, dt, A, B, C, chunk_size=32, D=None, z=None, dt_bias=None, dt_softplus=False,
                      dt_limit=(0.0, INF), scan=ssd_chunked):
    """The scan plus the scan of the flipped sequence (LinGen fig. 3); D and the gate once, on the sum.

    Both directions lie side by side in the batch, so that `scan` is called once.
    """
    x2, dt2, B2, C2 = (torch.cat([t, t.flip(1)]) for t in (x, dt, B, C))        # (2 b, l, ...)
    y = scan(x2, dt2, A, B2, C2, chunk_size, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit)
    forward, backward = y.chunk(2)
    return skip_and_gate(forward + backward.flip(1), x, D, z)


def fast_chunks(x, dt, a, B, C, state, starts, chunk_size):
    """`chunks` by hand; defined below."""
    return FastScan.apply(x, dt, a, B, C, state, starts, min(chunk_size, x.shape[1]))


# --- The fast scan: `chunks`, arranged for speed --------------------------------------------------


SEGMENT = {"cpu": 2**18, "other": 2**28}        # numbers in the largest tensor of a segment
GROUP = 32                                      # chunks whose states are passed on by one matrix


def segments(x, B, Q):
    """Slices of so many chunks that they stay in the cache of a CPU; a GPU takes far more at a time."""
    (b, l, h, p), n = x.shape, B.shape[3]
    c = -(-l // Q)
    numbers = SEGMENT["cpu" if x.device.type == "cpu" else "other"]
    step = max(1, numbers // (b * h * max(Q * Q, Q * p, Q * n, p * n)))
    return [slice(i, min(i + step, c)) for i in range(0, c, step)]


def take(t, c, Q):
    """The chunks c of t: (b, l, h, ...) -> (b h, k, Q, ...). Zeros fill the last chunk."""
    t = t[:, c.start * Q : c.stop * Q]
    missing = (c.stop - c.start) * Q - t.shape[1]
    if missing:
        t = torch.cat([t, t.new_zeros(t.shape[0], missing, *t.shape[2:])], 1)
    return t.transpose(1, 2).flatten(0, 1).unflatten(1, (-1, Q))


def put(t, whole, c):
    """The reverse: t (b h, k, Q, ...) becomes the chunks c of `whole` (b, c Q, h, ...)."""
    Q, (b, _, h) = t.shape[2], whole.shape[:3]
    whole[:, c.start * Q : c.stop * Q] = t.flatten(1, 2).unflatten(0, (b, h)).transpose(1, 2)


def times(x, weight):
    """x weight[..., None] in one pass, in the layout and dtype that the products want."""
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    return torch.mul(x, weight[..., None], out=out)


def decays(a):
    """a (S, c, Q) -> running sums within the chunks and what they may reach, (S, c, Q) and (S, c, 1), base 2.

    `between` makes exponents of differences of these sums: some digits worse than term by term, but fast. Such
    a difference can turn positive by rounding, and is above the diagonal, so it is cut before exp at `most`:
    0, unless A > 0 lets the state grow. 2^(a log2 e) is exp(a), and several times faster on CPUs.
    """
    a = a * math.log2(math.e)
    a = a.clamp(min=1.2 * math.log2(torch.finfo(a.dtype).tiny))                 # 2^a is 0 there
    return a.cumsum(2), a.clamp(min=0).sum(2, keepdim=True)


def between(sums, most):
    """L (S, k, Q, Q): the decay from token j to token i of a chunk, right only where i >= j."""
    L = sums[..., :, None] - sums[..., None, :]
    return L.clamp_(max=most[..., None]).exp2_()


def carry(decay, added, state):
    """Step 3: the states that enter k chunks (S, k, s), and the one that leaves the last (S, s).

    The same trick once more: a small matrix of decays inside groups of chunks, then groups of groups.
    decay (S, k), of whole chunks; added (S, k, s); state (S, s).
    """
    k = decay.shape[1]
    if k == 1:
        return state[:, None], added[:, 0] + decay * state
    K = min(k, GROUP)
    if k % K:
        decay = F.pad(decay, (0, -k % K), value=1)
        added = F.pad(added, (0, 0, 0, -k % K))
    decay = decay.unflatten(1, (-1, K))                                         # (S, m, K)
    later = torch.ones(K, K, dtype=torch.bool, device=decay.device).tril(-1)
    W = torch.where(later, decay[..., None], 1).cumprod(2).tril()               # (S, m, K, K)
    W = F.threshold(W, 2**-100, 0)                                              # denormal numbers are slow
    added = added.unflatten(1, (-1, K))                                         # (S, m, K, s)
    into = W[:, :, :, 0] * decay[:, :, :1]                                      # (S, m, K)
    ends = (W[:, :, -1:] @ added).squeeze(2)                                    # (S, m, s)
    entering, final = carry(into[:, :, -1], ends, state)                        # (S, m, s)
    W, into = F.pad(W[:, :, :-1], (0, 0, 1, 0)), F.pad(into[:, :, :-1], (1, 0), value=1)
    states = add_product(W @ added, into[..., None], entering[:, :, None])      # (S, m, K, s)
    return states.flatten(1, 2)[:, :k], final


def add_product(t, a, b):
    """t + a @ b, in place, for two axes of matrices."""
    t.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    return t


class Segment:
    """What both passes make of some chunks. `share` parts the heads by group: (S, ...) -> (N, r, ...)."""

    def __init__(self, x, B, C, small, c, Q):
        self.x, self.B, self.C = take(x, c, Q), take(B, c, Q), take(C, c, Q)
        self.dt, sums, most, self.into, self.out, self.passed = (t if t is None else t[:, c] for t in small)
        self.decay = self.into[:, :, -1]                                        # (S, k)
        self.L = between(sums, most)                                            # (S, k, Q, Q)
        self.v = times(self.x, self.dt)                                         # (S, k, Q, p)
        self.G = self.readable(self.C @ self.B.mT)                              # (N, k, Q, Q)
        self.B_out = (self.B[:, None] * self.share(self.out)[..., None]).flatten(0, 1)      # (S, k, Q, n)
        self.C_in = (self.C[:, None] * self.share(self.into)[..., None]).flatten(0, 1)      # (S, k, Q, n)

    @staticmethod
    def small(dt, a, starts, Q):
        """What has one number per token and head, for all chunks: (S, c, Q).

        into is the decay from the chunk's start to a token, out from a token to the chunk's end.
        """
        c = slice(0, -(-dt.shape[1] // Q))
        dt, (sums, most) = take(dt, c, Q), decays(take(a, c, Q))
        into, out, passed = sums.exp2(), (sums[:, :, -1:] - sums).clamp(max=most).exp2(), None
        if starts is not None:                                                  # no decay crosses a start
            passed = take(starts[..., None].expand(a.shape), c, Q).cumsum(2)
            into = into.masked_fill(passed > 0, 0)
            out = out.masked_fill(passed < passed[:, :, -1:], 0)
        return dt, sums, most, into, out, passed

    def share(self, t):
        return t.unflatten(0, (self.B.shape[0], -1))

    def readable(self, G, diagonal=0):
        """Zero in G (N, k, Q, Q), in place, what no token may read. The heads of a group share G: this is cheap."""
        if self.passed is not None:
            passed = self.share(self.passed)[:, 0]                              # (N, k, Q)
            G.mul_(passed[..., :, None] == passed[..., None, :])
        return G.tril_(diagonal)


class FastScan(torch.autograd.Function):
    """The four steps of `chunks`, a segment of some chunks at a time.

    Every head is a row of the batch: S = b h rows, N = b g for what the r heads of a group share. Kept for the
    backward pass are the inputs and one state per chunk; the matrices are made again.
    """

    @staticmethod
    def forward(ctx, x, dt, a, B, C, state, starts, Q):
        (b, l, h, p), n = x.shape, B.shape[3]
        y = dt.new_empty(b, -(-l // Q) * Q, h, p)
        small = Segment.small(dt, a, starts, Q)
        shape, state, states = state.shape, state.reshape(b * h, p * n), []
        for c in segments(x, B, Q):
            s = Segment(x, B, C, small, c, Q)
            entering, state = carry(s.decay, (s.v.mT @ s.B_out).flatten(2), state)
            entering = entering.unflatten(2, (p, n))                            # (S, k, p, n)
            M = s.share(s.L).mul_(s.G[:, None]).flatten(0, 1)                   # (S, k, Q, Q)
            put(add_product(M @ s.v, s.C_in, entering.mT), y, c)
            if any(ctx.needs_input_grad):
                states.append(entering)
        ctx.save_for_backward(x, dt, a, B, C, starts, *states)
        ctx.Q = Q
        return y[:, :l], state.view(shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dstate):
        with sums_in_full_precision(dy.device):
            return FastScan.gradients(ctx, dy, dstate)

    @staticmethod
    def gradients(ctx, dy, dstate):
        x, dt, a, B, C, starts, *states = ctx.saved_tensors
        Q, (b, l, h, p), n = ctx.Q, x.shape, B.shape[3]
        dx, ddt, da, dB, dC = (dt.new_empty(b, -(-l // Q) * Q, *t.shape[2:]) for t in (x, dt, a, B, C))
        small = Segment.small(dt, a, starts, Q)
        shape, dstate = dstate.shape, dstate.reshape(b * h, p * n)
        for c, entering in reversed(list(zip(segments(x, B, Q), states))):
            s = Segment(x, B, C, small, c, Q)
            dy_c = take(dy, c, Q).contiguous()                                  # (S, k, Q, p)
            # The gradient of the states runs against the states, through the same decays.
            asked = (dy_c.mT @ s.C_in).flatten(2)                               # (S, k, p n)
            leaving, dstate = carry(s.decay.flip(1), asked.flip(1), dstate)
            leaving = leaving.flip(1).unflatten(2, (p, n))                      # (S, k, p, n)
            d_decay = (entering * leaving).sum((2, 3)) * s.decay                # (S, k)
            # y = M v + C_in H^T with M = L o G and G = C B^T; the chunk adds v^T B_out to the state.
            dM = s.share((dy_c @ s.v.mT).mul_(s.L))                             # dM o L: (N, r, k, Q, Q)
            dG = s.readable(dM.sum(1))                                          # (N, k, Q, Q)
            M = s.share(s.L).mul_(s.G[:, None]).flatten(0, 1)                   # (S, k, Q, Q)
            dv = add_product(M.mT @ dy_c, s.B_out, leaving.mT)                  # (S, k, Q, p)
            dC_in = s.share((dy_c @ entering).mul_(s.into[..., None]))          # (N, r, k, Q, n)
            dB_out = s.share((s.v @ leaving).mul_(s.out[..., None]))
            put(dG @ s.B + dC_in.sum(1), dC, c)
            put(dG.mT @ s.C + dB_out.sum(1), dB, c)
            # The exponent of L_ij sums a over j+1..i, so dM_ij M_ij is a gradient for each of these: rows minus
            # columns, summed up. Those of `into` and `out` span the tokens up to i, and after j. The diagonal
            # has exponent 0; it would cancel, but not without rounding.
            dM = dM.mul_(s.readable(s.G, -1)[:, None]).flatten(0, 1)            # (S, k, Q, Q)
            d_into = dC_in.mul_(s.C[:, None]).sum(-1).flatten(0, 1)             # (S, k, Q)
            d_out = dB_out.mul_(s.B[:, None]).sum(-1).flatten(0, 1)
            up_to = (dM.sum(-1) - dM.sum(-2) + d_into).flip(2).cumsum(2).flip(2)
            after = F.pad(d_out.cumsum(2)[..., :-1], (1, 0))
            put(up_to + after + d_decay[..., None], da, c)
            put((s.x * dv).sum(-1), ddt, c)
            put(dv.mul_(s.dt[..., None]), dx, c)
        dx, ddt, da, dB, dC = (t[:, :l] for t in (dx, ddt, da, dB, dC))
        return dx.to(x.dtype), ddt, da, dB, dC, dstate.view(shape), None, None
