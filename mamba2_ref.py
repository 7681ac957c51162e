"""Mamba2: one function written three ways, and the layers around it.

What this file teaches (Dao and Gu 2024, "state-space duality", arXiv 2405.21060; LinGen fig. 3):
a *selective state space model* can be read as a recurrence, as a masked attention matrix, or as
chunks that use the matrix inside and the recurrence between. Per head, with a_t = dt_t * A <= 0:

    recurrent   h_t = exp(a_t) h_{t-1} + dt_t x_t B_t^T          y_t = h_t C_t + D x_t
    quadratic   y   = (L o C B^T)(dt x) + D x                    L_ij = exp(a_{j+1} + ... + a_i) for i >= j, else 0
    chunked     the quadratic form inside each chunk of Q tokens, one state per chunk for the past

(o multiplies entry by entry; D x is a skip past the state, and a layer's gate z multiplies y by silu(z).)

In words: the state h is a small matrix. Each token fades it by exp(a_t), writes x_t into it at the address B_t, and
reads it at the address C_t. *Selective* means that dt, B and C are made from the token itself (`Mamba2` below): it
decides how much to forget (a large dt forgets and writes much, dt near 0 lets the token pass by), where to write and
what to read. In the matrix L_ij is what is left of token j when token i reads, and C_i B_j how well their addresses meet.

All three are the same function. The recurrence in float64 judges the others; the chunked form costs
O(length) and is the one that LinGen runs. Read in this order: `ssd_recurrent` (what), `ssd_quadratic`
(why it is attention), `ssd_chunked_plain` (why it is linear), the layers; and last, for the curious,
`_ChunkedScan`, which is the plain form again, arranged for speed and with its gradient written by hand.

    b batch    l length    h heads    p headdim    n d_state    g groups of heads that share B and C
    r = h / g  heads per group        c chunks     Q chunk_size    h_t, with an index: the state
    i, j positions (in the chunked form: inside the chunk)

    x, y, z (b, l, h, p)   dt (b, l, h)   A (h)   B, C (b, l, g, n)   D (h) or (h, p)   state (b, h, p, n)

Names and argument order (as far as seq_idx) are those of mamba-ssm's `mamba_chunk_scan_combined`.
"""
import argparse
import contextlib
import functools
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

INF = math.inf


# --- What all forms share: the checks, the step sizes, the skip and the gate ------------------------------


def _prepare(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit):
    """Check the arguments; return dt, a = dt * A, B, C, the initial state and the sequence starts, ready to scan.

    Sums and states are kept in at least float32: in bfloat16 a running sum of dt * A stops moving
    once it is some 256 times larger than what is added (in float16, 2048 times).
    """
    if not isinstance(x, torch.Tensor) or x.dim() != 4 or not x.is_floating_point():
        got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"x must be a floating-point tensor (batch, length, nheads, headdim), got {got}")
    b, l, h, p = x.shape
    if 0 in x.shape:
        raise ValueError(f"x has an empty axis: (batch, length, nheads, headdim) = {tuple(x.shape)}")
    if not isinstance(B, torch.Tensor) or B.dim() != 4:
        raise ValueError("B must be a tensor (batch, length, ngroups, d_state)")
    g, n = B.shape[2:]
    if g == 0 or n == 0 or h % g:
        raise ValueError(f"ngroups must divide nheads, d_state be at least 1: got ngroups={g}, nheads={h}, d_state={n}")
    wanted = {"dt": (dt, [(b, l, h)]), "A": (A, [(h,)]), "B": (B, [(b, l, g, n)]), "C": (C, [(b, l, g, n)]),
              "D": (D, [(h,), (h, p)]), "z": (z, [(b, l, h, p)]), "dt_bias": (dt_bias, [(h,)]),
              "initial_states": (initial_states, [(b, h, p, n)]), "seq_idx": (seq_idx, [(b, l)])}
    for name, (tensor, shapes) in wanted.items():
        if tensor is None and name in ("D", "z", "dt_bias", "initial_states", "seq_idx"):
            continue
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) not in shapes:
            got = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))} to fit x {tuple(x.shape)}, got {got}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move them to one device")
        if tensor.is_floating_point() == (name == "seq_idx") or tensor.is_complex():
            raise ValueError(f"{name} must be of {'an integer' if name == 'seq_idx' else 'a real floating-point'} dtype, got {tensor.dtype}")
    low, high = dt_limit
    if not 0 <= low <= high:
        raise ValueError(f"dt_limit must be (low, high) with 0 <= low <= high, got {tuple(dt_limit)}")

    dtype = functools.reduce(torch.promote_types, (t.dtype for t in (x, dt, A, B, C)), torch.float32)
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(low, high)
    if initial_states is not None:
        initial_states = initial_states.to(dtype)
    starts = None                    # True where a packed sequence starts, that is, where no state may come in
    if seq_idx is not None:
        starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))            # (b, l)
    return dt, dt * A.to(dtype), B.to(dtype), C.to(dtype), initial_states, starts


def _finish(y, x, D, z):
    """The skip D x and the gate silu(z), in the dtype of the sums; then back to the dtype of x."""
    if D is not None:
        D = D.to(y.dtype)
        y = torch.addcmul(y, x.to(y.dtype), D if D.dim() == 2 else D[:, None])
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)


