"""The counter of operations against a count by hand, and the tables of the README against the files they come from."""
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lingen import Block, describe, preset

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("change", [dict(), dict(mixer="attention"), dict(tesa=False), dict(review=False), dict(ngroups=2, d_state=16)])
def test_counter_agrees_with_a_count_by_hand_and_sees_the_scan(change):
    c, n = preset("tiny", vocab_size=9, **change), 5
    shape, d = (4, 8, 8), c.d_model
    with torch.device("meta"):
        block = Block(c, layer=0)
        x, condition, text = torch.empty(1, *shape, d), torch.empty(1, d), torch.empty(1, n, d)
    with FlopCounterMode(display=False) as counter:
        block(x, condition, text, torch.ones(1, n, dtype=torch.bool, device="meta"))
    l = math.prod(shape)                                                # multiply-adds, part by part
    count = d * 6 * d                                                   # modulation
    count += 2 * l * d * d + n * d * 2 * d + 2 * l * n * d              # cross-attention: q and out, k and v, scores and sums
    count += 2 * l * d * 4 * d                                          # feed-forward
    if c.mixer == "attention":
        count += 4 * l * d * d + 2 * l * l * d
    else:
        if c.tesa:
            count += 4 * l * d * d + 2 * l * math.prod(c.window) * d
        if c.ma:
            review = math.prod(-(-s // p) for s, p in zip(shape, c.pool)) if c.review else 0
            length, inner, groups = l + 2 * review, d, c.ngroups * c.d_state
            padded = -(-length // c.chunk_size) * c.chunk_size
            count += length * d * (2 * inner + 2 * groups + inner // c.headdim) + length * inner * d        # in and out
            count += padded * (c.chunk_size * groups + c.chunk_size * inner)                                # C B^T, and M x
            count += 2 * padded * 2 * c.d_state * inner                 # per direction: into the state, and out of it
    assert counter.get_total_flops() == 2 * count


def test_described_parts_add_up():
    rows = {name.strip(): (parameters, products) for name, _, parameters, products in describe(preset("tiny", vocab_size=9), 16, 32, 32)}
    inside = ("MA-branch", "TE-branch", "cross-attention", "feed-forward", "modulation")
    for column in (0, 1):
        assert rows["block 0"][column] == sum(rows[name][column] for name in inside)


@pytest.mark.parametrize("script, args, says", [("speed.py", ["--help"], "peers"), ("speed.py", ["nonsense"], "there is no table"), ("cost.py", ["--help"], "figs. 1b")])
def test_scripts_teach(script, args, says):
    run = subprocess.run([sys.executable, ROOT / "benchmarks" / script, *args], capture_output=True, text=True)
    assert says in (run.stdout + run.stderr).replace("\n", " ") and "Traceback" not in run.stderr
