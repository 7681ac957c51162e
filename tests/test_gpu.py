"""Everything on fake GPU tensors: devices, dtypes and shapes are checked for real, numbers are not.

PyTorch's CPU build knows CUDA tensors, but neither a guard for their device nor a backward pass. So
forward passes run on fake "cuda", with a guard that does nothing, which needs a C++ compiler.
Backward passes run on "fakegpu", a device that Python can register; it has no autocast. Neither can
be undone, so a process of its own runs all cases.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import lingen
import mamba2_ref
import sample
import train_tiny
from tesa import TemporalSwinAttention

ROOT = Path(__file__).resolve().parent.parent
FORMS = ("ssd_recurrent", "ssd_quadratic", "ssd_chunked_plain", "ssd_chunked", "ssd_bidirectional")
VARIANTS = [
    dict(), dict(mixer="attention"), dict(ma=False), dict(tesa=False), dict(review=False),
    dict(scan="zigzag"), dict(predicts="velocity"), dict(window=(3, 4, 5)),
]  # fmt: skip
SAMPLERS = [dict(slide=1), dict(renoise=1.0), dict(guidance=2.0), dict(schedule="linear-quadratic")]
COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="the guard needs a C++ compiler")
CASES = {}
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


def add(function, device, **options):
    CASES[f"{function.__name__} {device} {options}"] = (function, device, options)


def randn(device, *shape, **options):
    return torch.randn(*shape, device=device, requires_grad=device == "fakegpu", **options)


def backward(out, inputs=()):
    """A loss of `out`, and its gradients, where the device has them."""
    if out.requires_grad:
        out.float().square().mean().backward()
        for p in inputs:
            assert p.grad.device == p.device and p.grad.dtype == p.dtype, "a gradient has moved"


def on(device, *tensors):
    for t in tensors:
        assert t.device.type == device, f"a result is on {t.device}"


def scan(device, name, dtype):
    d, b, l, h, p, n = torch.float32, 2, 37, 4, 8, 16
    inputs = [randn(device, b, l, h, p), randn(device, b, l, h), randn(device, h),
              randn(device, b, l, 2, n), randn(device, b, l, 2, n)]  # fmt: skip
    options = dict(D=randn(device, h), z=randn(device, b, l, h, p), dt_bias=randn(device, h))
    with torch.autocast(device, dtype, enabled=dtype is not None):
        form = getattr(mamba2_ref, name)
        if name == "ssd_bidirectional":
            out = form(*inputs, chunk_size=8, dt_softplus=True, **options)
        else:
            options["initial_states"] = randn(device, b, h, p, n)
            options["seq_idx"] = torch.zeros(b, l, dtype=torch.int32, device=device)
            options.update(chunk_size=8, dt_softplus=True, return_final_states=True)
            out, state = form(*inputs, **options)
            on(device, state)
            assert state.dtype == d and state.shape == (b, h, p, n)
    on(device, out)
    assert out.shape == (b, l, h, p)
    backward(out, inputs)


def tesa(device, grid, shift, dtype):
    with torch.device(device):
        layer = TemporalSwinAttention(16, 2, (4, 3, 3), shift)
    with torch.autocast(device, dtype, enabled=dtype is not None):
        out = layer(randn(device, 2, *grid, 16))
    on(device, out)
    backward(out, layer.parameters())


def new_model(device, name="tiny", own=torch.float32, **changes):
    torch.set_default_dtype(own)
    with torch.device(device):
        model = lingen.LinGen(lingen.preset(name, backend="torch", depth=2, **changes))
    torch.set_default_dtype(torch.float32)
    return model


def denoiser(device, name="tiny", dtype=None, own=torch.float32, **changes):
    model = new_model(device, name, own, **changes)
    side, frames, c = (24, 16, 3) if name == "tiny" else (16, 4, 16)
    clip, t = randn(device, 1, c, frames, side, side, dtype=own), torch.ones(1, device=device)
    text, mask = torch.ones(1, 5, dtype=torch.int64, device=device), None
    if model.config.text_dim:
        text = randn(device, 1, 5, model.config.text_dim, dtype=own)
        mask = torch.ones(1, 5, dtype=torch.bool, device=device)
    with torch.autocast(device, dtype, enabled=dtype is not None):
        out = model(clip, t, text, mask)
        still = model(clip[:, :, :1], t, text, mask)
    on(device, out, still)
    assert out.shape == clip.shape and still.shape[2] == 1
    backward(out)


def sampler(device, name="tiny", own=torch.float32, **settings):
    model = new_model(device, name, own)
    ts = SimpleNamespace(tolist=lambda: [0.0, 0.5, 1.0])  # fake times have no values
    sample.times = lambda steps, schedule, shift: ts
    text = torch.ones(2, 5, dtype=torch.int64)
    if model.config.text_dim:
        text = torch.randn(2, 5, model.config.text_dim, dtype=own)
    clip = sample.sample(model, text, (4, 8, 8), steps=2, **settings)
    on(device, clip)
    assert clip.dtype == torch.float32 and clip.shape == (2, model.config.channels, 4, 8, 8)


def training_step(device, stage):
    with torch.device(device):
        run = train_tiny.Run(lingen.preset("tiny", backend="torch"), dict(seed=0, rate=1e-3), None)
    clips = torch.randn(4, 3, train_tiny.STAGES[stage].frames, 24, 24, device=device)
    t, text = torch.rand(4, device=device), torch.ones(4, 5, dtype=torch.int64, device=device)
    loss = train_tiny.flow_matching_loss(run.wrapped, clips, text, t, torch.randn_like(clips))
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    on(device, loss, norm, *(p.grad for p in run.model.parameters()))
    for optimizer in run.optimizers:
        optimizer.step()


for device, dtype in (("fakegpu", None), ("cuda", None), ("cuda", torch.bfloat16)):
    for name in FORMS:
        add(scan, device, name=name, dtype=dtype)
    for grid, shift in (((4, 6, 6), (0, 0, 0)), ((8, 6, 6), (2, 1, 1)), ((5, 7, 4), (2, 1, 1))):
        add(tesa, device, grid=grid, shift=shift, dtype=dtype)
    for changes in (*VARIANTS, dict(name="small"), dict(name="4b")):
        add(denoiser, device, dtype=dtype, **changes)
for stage in range(len(train_tiny.STAGES)):
    add(training_step, "fakegpu", stage=stage)
for own in (torch.bfloat16, torch.half):
    add(denoiser, "cuda", own=own)
    add(sampler, "cuda", own=own, name="small")
for settings in SAMPLERS:
    add(sampler, "cuda", **settings)


class Launches(TorchDispatchMode):
    """Counts the operations that are no views: on a GPU each is at least one launch."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        view = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        name = str(function)
        no_work = any(word in name for word in ("prim", "view", "empty", "promote"))
        self.count += not (view or no_work)
        return function(*args, **(kwargs or {}))