# --- Form 1: the recurrence, the judge -----------------------------------------------------------------------


def ssd_recurrent(x, dt, A, B, C, *, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
                  dt_softplus=False, dt_limit=(0.0, INF), return_final_states=False):
    """The state space model one token at a time: slow, obvious, and in float64 the judge of everything else.

    Args, all floating-point tensors of one device unless said otherwise:
        x (b, l, h, p), dt (b, l, h), A (h), B and C (b, l, g, n) where g divides h: head k uses group k // (h / g).
        D (h) or (h, p): skip. z (b, l, h, p): gate, y * silu(z).
        dt_bias (h), dt_softplus, dt_limit: the step is clamp(softplus(dt + dt_bias), *dt_limit).
        initial_states (b, h, p, n): the state before the first token.
        seq_idx (b, l), integer: tokens of several sequences packed in one row; where the number changes, the
            state is emptied. A number must not come back later in the row (the layer's convolution tells sequences
            apart by it). The initial state belongs to the first sequence.
    Returns y (b, l, h, p) in the dtype of x; with return_final_states also the last state (b, h, p, n), in
        float32 for half-precision inputs.
    Raises ValueError where shapes, dtypes or devices do not fit.
    """
    dt, a, B, C, state, starts = _prepare(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit)
    heads = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(heads, 2), C.repeat_interleave(heads, 2)                # (b, l, h, n)
    inputs = dt[..., None] * x                                                          # (b, l, h, p)
    if state is None:
        state = inputs.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1])               # (b, h, p, n)
    ys = []
    for t in range(x.shape[1]):
        if starts is not None:
            state = torch.where(starts[:, t, None, None, None], 0.0, state)
        state = a[:, t, :, None, None].exp() * state + inputs[:, t, :, :, None] * B[:, t, :, None, :]
        ys.append((state * C[:, t, :, None, :]).sum(-1))                                # (b, h, p)
    y = _finish(torch.stack(ys, 1), x, D, z)
    return (y, state) if return_final_states else y


# --- Form 2: the matrix, or why this is attention ------------------------------------------------------------


def segment_sums(a, starts=None):
    """(..., l) -> (..., l, l): entry ij is a_{j+1} + ... + a_i for i >= j and -inf above the diagonal.

    The sum is taken term by term and not as a difference of two running sums, which would lose digits. -inf
    goes in *before* the exponential: exp of a large positive entry above the diagonal would overflow, and
    masking the result to 0 afterwards still gives 0 * inf = NaN in the backward pass.
    """
    l = a.shape[-1]
    allowed = torch.ones(l, l, dtype=torch.bool, device=a.device).tril()
    sums = a[..., :, None].expand(*a.shape, l).masked_fill(~allowed.tril(-1), 0).cumsum(-2)      # (..., i, j)
    if starts is not None:                                          # i and j lie in the same packed sequence
        sequence = starts.cumsum(-1)
        allowed = allowed & (sequence[..., :, None] == sequence[..., None, :])
    return sums.masked_fill(~allowed, -INF)


def ssd_quadratic(x, dt, A, B, C, *, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
                  dt_softplus=False, dt_limit=(0.0, INF), return_final_states=False):
    """The same function as one lower-triangular attention matrix per head: O(l^2) time and memory.

    L o (C B^T) is attention without softmax: C asks, B answers, x is the value, and L forgets.
    Arguments, results and errors as `ssd_recurrent`.
    """
    dt, a, B, C, state, starts = _prepare(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit)
    heads = x.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(heads, 2).transpose(1, 2) for t in (B, C))             # (b, h, l, n)
    a = a.transpose(1, 2)                                                               # (b, h, l)
    values = (dt[..., None] * x).transpose(1, 2)                                        # (b, h, l, p)
    L = segment_sums(a, None if starts is None else starts[:, None]).exp()              # (b, h, l, l)
    y = (L * (C @ B.mT)) @ values                                                       # (b, h, l, p)
    final = values.mT @ (L[:, :, -1, :, None] * B)                                      # (b, h, p, n)
    if state is not None:
        decay = a.cumsum(-1).exp()                                                      # (b, h, l)
        if starts is not None:
            decay = decay.masked_fill(starts.cumsum(1)[:, None] > 0, 0)
        y = y + decay[..., None] * (C @ state.mT)
        final = final + decay[:, :, -1, None, None] * state
    y = _finish(y.transpose(1, 2), x, D, z)
    return (y, final) if return_final_states else y


# --- Form 3: chunks, or why this is linear -------------------------------------------------------------------


