"""
Other people's Mamba2 kernels, loaded so that they run beside ours on a machine without a GPU.

    official()              mamba_ssm's Triton kernels, interpreted where there is no GPU
    minimal()               mamba_ssm's ssd_minimal_discrete, the listing of the Mamba2 paper
    transformers()          transformers' plain scan, mamba2_chunk_scan
    transformers_mixer()    ... and its whole layer, the class Mamba2Mixer
    fla_chunked()           flash-linear-attention's plain scans in PyTorch, naive_chunk_simple_gla
    fla_recurrent()         ... and naive_recurrent_simple_gla

Each returns a function with the signature of mamba_chunk_scan_combined, so that the judge takes it:
`python -m pytest tests/test_kernel.py --kernel tests.peers:official`. A feature that a peer lacks
raises NotImplementedError; a package that is missing raises ImportError saying how to get it. The
stubs below are for tests only. The product imports mamba_ssm as its authors meant it.
"""
import contextlib
import functools
import importlib
import importlib.util
import os
import sys
import types
from importlib.metadata import version

import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    # Triton decides at decoration time whether a kernel is interpreted, and that includes the
    # functions of its own library. So this stands before anything that might import Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

HOW = "tests/requirements-peers.txt says how to install it"


@contextlib.contextmanager
def _without_init(package):
    """Make submodules importable without running the package's __init__, which wants compiled CUDA
    modules."""
    spec = importlib.util.find_spec(package) if package not in sys.modules else None
    if package not in sys.modules and spec is None:
        raise ImportError(f"{package} is not installed: {HOW}")
    if spec is None:  # really imported already: nothing to go around
        yield
        return
    stub = types.ModuleType(package)
    stub.__path__ = list(spec.submodule_search_locations)
    sys.modules[package] = stub
    try:
        yield
    finally:  # whoever asks for the package next gets the real one, or its error
        for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
            del sys.modules[name]


class _NoCuda:
    """torch, but for the two questions about the GPU that the kernels ask even when the tensors are
    on the CPU."""
    cuda = types.SimpleNamespace(
        device=lambda index: contextlib.nullcontext(),
        get_device_properties=lambda device: types.SimpleNamespace(multi_processor_count=2))

    def __getattr__(self, name):
        return getattr(torch, name)


def _one_config(module, tile):
    """Timing the candidate configurations needs a GPU. Take one, with tiles small enough that a
    chunk has several."""
    from triton.runtime.autotuner import Autotuner
    for kernel in vars(module).values():
        if isinstance(kernel, Autotuner):
            def excess(config):
                blocks = [v for k, v in config.kwargs.items() if k.startswith("BLOCK_SIZE")]
                return sum(abs(block - tile) for block in blocks)
            kernel.configs = [min(kernel.configs, key=excess)]


