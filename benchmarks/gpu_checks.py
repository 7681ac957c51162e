"""Parts of gpu.py: are scan, TESA, denoiser and sampler right on this device?

`tests` holds them against the CPU's float64; `judge` and `judge_official` let the kernel judge look
at our scan and at the official kernels. Each part takes (add, device, tiny); add writes a row.
"""

import functools
import os
import sys
from pathlib import Path

import torch

import mamba2_ref
import sample as sampler
from benchmarks import ablations, common
from lingen import LinGen, preset
from mamba2_ref import ssd_bidirectional, ssd_chunked, ssd_recurrent
from tesa import TemporalSwinAttention

ROOT = Path(__file__).resolve().parent.parent
# How results are computed, and the error that is allowed: RMS over RMS, against the CPU's float64.
PRECISIONS = {
    "float64": (torch.float64, "highest", 1e-5),
    "float32": (torch.float32, "highest", 1e-4),
    "tf32": (torch.float32, "high", 2e-2),
    "bfloat16": (torch.bfloat16, "high", 5e-2),
}


def to(parts, device, dtype):
    return [p.to(device, dtype) if p.is_floating_point() else p.to(device) for p in parts]


def scan_results(form, length, device, dtype):
    """The output of a scan with all options, and its gradients."""
    generator = torch.Generator().manual_seed(0)
    b, l, h, p, g, n = 2, length, 4, 16, 2, 32
    shapes = [(b, l, h, p), (b, l, h), (h,), (b, l, g, n), (b, l, g, n), (h,), (b, l, h, p), (h,)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    inputs[2] = -inputs[2].exp()  # A
    x, dt, A, B, C, D, z, dt_bias = leaves = [t.requires_grad_() for t in to(inputs, device, dtype)]
    y = form(x, dt, A, B, C, chunk_size=32, D=D, z=z, dt_bias=dt_bias, dt_softplus=True)
    return [y, *torch.autograd.grad(y.square().mean(), leaves)]


def module_results(make, inputs, device, dtype):
    """The output of a module, and the gradients of its parameters in one row."""
    torch.manual_seed(0)
    module = make()
    for p in module.parameters():
        if not p.any():  # gates that begin at 0 would hide what they close
            torch.nn.init.normal_(p, std=0.02)
    module.to(device, dtype)
    out = module(*to(inputs, device, dtype))
    grads = torch.autograd.grad(out.square().mean(), list(module.parameters()))
    return [out, torch.cat([grad.flatten() for grad in grads])]


def sampler_results(device, dtype):
    model, checkpoint = sampler.load_model(common.SHIPPED, device, backend="torch")
    text = sampler.encode(["a red circle moving right"], checkpoint["vocabulary"])
    return [sampler.sample(model.to(dtype), text, (16, 24, 24), steps=4, renoise=1.0, slide=1)]


def check(add, name, run, device, truth=None, precisions=("float64", "float32", "tf32")):
    """Compare run(device, dtype), a list of tensors, with the truth on the CPU in float64."""
    wants = (truth or run)("cpu", torch.float64)
    for precision in precisions:
        dtype, products, limit = PRECISIONS[precision]
        torch.set_float32_matmul_precision(products)
        try:
            misses = [(got.cpu().double() - want).norm() / want.norm()
                      for got, want in zip(run(device, dtype), wants)]  # fmt: skip
            error = torch.stack(misses).max().item()  # also where it is not a number
            row = dict(error=f"{error:.1e}", verdict="right" if error <= limit else "WRONG")
        except Exception as error:
            row = dict(error=None, verdict=f"WRONG: {type(error).__name__}: {error:.200}")
        add(check=name, precision=precision, limit=limit, **row)


def tests(add, device, tiny):
    """Scan, TESA, denoiser, sampler, training on the device, held against float64 on the CPU."""
    verdicts = []

    def add_verdict(**row):
        verdicts.append(row["verdict"])
        add(**row)

    short = 20 if tiny else 200
    for name in ("ssd_recurrent", "ssd_quadratic", "ssd_chunked_plain", "ssd_chunked"):
        run = functools.partial(scan_results, getattr(mamba2_ref, name), short)
        truth = functools.partial(scan_results, ssd_recurrent, short)
        check(add_verdict, name, run, device, truth)
    slow = functools.partial(ssd_bidirectional, scan=ssd_recurrent)
    run, truth = (functools.partial(scan_results, f, short) for f in (ssd_bidirectional, slow))
    check(add_verdict, "ssd_bidirectional", run, device, truth)
    run = functools.partial(scan_results, ssd_chunked, 500 if tiny else 50_000)
    check(add_verdict, "ssd_chunked, long", run, device)
    for shift in ((0, 0, 0), (2, 1, 1)):
        make = functools.partial(TemporalSwinAttention, 32, 2, (4, 3, 3), shift)
        for grid in ((8, 6, 6), (5, 7, 4)):
            inputs = [torch.randn(2, *grid, 32, dtype=torch.float64)]
            run = functools.partial(module_results, make, inputs)
            check(add_verdict, f"TESA {grid} {shift}", run, device)
    variants = ablations.VARIANTS | {"velocity": dict(predicts="velocity")}
    for name in ("default",) if tiny else variants:
        config = preset("tiny", backend="torch", **variants[name])
        inputs = common.model_inputs(config, (16, 24, 24))
        run = functools.partial(module_results, functools.partial(LinGen, config), inputs)
        check(add_verdict, f"denoiser, {name}", run, device, precisions=PRECISIONS)
    check(add_verdict, "sampler", sampler_results, device)
    if not tiny:
        runs = [ablations.new_run(dict(backend="torch"), 3, 0, device) for _ in range(2)]
        losses = [[run.advance() for _ in range(3)] for run in runs]
        same = "yes" if losses[0] == losses[1] else "no"
        add(check="training repeats to the same bits", precision=None, limit=None, error=None,
            verdict=same)  # fmt: skip
    wrong = sum(verdict.startswith("WRONG") for verdict in verdicts)
    if wrong:
        sys.exit(f"{wrong} of {len(verdicts)} checks are wrong")


def suite(add, device, tiny):
    """The lessons' own tests, on this machine's PyTorch; they run on the CPU."""
    import pytest

    names = ("scan",) if tiny else ("scan", "tesa", "mamba2_ref", "lingen", "sample")
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in names]
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *files]))