def ssd_chunked_plain(x, dt, A, B, C, chunk_size=32, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
                      dt_softplus=False, dt_limit=(0.0, INF), return_final_states=False):
    """The chunked form as one would explain it, its gradient left to autograd: the twin of `ssd_chunked`.

    Arguments, results and errors as `ssd_chunked`.
    """
    dt, a, B, C, state, starts = _prepare(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit)
    b, l, h, p = x.shape
    chunk_size = _fit(chunk_size, l)
    values = _chunks(dt[..., None] * x, chunk_size).transpose(2, 3)                     # (b, c, h, Q, p)
    B, C = (_chunks(t, chunk_size).transpose(2, 3).repeat_interleave(h // t.shape[2], 2) for t in (B, C))  # (b, c, h, Q, n)
    a = _chunks(a, chunk_size).transpose(2, 3)                                          # (b, c, h, Q)
    if starts is not None:
        starts = _chunks(starts, chunk_size)[:, :, None]                                # (b, c, 1, Q)

    # 1. Inside a chunk: the quadratic form, with a matrix of Q x Q only.
    L = segment_sums(a, starts).exp()                                                   # (b, c, h, Q, Q)
    y = (L * (C @ B.mT)) @ values                                                       # (b, c, h, Q, p)
    # 2. What each chunk adds to the state, decayed to the chunk's end.
    added = values.mT @ (L[..., -1, :, None] * B)                                       # (b, c, h, p, n)
    # 3. The recurrence, one step per chunk: how much of the state survives the chunk, plus what was added.
    decay = a.cumsum(-1).exp()                                                          # (b, c, h, Q)
    if starts is not None:
        decay = decay.masked_fill(starts.cumsum(-1) > 0, 0)
    state = torch.zeros_like(added[:, 0]) if state is None else state
    entering = []
    for keep, add in zip(decay[..., -1, None, None].unbind(1), added.unbind(1)):
        entering.append(state)
        state = keep * state + add
    # 4. What each token reads from the state that entered its chunk.
    y = y + decay[..., None] * (C @ torch.stack(entering, 1).mT)
    y = _finish(y.transpose(2, 3).flatten(1, 2)[:, :l], x, D, z)
    return (y, state) if return_final_states else y


def _fit(chunk_size, length):
    """A chunk longer than the sequence would only be padding."""
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a whole number of at least 1, got {chunk_size!r}")
    return min(chunk_size, length)


def _chunks(t, chunk_size):
    """(b, l, ...) -> (b, c, Q, ...). Zeros fill the last chunk: with dt = 0 a token neither decays nor adds."""
    missing = -t.shape[1] % chunk_size
    if missing:
        t = torch.cat([t, t.new_zeros(t.shape[0], missing, *t.shape[2:])], 1)
    return t.unflatten(1, (-1, chunk_size))


def ssd_chunked(x, dt, A, B, C, chunk_size=32, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
                dt_softplus=False, dt_limit=(0.0, INF), return_final_states=False):
    """The chunked scan, O(length) in time and memory: what the layers below run on.

    Args:
        chunk_size: tokens per chunk, at least 1. The length need not be a multiple of it, and the result does
            not depend on it beyond rounding.
        All others, the results and the errors: as `ssd_recurrent`.
    """
    return _chunked(x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit,
                    return_final_states, both=False)


def ssd_bidirectional(x, dt, A, B, C, chunk_size=32, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, INF)):
    """The scan from the left plus the scan from the right, in one pass (LinGen fig. 3): y (b, l, h, p).

    Equals ssd(x, ...) + flip(ssd(flip(x), ...)) along the length, the skip D x and the gate applied once, to the
    sum. Arguments and errors as `ssd_chunked`.
    """
    return _chunked(x, dt, A, B, C, chunk_size, D, z, dt_bias, None, None, dt_softplus, dt_limit, False, both=True)


def _chunked(x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit, return_final_states, both):
    dt, a, B, C, state, starts = _prepare(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit)
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    if state is not None:                                       # (b, h, p, n) -> (b, g, n, r p): heads as columns
        state = state.view(b, g, -1, p, n).permute(0, 1, 4, 2, 3).flatten(3)
    with _full_precision(x.device):
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, dt, a, B, C, state))
        y, final = _ChunkedScan.apply(x, dt, a, B, C, state, starts, _fit(chunk_size, l), both, keep)
        y = _finish(y, x, D, z)
    if not return_final_states:
        return y
    return y, final.view(b, g, n, -1, p).permute(0, 1, 3, 4, 2).flatten(1, 2)


# --- Backends: whose scan runs -------------------------------------------------------------------------------


BACKENDS = ("torch", "mamba_ssm", "auto")