def _mend_interpreter():
    """Triton's interpreter (seen in 3.9.0) keeps bfloat16 as uint16. Its dot multiplies these as
    integers, and it cuts float32 to bfloat16 where a GPU rounds to the nearest. Neither is the
    kernels' doing, so it is put right here."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, *rest):
        a, b = (
            self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)
        )
        return dot(self, a, b, *rest)

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) == (tl.bfloat16, tl.float32):
            return TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(src.data).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
            return TensorHandle(
                np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16
            )
        return cast(self, src, dst_type)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl


@functools.cache
def official_module(tile=32):
    """mamba_ssm.ops.triton.ssd_combined; on a GPU as it is, else interpreted with one
    configuration."""
    if importlib.util.find_spec("triton") is None:
        raise ImportError(f"triton is not installed: {HOW}")
    if not torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] != "1":
        raise ImportError(
            "no GPU here, and TRITON_INTERPRET=1 is not set: the Triton kernels cannot run"
        )
    with _without_init("mamba_ssm"):
        combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
        loaded = [m for n, m in sys.modules.items() if n.startswith("mamba_ssm.ops.triton.")]
    if not torch.cuda.is_available():
        _mend_interpreter()
        for module in loaded:
            module.torch = _NoCuda()
            _one_config(module, tile)
    return combined


def official(*args, **kwargs):
    return official_module().mamba_chunk_scan_combined(*args, **kwargs)


@functools.cache
def _minimal_listing():
    official_module()  # the listing's module imports the Triton kernels at its top
    with _without_init("mamba_ssm"):
        return importlib.import_module("mamba_ssm.modules.ssd_minimal").ssd_minimal_discrete


def _lacks(peer, **features):
    named = [name for name, asked in features.items() if asked]
    if named:
        raise NotImplementedError(f"{peer} has no {', '.join(named)}")


def minimal(
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
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
):
    _lacks(
        "ssd_minimal",
        D=D is not None,
        z=z is not None,
        dt_bias=dt_bias is not None,
        seq_idx=seq_idx is not None,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit != (0.0, float("inf")),
        **{
            "half precision (it wants one dtype throughout)": x.dtype
            not in (torch.float32, torch.float64)
        },
    )
    l, heads = x.shape[1], x.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(heads, 2) for t in (B, C))                     # (b, l, h, n)
    # It refuses a length that is no multiple of the chunk; a token with dt = 0 changes nothing.
    fill = lambda t: F.pad(t, (0, 0) * (t.dim() - 2) + (0, -l % chunk_size))
    state = None if initial_states is None else initial_states[:, None]  # (b, 1, h, p, n)
    dt = dt.clamp(min=0)  # the listing is given v and a, and knows no steps
    y, final = _minimal_listing()(
        fill(x * dt[..., None]), fill(dt * A), fill(B), fill(C), chunk_size, state
    )
    return (y[:, :l], final) if return_final_states else y[:, :l]


@functools.cache
def _transformers_module():
    try:
        return importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    except ImportError as error:
        raise ImportError(f"transformers: {error}. {HOW}") from error


def transformers(
    x, dt, A, B, C, chunk_size, D=None, z=None, seq_idx=None, return_final_states=False, **kwargs
):
    """The plain scan. It returns float32 whatever comes in (its layer casts), so the cast is made
    here."""
    _lacks("transformers' scan", z=z is not None, seq_idx=seq_idx is not None)
    if D is not None and D.dim() == 2:
        raise NotImplementedError("transformers' scan has no D with a headdim")
    scan = _transformers_module().mamba2_chunk_scan
    scan = getattr(
        scan, "__wrapped__", scan
    )  # around the plain function stands a look for compiled kernels
    out = scan(x, dt, A, B, C, chunk_size, D=D, return_final_states=return_final_states, **kwargs)
    return (out[0].to(x.dtype), out[1]) if return_final_states else out.to(x.dtype)


def transformers_mixer(d_model, d_state, headdim, ngroups, expand=2, d_conv=4, chunk_size=16):
    """transformers' whole Mamba2 layer on the plain path."""
    module = _transformers_module()
    config = module.Mamba2Config(
        hidden_size=d_model,
        state_size=d_state,
        head_dim=headdim,
        n_groups=ngroups,
        expand=expand,
        conv_kernel=d_conv,
        num_heads=expand * d_model // headdim,
        chunk_size=chunk_size,
        num_hidden_layers=1,
    )
    return module.Mamba2Mixer(config, layer_idx=0)


@functools.cache
def fla_module():
    """fla.ops.simple_gla.naive, by its path: the packages around it import Triton kernels."""
    package = importlib.util.find_spec("fla")
    if package is None:
        raise ImportError(f"fla-core is not installed: {HOW}")
    path = os.path.join(package.submodule_search_locations[0], "ops", "simple_gla", "naive.py")
    spec = importlib.util.spec_from_file_location("fla_naive", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _simple_gla(scan, x, dt, A, B, C, initial_states, return_final_states, **kwargs):
    """Linear attention with q = C, k = B, v = dt x and log decay dt A; states are (n, p)."""
    heads = x.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(heads, 2) for t in (B, C))                     # (b, l, h, n)
    dt = dt.to(A.dtype).clamp(min=0)
    state = None if initial_states is None else initial_states.mT
    y, final = scan(
        C,
        B,
        x * dt[..., None],
        dt * A,
        scale=1.0,
        initial_state=state,
        output_final_state=return_final_states,
        **kwargs,
    )
    return (y.to(x.dtype), final.mT) if return_final_states else y.to(x.dtype)


def fla_chunked(
    x, dt, A, B, C, chunk_size, initial_states=None, return_final_states=False
):
    scan = fla_module().naive_chunk_simple_gla
    return _simple_gla(
        scan, x, dt, A, B, C, initial_states, return_final_states, chunk_size=chunk_size
    )


