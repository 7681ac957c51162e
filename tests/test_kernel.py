"""The judge of Mamba2 kernels as a command: is this function the selective scan that it claims to be?

    python -m pytest tests/test_kernel.py --kernel package.module:function [--signature varlen] [--device cuda]
                                          [--dtype float32,bfloat16] [--require all] [--case SPEC] ...

`--help` lists the options. Exit code 0: right, 1: wrong, or nothing was judged. Without --kernel our own chunked
form is judged. What is judged and how stands in kernel_judge.py, the manual in docs/kernels.md.
"""
import pytest

from kernel_judge import chunked, judge


def test_kernel(request, record_property):
    option = request.config.getoption
    try:
        verdict = judge(
            option("--kernel") or chunked, option("--signature"), option("--device"), option("--dtype"),
            option("--case"), option("--require"), option("--tf32"), option("--shape"), option("--always"),
            option("--forward-only"), option("--compiles"), thorough=option("--thorough"), seed=option("--seed"),
            allow_delegation=option("--allow-delegation") or not option("--kernel"),
            name=option("--kernel") or "kernel_judge:chunked")
    except ValueError as error:
        pytest.exit(f"ERROR: {error}", returncode=pytest.ExitCode.USAGE_ERROR)
    record_property("verdict", str(verdict))
    if not verdict.ok:
        pytest.fail(str(verdict), pytrace=False)