@functools.lru_cache(None)
def _official_scan():
    """mamba-ssm's Triton scan, or the reason why it cannot be had."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except Exception as error:                       # a broken installation fails in many ways, not only ImportError
        return None, f"{type(error).__name__}: {error}"
    return mamba_chunk_scan_combined, ""


@functools.lru_cache(None)
def _say_once(line):
    print(line, file=sys.stderr)


def choose_backend(backend, device):
    """"torch", "mamba_ssm" or "auto" -> the one that runs on this device. Says once what "auto" took.

    Raises ValueError for an unknown name, RuntimeError where mamba_ssm is asked for and cannot run.
    """
    if backend == "torch":
        return "torch"
    if backend not in BACKENDS:
        raise ValueError(f'backend must be "torch", "mamba_ssm" or "auto", got {backend!r}')
    on_gpu = torch.device(device).type == "cuda"
    scan, why = _official_scan() if on_gpu or backend == "mamba_ssm" else (None, "")
    if backend == "mamba_ssm":
        if scan is None:
            raise RuntimeError('backend="mamba_ssm" needs the package mamba-ssm: pip install --no-build-isolation mamba-ssm '
                               f'(CUDA and its compiler must be there). Or take backend="torch". Import said: {why}')
        if not on_gpu:
            raise RuntimeError(f'backend="mamba_ssm" runs on a CUDA GPU, the tensors are on {device}: move them, or take backend="torch"')
        return backend
    took = "torch" if scan is None else "mamba_ssm"
    _say_once(f"scan backend: {took}" + ("" if took == "mamba_ssm" else f" (mamba-ssm cannot be imported: {why})" if on_gpu else f" (on {torch.device(device).type})"))
    return took


def ssd(x, dt, A, B, C, chunk_size=32, backend="auto", both=False, **options):
    """The scan on the chosen backend, from the left or, with `both`, the sum of both directions."""
    if backend == "auto" and x.dtype == torch.float64:
        backend = "torch"                               # mamba-ssm's kernels know no float64
    if choose_backend(backend, x.device) == "torch":
        return (ssd_bidirectional if both else ssd_chunked)(x, dt, A, B, C, chunk_size, **options)
    scan, _ = _official_scan()
    if not both:
        return scan(x, dt, A, B, C, chunk_size, **options)
    if not options.keys() <= {"D", "z", "dt_bias", "dt_softplus", "dt_limit"}:
        raise TypeError(f"both directions take D, z, dt_bias, dt_softplus and dt_limit, got {', '.join(options)}")
    D, z = options.pop("D", None), options.pop("z", None)
    y = scan(x, dt, A, B, C, chunk_size, **options)
    y = y + scan(*(t.flip(1) for t in (x, dt)), A, *(t.flip(1) for t in (B, C)), chunk_size, **options).flip(1)
    return _finish(y, x, D, z)


# --- The layers ------------------------------------------------------------------------------------------------


class RMSNormGated(nn.Module):
    """RMS norm of x * silu(z) over each of `ngroups` parts of the width; the gate first, as Mamba2 does by default."""

    def __init__(self, d, ngroups=1, eps=1e-5):
        super().__init__()
        self.weight, self.ngroups, self.eps = nn.Parameter(torch.ones(d)), ngroups, eps

    def forward(self, x, z):
        x = (x * F.silu(z)).unflatten(-1, (self.ngroups, -1))
        return F.rms_norm(x, x.shape[-1:], eps=self.eps).flatten(-2) * self.weight


class Mamba2(nn.Module):
    """The Mamba2 layer: u (b, l, d_model) -> (b, l, d_model), each output seeing the tokens up to its own.

    One projection makes everything that the scan needs: the gate z, x, B, C and dt. A short depthwise convolution
    lets x, B and C see their last d_conv tokens; then the scan, the gated norm, and the projection back.
    Parameter names, shapes and initialisation are those of `mamba_ssm.modules.mamba2.Mamba2`: a state_dict of the
    one loads into the other. Only chunk_size differs by default (32, not 256): it is speed, not function.

    Raises ValueError where expand * d_model is no multiple of headdim, or ngroups does not divide the heads.
    """

    both = False                            # scan in both directions

    def __init__(self, d_model, d_state=128, d_conv=4, expand=2, headdim=64, ngroups=1, A_init_range=(1, 16),
                 dt_min=0.001, dt_max=0.1, dt_init_floor=1e-4, dt_limit=(0.0, INF), bias=False, conv_bias=True,
                 chunk_size=32, backend="auto"):
        super().__init__()
        for name, value in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv), ("headdim", headdim), ("ngroups", ngroups), ("chunk_size", chunk_size)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r:.60}")
        if not 0 < expand < INF or backend not in BACKENDS:
            raise ValueError(f"expand must be a number above 0, backend one of {', '.join(BACKENDS)}: got {expand!r:.60} and {backend!r:.60}")
        d_inner = int(expand * d_model)
        if d_inner < 1 or d_inner % headdim:
            raise ValueError(f"expand * d_model must be a multiple of headdim: got {expand} * {d_model} = {d_inner} and headdim={headdim}")
        self.nheads = d_inner // headdim
        if self.nheads % ngroups:
            raise ValueError(f"ngroups must divide nheads = expand * d_model / headdim: got ngroups={ngroups}, nheads={self.nheads}")
        self.d_model, self.d_inner, self.d_state, self.d_conv, self.headdim, self.ngroups = d_model, d_inner, d_state, d_conv, headdim, ngroups
        self.dt_limit, self.chunk_size, self.backend = dt_limit, chunk_size, backend
        self.taps_ahead = d_conv // 2 if self.both else 0               # of the convolution's d_conv taps: they look at later tokens
        d_conv_in = d_inner + 2 * ngroups * d_state                                     # x, B, C
        self.in_proj = nn.Linear(d_model, d_inner + d_conv_in + self.nheads, bias=bias)     # z, x, B, C, dt
        self.conv1d = nn.Conv1d(d_conv_in, d_conv_in, d_conv, groups=d_conv_in, padding=d_conv - 1, bias=conv_bias)
        # dt_bias: the inverse of softplus at steps drawn log-uniformly, so that heads begin with short to long memories.
        dt = torch.exp(torch.rand(self.nheads) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp(min=dt_init_floor)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.log(torch.empty(self.nheads).uniform_(*A_init_range)))
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = RMSNormGated(d_inner, ngroups)
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)

    def forward(self, u, seq_idx=None):
        if not isinstance(u, torch.Tensor) or u.dim() != 3 or u.shape[-1] != self.d_model:
            raise ValueError(f"expected tokens (batch, length, d_model={self.d_model}), got {tuple(u.shape) if isinstance(u, torch.Tensor) else type(u).__name__}")
        weight = self.in_proj.weight
        autocast = u.device.type != "meta" and torch.is_autocast_enabled(u.device.type)         # which mends the dtype
        if u.device != weight.device or (u.dtype != weight.dtype and not autocast):
            raise ValueError(f"the tokens are {u.dtype} on {u.device}, the weights {weight.dtype} on {weight.device}: move or convert one with .to(...)")
        z, xBC, dt = self.in_proj(u).split([self.d_inner, self.d_inner + 2 * self.ngroups * self.d_state, self.nheads], -1)
        xBC = F.silu(self._convolve(xBC, seq_idx))
        x, B, C = xBC.split([self.d_inner, *[self.ngroups * self.d_state] * 2], -1)
        x = x.unflatten(-1, (-1, self.headdim))                                         # (b, l, h, p)
        B, C = (t.unflatten(-1, (self.ngroups, -1)) for t in (B, C))                    # (b, l, g, n)
        packed = {} if seq_idx is None else {"seq_idx": seq_idx}
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        y = ssd(x, dt, A, B, C, self.chunk_size, self.backend, self.both, D=self.D,
                dt_bias=self.dt_bias, dt_softplus=True, dt_limit=self.dt_limit, **packed)
        return self.out_proj(self.norm(y.flatten(2), z))

    def _convolve(self, x, seq_idx):
        """The depthwise convolution (b, l, d) as d_conv shifted multiply-adds: several times faster than Conv1d on CPUs."""
        l, k = x.shape[1], self.d_conv
        padded = F.pad(x, (0, 0, k - 1 - self.taps_ahead, self.taps_ahead))
        weight = self.conv1d.weight[:, 0].mT.to(x.dtype)                                # (k, d)
        out = 0 if self.conv1d.bias is None else self.conv1d.bias.to(x.dtype)
        for tap in range(k):
            shifted = padded[:, tap : tap + l]
            if seq_idx is not None and tap < k - 1:                 # a tap does not reach into another packed sequence
                there = F.pad(seq_idx, (k - 1 - tap, 0), value=-1)[:, :l]
                shifted = shifted * (there == seq_idx)[..., None]
            out = out + shifted * weight[tap]
        return out


class BidirectionalMamba2(Mamba2):
    """Mamba2 in both directions (LinGen fig. 3): every output sees every token, at the cost of one layer and a bit.

    Choice, the paper being silent: the two directions share all weights, so that this layer has the parameters of
    one Mamba2 and can load its state_dict (though its outputs differ), and their outputs are added before the gated
    norm. Sharing also lets the scan do once what both need (see `ssd_bidirectional`). The convolution, shared too and
    not mirrored, looks to both sides: with d_conv = 4 a token sees one before, itself and two after, so that the layer
    is not exactly symmetric under reversal.
    """

    both = True

    def forward(self, u):                   # no seq_idx: the scan of both directions takes none
        return super().forward(u)


# --- What runs: form 3 again, arranged for speed, both directions, and the gradient by hand -------------------


class _Chunks:
    """What the forward and the backward pass of `_ChunkedScan` share: decays, views of the inputs, state passing.

    Layouts: per token (b, c, g, Q, r, .), per head (b, c, g, r, Q, .), states at the borders of the chunks
    (b, c + 1, g, n, r p), border i left of chunk i. As an argument, c is a slice: the k chunks of one segment.
    Lists have one entry per direction: `into` is the decay from the edge where the state comes in to a token,
    `out` from a token to the edge where it leaves, `weight` = out * dt, `total` the decay of a whole chunk.
    """

    def __init__(self, x, dt, a, B, C, starts, Q, both):
        self.inputs, self.both, self.Q, g = (x, B, C), both, Q, B.shape[2]
        self.r, self.p = x.shape[2] // g, x.shape[3]
        per_token = lambda t: _chunks(t, Q).unflatten(3, (g, -1)).transpose(2, 3).contiguous()
        # exp(s) as 2^(s log2 e): the same to rounding, and several times faster on CPUs, also where it underflows.
        self.dt, a = per_token(dt), per_token(a) * math.log2(math.e)                # (b, c, g, Q, r)
        sums = a.cumsum(3)
        end = sums[:, :, :, -1:]
        self.sums = sums.mT.contiguous()                                            # (b, c, g, r, Q)
        self.sums_before = (sums - a).mT.contiguous() if both else None             # the sum without the token itself
        self.above = self.sums.new_ones(Q, Q).triu() if both else None                 # 1 where a token reads what comes later
        into, out, total = [sums.exp2()], [(end - sums).exp2()], end.exp2()
        if both:                                     # from the right edge to i: a_i + ... ; from j to the left: ... + a_{j-1}
            into, out = into + [(end - sums + a).exp2()], out + [(sums - a).exp2()]
        self.sequence = None
        if starts is not None:                       # borders passed since the chunk began; what crosses one is 0
            self.sequence = _chunks(starts, Q).cumsum(2)                            # (b, c, Q)
            passed = self.sequence[:, :, None, :, None]
            into[0], out[0] = into[0].masked_fill(passed > 0, 0), out[0].masked_fill(passed < passed[:, :, :, -1:], 0)
            total = total.masked_fill(passed[:, :, :, -1:] > 0, 0)
        self.into, self.out = [t[..., None] for t in into], [t[..., None] for t in out]
        self.weight = [t * self.dt[..., None] for t in self.out]
        self.total = total                                                          # (b, c, g, 1, r)
        # So many chunks at a time that a matrix per head fits in a core's cache; a GPU wants more work at once.
        size = x.shape[0] * x.shape[2] * Q * max(Q, self.p)
        self.step = min(self.dt.shape[1], max(1, (_SEGMENT if x.device.type == "cpu" else 2**26) // size))

    def segments(self, dy=None):
        """Yield the chunks' slice and, per token, x, B, C and dy of a few chunks at a time: views where they can be."""
        for first in range(0, self.dt.shape[1], self.step):
            c = slice(first, min(first + self.step, self.dt.shape[1]))
            cut = lambda t: _chunks(t[:, c.start * self.Q : c.stop * self.Q], self.Q)
            x, B, C, *rest = (cut(t) for t in self.inputs + (() if dy is None else (dy,)))
            heads = lambda t: t.unflatten(3, (-1, self.r)).transpose(2, 3)          # (b, k, Q, h, p) -> (b, k, g, Q, r, p)
            yield c, heads(x), B.transpose(2, 3), C.transpose(2, 3), *map(heads, rest)      # B, C: (b, k, g, Q, n)

    def decays(self, c):
        """L (b, k, g, r, Q, Q), before `mask`. On and below the diagonal stand the forward scan's decays; above it ones, which
        `mask` removes (their true exp could overflow), or, for both directions, the reversed scan's, and 2 on the diagonal.

        Its exponents are differences of two running sums, as in mamba-ssm: faster than summing term by term, at the
        price of some digits where a chunk holds a very strong decay.
        """
        sums = self.sums[:, c]
        L = sums[..., :, None] - sums[..., None, :]
        if not self.both:
            return L.tril_().exp2_()
        before = self.sums_before[:, c]
        L = L.lerp_(before[..., None, :] - before[..., :, None], self.above).exp2_()        # weights 0 and 1: one or the other
        L.diagonal(dim1=-2, dim2=-1).fill_(2)
        return L

    def mask(self, c, G):
        """Zero in G (b, k, g, Q, Q), in place, what no token may read. All heads of a group share G, so this is cheap."""
        if self.sequence is not None:
            sequence = self.sequence[:, c, None]
            G.mul_(sequence[..., :, None] == sequence[..., None, :])
        return G if self.both else G.tril_()

    def values(self, c, x):
        """dt x per head, written once in the layout that the products want: (b, k, g, r, Q, p)."""
        values = torch.empty(x.transpose(3, 4).shape, dtype=self.dt.dtype, device=x.device)
        return torch.mul(x.transpose(3, 4), self.dt[:, c].mT[..., None], out=values)

    def new_states(self, nchunks=None):
        b, c, g, _, r = self.dt.shape
        states = self.dt.new_empty(b, (nchunks or c) + 1, g, self.inputs[1].shape[3], r * self.p)
        states[:, 0] = states[:, -1] = 0
        return states

    def edges(self, c, way):
        """The borders where the state enters and leaves the chunks c, for direction 0 (from the left) or 1."""
        left, right = c, slice(c.start + 1, c.stop + 1)
        return (left, right) if way == 0 else (right, left)

    def pass_on(self, states, way, c, at=None):
        """Carry the state through the chunks c, one multiply-add each: linear in the number of chunks.

        `at` is where the first border of c stands in `states`, if not at its own place.
        """
        total = self.total[:, c].expand(-1, -1, -1, self.p, -1).mT.flatten(-2).unsqueeze(3)     # (b, k, g, 1, r p)
        left = c.start if at is None else at
        borders = states[:, left : left + total.shape[1] + 1].unbind(1)                         # views, made in one call
        steps = list(zip(borders, total.unbind(1), borders[1:]))
        for before, decay, after in steps if way == 0 else reversed(steps):
            (after if way == 0 else before).addcmul_(decay, before if way == 0 else after)