def fla_recurrent(
    x, dt, A, B, C, chunk_size, initial_states=None, return_final_states=False
):
    scan = fla_module().naive_recurrent_simple_gla
    return _simple_gla(scan, x, dt, A, B, C, initial_states, return_final_states)


def official_varlen(
    x, dt, A, B, C, chunk_size, cu_seqlens, initial_states=None, return_final_states=False, **kwargs
):
    """The official kernels on packed sequences: they return a state per sequence and take none."""
    _lacks(
        "mamba_chunk_scan_combined", **{"initial state per sequence": initial_states is not None}
    )
    lengths = cu_seqlens.diff()
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), lengths.cpu())[
        None
    ].to(x.device)
    out = official(x, dt, A, B, C, chunk_size, seq_idx=seq_idx, cu_seqlens=cu_seqlens,
                   return_varlen_states=return_final_states, **kwargs)
    return out


def official_step(*args, **kwargs):
    """selective_state_update, the official kernel for one token."""
    official_module()
    with _without_init("mamba_ssm"):
        module = importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
    if not torch.cuda.is_available():
        module.torch = _NoCuda()
    return module.selective_state_update(*args, **kwargs)


def niverel(x, dt, A, B, C, chunk_size, return_final_states=False, dt_softplus=False, **kwargs):
    """niverel-mamba's chunked form in PyTorch."""
    scan = importlib.import_module("niverel_mamba.torch_ops.ssd_chunked").ssd_chunked
    y, final = scan(x, dt, A, B, C, chunk_size=chunk_size, dt_softplus=dt_softplus, **kwargs)
    return (y, final) if return_final_states else y


def scan_lite(x, dt, A, B, C, chunk_size, D=None, initial_states=None, return_final_states=False):
    """mamba-scan-lite's chunked scan: it takes steps that are ready, and B and C for each head."""
    scan = importlib.import_module("mamba_scan_lite.patch").chunked_scan
    heads = x.shape[2] // B.shape[2]
    _lacks("mamba-scan-lite", **{"D with a headdim": D is not None and D.dim() == 2,
                                 "half precision": x.dtype not in (torch.float32, torch.float64)})
    state = x.new_zeros(*x[:, 0].shape, B.shape[3]) if initial_states is None else initial_states
    D = x.new_zeros(x.shape[2]) if D is None else D
    y, final = scan(
        state,
        dt.clamp(min=0),
        A,
        x,
        B.repeat_interleave(heads, 2),
        C.repeat_interleave(heads, 2),
        D[:, None],
        chunk_size,
    )
    return (y, final) if return_final_states else y


def jax(x, dt, A, B, C, chunk_size, dt_bias, D=None, z=None, initial_states=None, seq_idx=None,
        dt_limit=(0.0, float("inf")), return_final_states=False):
    """mamba2-jax's scan, forward only: softplus and bias are always on. Arrays go through NumPy."""
    jnp = importlib.import_module("jax.numpy")
    scan = importlib.import_module("mamba2_jax.modeling").ssd_forward
    _lacks(
        "mamba2-jax",
        z=z is not None,
        seq_idx=seq_idx is not None,
        **{
            "D with a headdim": D is not None and D.dim() == 2,
            "half precision here": x.dtype != torch.float32,
        },
    )
    array = lambda t: None if t is None else jnp.asarray(t.detach().numpy())
    B, C = (t.repeat_interleave(x.shape[2] // B.shape[2], 2) for t in (B, C))
    D = torch.zeros_like(A) if D is None else D
    state = None if initial_states is None else initial_states[:, None]
    y, final = scan(
        array(x),
        array(dt),
        array(A),
        array(B),
        array(C),
        chunk_size,
        array(D),
        array(dt_bias),
        *dt_limit,
        array(state),
        return_final_states,
    )
    back = lambda a: torch.tensor(a.__array__())
    return (back(y), back(final)) if return_final_states else back(y)


def versions():
    """{"mamba-ssm": "2.3.2.post1", ...}, of what is installed."""
    found = {}
    for name in ("torch", "triton", "mamba-ssm", "transformers", "fla-core"):
        with contextlib.suppress(Exception):
            found[name] = version(name)
    return found
