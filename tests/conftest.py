"""Options of the kernel judge (tests/test_kernel.py), its verdict, and the root on sys.path."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Without a GPU the peers' Triton kernels are interpreted. Triton asks when it is imported,
    # and parts of torch import it: so this stands before any test.
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


STARTED = []


def popen(*args, **kwargs):
    """subprocess.Popen for a process that its test ends, or else `no_process_outlives_its_test`."""
    STARTED.append(subprocess.Popen(*args, **kwargs))
    return STARTED[-1]


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()  # no harm to one that has ended
        process.wait()


def pytest_addoption(parser):
    group = parser.getgroup("kernel", "the judge of Mamba2 kernels, tests/test_kernel.py")
    add = group.addoption
    add("--kernel", default="", metavar="MODULE:FUNCTION",
        help="the kernel; default: our own ssd_chunked")
    add("--signature", default="scan", help="scan, varlen, step, bidirectional or layer")
    add("--device", default="cpu", help="where the kernel runs: cpu, cuda, mps, ...")
    add("--dtype", default="float64,float32,bfloat16,float16",
        help="dtypes to judge, comma-separated")
    add("--tf32", action="store_true", help="admit products in tf32 for float32 inputs")
    add("--require", default="", metavar="FEATURES",
        help="features (or dtypes) that must be supported, comma-separated, or all")
    add("--case", action="append", default=[], metavar="FEATURE[:l=17,...]",
        help="judge this one case, as a verdict prints it; may be given several times")
    add("--shape", default="", metavar="headdim=64,d_state=128,chunk=256",
        help="sizes that the kernel is restricted to")
    add("--always", default="", metavar="dt_softplus,dt_bias",
        help="options that the kernel always applies")
    add("--forward-only", action="store_true", help="the kernel has no backward pass")
    add("--compiles", action="store_true", help="judge the kernel under torch.compile as well")
    add("--allow-delegation", action="store_true",
        help="the kernel may hand the call on to a reference")
    add("--thorough", action="store_true",
        help="larger models and longer rows: minutes, not one minute")
    add("--seed", type=int, default=None, help="of the fresh values, as a verdict prints it")


def pytest_terminal_summary(terminalreporter):
    # The verdict travels on the report, so that it also arrives from a worker of pytest-xdist.
    for reports in list(terminalreporter.stats.values()):
        for report in reports:
            for key, text in getattr(report, "user_properties", ()):
                if key == "verdict" and report.when == "call" and report.passed:
                    terminalreporter.section("verdict")
                    terminalreporter.write_line(text)


def pytest_configure(config):
    """A shell that starts the tests in the background has them ignore Ctrl-C; hear it again."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