class _ChunkedScan(torch.autograd.Function):
    """The four steps of `ssd_chunked_plain`, arranged for speed, in one direction or in both at once.

    Small products and the passes over memory between them take the time, not arithmetic. So the sequence is worked off a few chunks at a
    time, whose Q x Q matrices stay in the cache; B and C are never repeated per head (the heads of a group are
    the columns of one wider product); and nothing of size Q x Q is kept for the backward pass, which makes it
    again. Kept are the inputs and one state per chunk.

    In *both* directions a second state walks from right to left. Inside a chunk one full matrix serves both: below
    the diagonal are the decays of the forward scan, above it those of the reversed one, and on it stands 2, since
    each direction counts the token itself. What they share, C B^T, the products with it and every copy, is done once.
    """

    @staticmethod
    def forward(ctx, x, dt, a, B, C, state, starts, Q, both, keep):
        chunks = _Chunks(x, dt, a, B, C, starts, Q, both)
        b, nchunks, g, _, r = chunks.dt.shape

        def add(store, way, c, at, x_c, B_c):           # step 2: what each chunk adds to the state that leaves it
            _, leaving = chunks.edges(at, way)
            store[:, leaving] = B_c.mT @ (chunks.weight[way][:, c] * x_c).flatten(-2)

        # The states at all borders are kept for the backward pass; without one, those of a segment are enough.
        states = [chunks.new_states(None if keep else chunks.step)] + [chunks.new_states()] * both
        if state is not None:
            states[0][:, 0] = state
        if both:                                        # the loop below reads both states: this one must be complete before it
            for c, x_c, B_c, _ in chunks.segments():
                add(states[1], 1, c, c, x_c, B_c)
            chunks.pass_on(states[1], 1, slice(0, nchunks))
        y = chunks.dt.new_empty(b, nchunks, Q, g, r, chunks.p)
        for c, x_c, B_c, C_c in chunks.segments():
            at = c if keep else slice(0, c.stop - c.start)                  # where the segment's borders stand in states[0]
            add(states[0], 0, c, at, x_c, B_c)
            chunks.pass_on(states[0], 0, c, at.start)                       # step 3: from border to border
            M = chunks.decays(c).mul_(chunks.mask(c, C_c @ B_c.mT).unsqueeze(3))        # (b, k, g, r, Q, Q)
            out = (M @ chunks.values(c, x_c)).transpose(3, 4)               # step 1: (b, k, g, Q, r, p)
            for way, store in enumerate(states):                            # step 4: what tokens read from the state
                entering, _ = chunks.edges(c if way else at, way)
                read = (C_c @ store[:, entering]).unflatten(-1, (r, -1))    # (b, k, g, Q, r, p)
                out = torch.addcmul(out, chunks.into[way][:, c], read, out=y[:, c].transpose(2, 3))
            final = states[0][:, at.stop]
            if not keep:
                states[0][:, 0] = final
        ctx.save_for_backward(x, dt, a, B, C, starts, *states)
        ctx.options = Q, both
        return y.flatten(3, 4).flatten(1, 2)[:, : x.shape[1]], final.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dfinal):
        with _full_precision(dy.device):
            return _ChunkedScan.gradients(ctx, dy, dfinal)

    @staticmethod
    def gradients(ctx, dy, dfinal):
        x, dt, a, B, C, starts, *states = ctx.saved_tensors
        Q, both = ctx.options
        chunks = _Chunks(x, dt, a, B, C, starts, Q, both)
        b, nchunks, g, _, r = chunks.dt.shape
        dx = chunks.dt.new_empty(b, nchunks, Q, g, r, chunks.p).transpose(2, 3)     # all of these per token
        dB, dC = (chunks.dt.new_empty(b, nchunks, Q, g, B.shape[3]).transpose(2, 3) for _ in "BC")
        ddt, da = torch.empty_like(chunks.dt), torch.empty_like(chunks.dt)

        # The gradient of the states runs against the states: what tokens read from a border is a gradient for it,
        # and each border hands on its own to the one before, through the same decay.
        dstates = [chunks.new_states() for _ in states]
        for c, _, B_c, C_c, dy_c in chunks.segments(dy):
            for way, store in enumerate(dstates):
                entering, _ = chunks.edges(c, way)
                store[:, entering] = C_c.mT @ (chunks.into[way][:, c] * dy_c).flatten(-2)
        dstates[0][:, -1] = dfinal
        for way, store in enumerate(dstates):
            chunks.pass_on(store, 1 - way, slice(0, nchunks))

        for c, x_c, B_c, C_c, dy_c in chunks.segments(dy):
            # Back through y = M (dt x) and M = L o C B^T.
            G = chunks.mask(c, C_c @ B_c.mT).unsqueeze(3)                   # (b, k, g, 1, Q, Q)
            L = chunks.decays(c)                                            # (b, k, g, r, Q, Q)
            dy_heads = dy_c.transpose(3, 4).contiguous()                    # (b, k, g, r, Q, p)
            dvalues = ((L * G).mT @ dy_heads).transpose(3, 4)               # (b, k, g, Q, r, p)
            dM = (dy_heads @ chunks.values(c, x_c).mT).mul_(L)              # dM o L
            dG = chunks.mask(c, dM.sum(3))                                  # (b, k, g, Q, Q); L's 2 on the diagonal is in it
            dC_c, dB_c = dG @ B_c, dG.mT @ C_c                              # (b, k, g, Q, n)
            # The exponent of L_ij sums the a between j and i, so dM_ij M_ij is a gradient for each of them: rows
            # minus columns, summed up. The diagonal has exponent 0. It would cancel, but not without rounding.
            dM.mul_(G).diagonal(dim1=-2, dim2=-1).zero_()                   # dM o M
            flow = dM.sum(-1) - dM.sum(-2)                                  # (b, k, g, r, Q)
            da_c = 0
            if both:        # full minus lower is what lies above the diagonal: there the sum runs the other way
                full, lower = flow, dM.tril_()
                flow = lower.sum(-1) - lower.sum(-2)
                da_c = (full - flow).cumsum(-1).mT
            da_c = da_c + _sum_from_right(flow, 4).mT                       # (b, k, g, Q, r)
            ddt_c = (x_c * dvalues).sum(-1)                                 # (b, k, g, Q, r)
            torch.mul(dvalues, chunks.dt[:, c, ..., None], out=dx[:, c])

            for way in range(len(states)):
                entering, leaving = chunks.edges(c, way)
                state, dstate = states[way][:, entering], dstates[way][:, leaving]      # (b, k, g, n, r p)
                # Step 4: y got into * (C state). d_into: the gradient of the exponent of `into`, that of `into` times `into`.
                asked = (chunks.into[way][:, c] * dy_c).flatten(-2)         # (b, k, g, Q, r p)
                dC_c += asked @ state.mT
                d_into = (asked * (C_c @ state)).unflatten(-1, (r, -1)).sum(-1)         # (b, k, g, Q, r)
                # Step 2: the state that leaves was given B^T (weight * x), with weight = out * dt.
                weight, given = chunks.weight[way][:, c], (B_c @ dstate).unflatten(-1, (r, -1))
                dB_c += (weight * x_c).flatten(-2) @ dstate.mT
                dx[:, c].addcmul_(weight, given)
                dweight = (x_c * given).sum(-1)                             # (b, k, g, Q, r)
                ddt_c += dweight * chunks.out[way][:, c, ..., 0]
                d_out = dweight * weight[..., 0]
                # Step 3: the state that leaves also holds total * the state that entered.
                d_total = (state * dstate).unflatten(-1, (r, -1)).sum((3, 5))[..., None, :] * chunks.total[:, c]
                # Each exponent spans tokens: `into` those up to i, `out` those after j, `total` all; mirrored on way 1.
                before, after = (d_out, d_into) if way == 0 else (d_into, d_out)
                da_c += before.cumsum(3) + _sum_from_right(after, 3) - d_out + d_total
            dB[:, c], dC[:, c], ddt[:, c], da[:, c] = dB_c, dC_c, ddt_c, da_c

        # Per token -> (b, l, ...): (b, c, g, Q, ...) -> (b, c, Q, g, ...) -> (b, c Q, g, ...), cut to length.
        dx, dB, dC, ddt, da = (t.transpose(2, 3).flatten(1, 2)[:, : x.shape[1]] for t in (dx, dB, dC, ddt, da))
        dstate = dstates[0][:, 0] if ctx.needs_input_grad[5] else None
        return dx.flatten(2, 3).to(x.dtype), ddt.flatten(2), da.flatten(2), dB, dC, dstate, None, None, None, None