def judge(add, device, tiny, kernel="kernel_judge:chunked", cases=None):
    """The kernel judge (docs/kernels.md): float32 with tf32, bfloat16."""
    import kernel_judge

    def progress(outcome):
        dtype = str(outcome.dtype).removeprefix("torch.")
        add(case=outcome.spec, dtype=dtype, status=outcome.status, where=outcome.where,
            worst=f"{outcome.worst:.2g}", why=outcome.why.strip()[:200])  # fmt: skip

    torch.set_float32_matmul_precision("high")
    verdict = kernel_judge.judge(kernel, device=device, dtypes="float32,bfloat16", tf32=True,
                                 cases=["plain"] if tiny else cases, progress=progress,
                                 allow_delegation=True)  # fmt: skip
    print(verdict)
    if not verdict.ok:
        sys.exit(f"the judge refuses {kernel}")


def judge_official(add, device, tiny):
    """The same for the official kernels. Only telling cases: each size compiles all kernels."""
    from tests import peers

    os.environ["MAMBA_DETERMINISTIC"] = "1"  # while it is imported: one configuration, no tuning
    peers.official_module()
    del os.environ["MAMBA_DETERMINISTIC"]
    cases = ("headdim-64-d_state-128", "mamba2-130m", "plain", "all", "A-huge", "A-dt-mixed",
             "seq_idx-all", "dt_softplus-extreme", "layout-projection", "D-headdim")  # fmt: skip
    judge(add, device, tiny, "tests.peers:official", cases)
