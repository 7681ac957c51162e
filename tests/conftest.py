"""Options of the kernel judge (tests/test_kernel.py), its table at the end of the run, and the root on sys.path."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Without a GPU the peers' Triton kernels are interpreted. Triton asks once, when it is imported, and parts of torch
    # import it: so this stands before any test.
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


STARTED = []


def popen(*args, **kwargs):
    """subprocess.Popen for a process that its test ends; where the test fails before, `no_process_outlives_its_test` does."""
    STARTED.append(subprocess.Popen(*args, **kwargs))
    return STARTED[-1]


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()                                              # no harm to one that has ended and been waited for
        process.wait()


def pytest_addoption(parser):
    group = parser.getgroup("kernel", "the judge of Mamba2 kernels, tests/test_kernel.py")
    group.addoption("--kernel", default="tests.test_kernel:chunked", metavar="MODULE:FUNCTION",
                    help="function with the signature of mamba_chunk_scan_combined; default: our own ssd_chunked")
    group.addoption("--device", default="cpu", help="where the kernel runs: cpu, cuda, mps, ...")
    group.addoption("--dtype", default="float64,float32,bfloat16,float16", help="dtypes to judge, comma-separated")
    group.addoption("--tf32", action="store_true", help="admit products in tf32 for float32 inputs")
    group.addoption("--require", default="", metavar="FEATURES",
                    help="features (or dtypes) that must be supported, comma-separated, or all")
    group.addoption("--case", default="", metavar="FEATURE[:l=17,...]", help="judge this one case, as a verdict prints it")


def pytest_terminal_summary(terminalreporter, config):
    # The rows travel on the reports, so that they also arrive from the workers of pytest-xdist.
    rows = [row for reports in terminalreporter.stats.values() for report in reports
            for key, row in getattr(report, "user_properties", ()) if key == "verdict" and report.when == "call"]
    if rows:
        from test_kernel import table
        terminalreporter.section(f"verdict on {config.getoption('kernel')}")
        for line in table(rows):
            terminalreporter.write_line(line)


def pytest_configure(config):
    """A shell that starts the tests in the background has them ignore Ctrl-C; the tests of Ctrl-C need it heard."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