_SEGMENT = 2**18                     # numbers in the Q x Q matrices of all heads of one segment: 1 MiB in float32


def _full_precision(device):
    """Sums stay in float32 where autocast would round them."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()


def _sum_from_right(t, dim):
    return t.flip(dim).cumsum(dim).flip(dim)


# --- The demonstration: the forms agree ------------------------------------------------------------------------


def main():
    from benchmarks import pictures
    pictures.end_with_the_reader()
    parser = argparse.ArgumentParser(description="Three forms of one scan: how well they agree, and what they look like (LinGen fig. 3).")
    parser.add_argument("--length", type=int, default=300, help="tokens to compare the forms on (default 300)")
    parser.add_argument("--out", default="mamba2_maps.png", help="the picture (default mamba2_maps.png)")
    args = parser.parse_args()
    if not 1 <= args.length <= 4096:
        parser.error(f"--length {args.length}: choose 1 to 4096; the recurrence walks token by token")
    pictures.check_out(parser, args.out)
    torch.manual_seed(0)
    b, l, h, p, g, n = 1, args.length, 4, 16, 1, 16
    inputs = dict(x=torch.randn(b, l, h, p), dt=torch.rand(b, l, h), A=-torch.rand(h), B=torch.randn(b, l, g, n), C=torch.randn(b, l, g, n))
    judge = ssd_recurrent(**{name: t.double() for name, t in inputs.items()})
    print(f"{l} tokens, {h} heads of {p}, d_state {n}: RMS error over RMS, against the recurrence in float64\n")
    print("form            float64    float32")
    for name, form in (("recurrent", ssd_recurrent), ("quadratic", ssd_quadratic), ("chunked, plain", ssd_chunked_plain), ("chunked, fast", ssd_chunked)):
        errors = []
        for dtype in (torch.float64, torch.float32):
            y = form(**{key: t.to(dtype) for key, t in inputs.items()})
            errors.append(((y - judge).square().mean() / judge.square().mean()).sqrt().item())
        print(f"{name:15} {errors[0]:.1e}    {errors[1]:.1e}")
    pictures.save(pictures.mamba2_maps(), args.out)


if __name__ == "__main__":
    main()
