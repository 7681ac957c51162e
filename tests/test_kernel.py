"""The judge of Mamba2 kernels as a command: is this function the selective scan it claims to be?

    python -m pytest tests/test_kernel.py --kernel package.module:function [--signature varlen]
        [--device cuda] [--dtype float32,bfloat16] [--require all] [--case SPEC] ...

`--help` lists the options. Exit code 0: right; 1: wrong, or nothing was judged. Without --kernel
our own chunked form is judged. What is judged and how stands in kernel_judge.py, the manual in
docs/kernels.md.
"""
import pytest

from kernel_judge import chunked, judge

OPTIONS = {                                                     # of the command -> keyword of judge
    "--signature": "signature", "--device": "device", "--dtype": "dtypes", "--case": "cases",
    "--require": "require", "--tf32": "tf32", "--shape": "shape", "--always": "always",
    "--forward-only": "forward_only", "--compiles": "compiles", "--thorough": "thorough",
    "--allow-delegation": "allow_delegation", "--seed": "seed",
}


def test_kernel(request, record_property):
    given = {keyword: request.config.getoption(name) for name, keyword in OPTIONS.items()}
    kernel = request.config.getoption("--kernel")
    if not kernel:
        given["allow_delegation"] = True
    try:
        verdict = judge(kernel or chunked, name=kernel or "kernel_judge:chunked", **given)
    except ValueError as error:
        pytest.exit(f"ERROR: {error}", returncode=pytest.ExitCode.USAGE_ERROR)
    record_property("verdict", str(verdict))
    if not verdict.ok:
        pytest.fail(str(verdict), pytrace=False)