def launches(frames, **changes):
    """Launches of one forward pass of the tiny preset on a GPU."""
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
        model = lingen.LinGen(lingen.preset("tiny", backend="torch", **changes))
        clip, text = torch.randn(1, 3, frames, 24, 24), torch.ones(1, 5, dtype=torch.int64)
        with Launches() as launched:
            model(clip, torch.ones(1), text)
    return launched.count


def main(guard):
    """Run all cases; print a JSON dict from their names to what went wrong."""
    torch.ops.load_library(guard)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    _setup_privateuseone_for_python_backend("fakegpu")
    torch.fakegpu.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.half]
    torch.cuda.is_bf16_supported = lambda: True
    torch.Tensor.isfinite = lambda self: SimpleNamespace(all=lambda: True)
    torch.nn.Module.to = lambda self, device: self  # fake parameters cannot be moved
    results = {}
    for name, (function, device, options) in CASES.items():
        try:
            with FakeTensorMode(), torch.set_grad_enabled(device == "fakegpu"):
                function(device, **options)
            results[name] = ""
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    frames = {str(n): launches(n) for n in (16, 64, 256, 1024)}
    print(json.dumps([results, frames, launches(16, mixer="attention")]))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder, torch_folder = tmp_path_factory.mktemp("guard"), Path(torch.__file__).parent
    (folder / "guard.cpp").write_text(GUARD)
    command = ["g++", "-shared", "-fPIC", "-std=c++17", "guard.cpp", "-o", "guard.so"]
    command += [f"-I{torch_folder}/include", f"-L{torch_folder}/lib", "-lc10"]
    subprocess.run(command, cwd=folder, check=True)
    command = [sys.executable, __file__, folder / "guard.so"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@COMPILER
@pytest.mark.parametrize("name", CASES)
def test_devices_dtypes_and_shapes_fit_on_a_fake_gpu(name, results):
    assert not results[0][name], results[0][name]


@COMPILER
def test_launches_grow_with_the_logarithm_of_the_length(results):
    counts, dit = list(results[1].values()), results[2]
    growth = [b - a for a, b in zip(counts, counts[1:])]
    assert max(growth) == min(growth) <= 64, f"{counts}: each is for four times the frames"
    assert counts[0] < 2.2 * dit, f"{counts[0]} at 16 frames, the DiT {dit}"


if __name__ == "__main__":
    main(sys.argv[1])
