"""The judge of Mamba2 kernels: is this function the selective scan that it claims to be?

    from kernel_judge import judge
    verdict = judge(kernel)                  # signature of mamba_ssm's mamba_chunk_scan_combined
    print(verdict)                           # what was judged, what is wrong and where
    assert verdict.ok

The command is `python -m pytest tests/test_kernel.py --kernel package.module:function`; each of its
options is a keyword of `judge`. docs/kernels.md is the manual.

Read in this order: the cases, one line per feature; `chunked_with_errors`, where the tolerances
come from; the signatures; the ways of calling; `judge_case`; `explain`; `judge`.

The tolerance of every tensor is measured, not guessed. The truth is the recurrence in float64 on
the very inputs that the kernel got. Beside it the chunked algorithm runs in float64 with an error
put in wherever a careful kernel of that dtype rounds: operands of products in the dtype, sums and
states in float32, results in the dtype. What a few such draws miss the truth by is what a right
kernel may miss it by, times SLACK. Since the errors go in at the summands, a result that is small
because its summands cancel (dA, most of all) gets the tolerance of its summands. A kernel that
*sums* in half precision loses much more than one that rounds operands, and fails.
"""
import builtins
import contextlib
import dataclasses
import difflib
import functools
import gc
import importlib
import inspect
import io
import math
import os
import re
import sys
import sysconfig
import threading
import time
import traceback
import types
import warnings
import zlib
from collections import OrderedDict
from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mamba2_ref

SLACK = 4                        # a kernel may be this much worse than the careful one
DRAWS = 8
INF = math.inf
DTYPES = {str(d).removeprefix("torch."): d
          for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
NAME_OF = {d: name for name, d in DTYPES.items()}


# --- The cases: one line per feature --------------------------------------------------------------
# Sizes b l h p g n and the chunk q; steps dt and decay rates |A| log-uniform in a range; options by
# name. 4 heads in 2 groups and sizes that are no powers of two unless a case says otherwise.

BASE = dict(b=1, l=21, h=4, p=5, g=2, n=7, q=8, dt=(0.02, 0.3), A=(0.3, 3.0), mean=0.0,
            scale=1.0, dy=1.0, opts="final")

ALL = "D z dt_bias dt_softplus initial_states final"
LENGTHS = {
    "plain": dict(b=2, l=37, q=16, opts=""),
    "length-1": dict(l=1),
    "length-2": dict(l=2),
    "chunk-minus-1": dict(l=15, q=16),
    "chunk": dict(l=16, q=16),
    "chunk-plus-1": dict(l=17, q=16),
    "two-chunks-minus-1": dict(l=31, q=16),
    "two-chunks": dict(l=32, q=16),
    "many-chunks": dict(l=131, h=2, g=1, A=(0.03, 1.0)),
    "large-tiles": dict(l=100, h=2, g=1, p=40, n=36, q=64),
    "all-ones": dict(h=1, g=1, p=1, n=1),
    "odd-sizes": dict(b=3, h=6, p=3, n=11),
    "three-groups": dict(h=9, g=3, l=11),
    "one-group": dict(h=3, g=1),
    "group-per-head": dict(h=3, g=3),
}
# Sizes of real models, each large along few axes, and one model as it is.
SIZES = {
    "batch-9": dict(b=9, l=19),
    "batch-33": dict(b=33, l=9, h=2, g=1, p=3, n=4, q=4, opts=ALL),
    "heads-24": dict(b=2, h=24, g=1, p=3, n=4),
    "heads-80": dict(h=80, g=1, p=3, n=4),
    "heads-128-groups-8": dict(h=128, g=8, p=3, n=4, opts=ALL),
    "chunk-128": dict(l=300, q=128, h=2, g=1, A=(0.01, 1.0), opts="initial_states final"),
    "chunk-256": dict(l=600, q=256, h=2, g=1, A=(0.01, 1.0), opts="initial_states final"),
    "tokens-1500": dict(l=1500, q=16, h=2, g=1, p=4, A=(0.01, 1.0), opts="initial_states final"),
    "tokens-2100": dict(l=2100, q=256, h=2, g=1, p=3, n=4, A=(0.01, 1.0),
                        opts="seq_idx=700,1500 D z final"),
    "headdim-d_state-64": dict(l=70, q=32, h=4, p=64, n=64, opts="initial_states final"),
    "headdim-64-d_state-128": dict(
        b=2, l=70, q=64, h=2, g=1, p=64, n=128, opts="initial_states final"
    ),
    "headdim-128": dict(l=70, q=64, h=2, g=1, p=128, n=64, opts="D-headdim z initial_states final"),
    "headdim-d_state-128": dict(l=40, q=16, h=2, g=1, p=128, n=128, opts="initial_states final"),
    "d_state-256": dict(l=70, q=64, h=2, g=1, p=64, n=256, opts="initial_states final"),
    "past-tiles": dict(l=67, q=65, h=2, g=1, p=65, n=129, opts="initial_states final"),
    "mamba2-130m": dict(
        l=270,
        q=256,
        h=24,
        g=1,
        p=64,
        n=128,
        A=(0.01, 1.0),
        opts="D dt_bias dt_softplus initial_states final",
    ),
}
OPTIONS = {
    "D": dict(opts="D"),
    "D-headdim": dict(opts="D-headdim"),
    "z": dict(opts="z"),
    "z+D": dict(opts="z D"),
    "dt_bias": dict(opts="dt_bias"),
    "dt_softplus": dict(opts="dt_softplus"),
    "dt_softplus-wide": dict(opts="dt_softplus dt_bias", dt=(0.003, 30.0), A=(0.03, 0.3)),
    "dt_limit": dict(opts="dt_limit"),
    "initial_states": dict(opts="initial_states"),
    "final_states": dict(opts="final"),
    "final_states-only": dict(opts="final dy=zero"),
    "both-states": dict(opts="initial_states final"),
    "all": dict(b=2, opts="D-headdim z dt_bias dt_softplus dt_limit initial_states final"),
}
# Packed sequences: seq_idx= says where the borders lie; each further row has its own a token later.
PACKED = {
    "seq_idx-at-chunk": dict(b=2, opts="seq_idx=8"),
    "seq_idx-before-chunk": dict(opts="seq_idx=7,15"),
    "seq_idx-after-chunk": dict(opts="seq_idx=9,17"),
    "seq_idx-short": dict(l=29, opts="seq_idx=1,2,5,25"),
    "seq_idx-all": dict(b=2, opts="seq_idx=3,8,19 D z dt_bias dt_softplus initial_states final"),
    "seq_idx-falls": dict(b=2, opts="seq_idx=3,8,19 numbers=fall final"),
    "seq_idx-starts-above-0": dict(b=2, opts="seq_idx=3,8,19 numbers=above-0 final"),
    "seq_idx-large-numbers": dict(b=2, opts="seq_idx=3,8,19 numbers=large final"),
    "seq_idx-one-token": dict(b=2, opts="seq_idx=every-1 final"),
    "seq_idx-many": dict(l=450, h=2, g=1, p=3, n=4, q=64, opts="seq_idx=many final"),
    "seq_idx-batch-9": dict(b=9, opts="seq_idx=5,12 final"),
    "seq_idx-padding": dict(b=2, opts="seq_idx=3,8,15 numbers=padding"),
}
# Steps and rates from tiny to such that exp underflows; sums that lose their digits in half
# precision.
VALUES = {
    "dt-tiny": dict(dt=(1e-6, 1e-4)),
    "dt-negative": dict(opts="dt-negative final"),
    "dt-negative-dt_bias": dict(opts="dt-negative dt_bias D"),
    "dt-zero": dict(opts="dt-zero initial_states final"),
    "dt_limit-low": dict(opts="dt_limit=low final"),
    "dt_limit-high": dict(opts="dt_limit=high final"),
    "dt_limit-negative": dict(opts="dt-negative dt_limit final"),
    "dt_limit-softplus": dict(dt=(0.001, 3.0), opts="dt_softplus dt_bias dt_limit final"),
    "dt_softplus-extreme": dict(dt=(1e-6, 150.0), A=(1e-4, 1e-3), opts="dt_softplus final"),
    "A-tiny": dict(A=(1e-7, 1e-4), opts="initial_states final"),
    "A-huge": dict(A=(50.0, 5000.0), dt=(0.1, 1.0), opts="initial_states final"),
    "A-dt-mixed": dict(A=(1e-3, 1e3), dt=(1e-3, 10.0), opts="initial_states final"),
    "seq_idx-A-huge": dict(A=(50.0, 5000.0), dt=(0.1, 1.0), opts="seq_idx=3,8 final"),
    "products-large": dict(n=64, dt=(1e-3, 1e-2), scale=36.0, dy=0.01),
    "running-sum": dict(l=150, h=2, g=1, q=128, dt=(0.15, 0.6), A=(0.5, 1.5)),
    "long-memory": dict(l=300, h=1, g=1, q=4, dt=(0.05, 0.1), A=(0.01, 0.03), mean=1.0),
    "long-chunk": dict(l=512, h=1, g=1, p=3, n=5, q=512, dt=(0.05, 0.1), A=(0.01, 0.03), mean=1.0),
}
LAYOUTS = {
    "views": dict(b=2, opts="layout=odd z initial_states final seq_idx=10"),
    "views-D": dict(opts="layout=odd D"),
    "layout-projection": dict(
        b=2, opts="layout=projection z D dt_bias dt_softplus initial_states final"
    ),
    "layout-channel-first": dict(b=2, opts="layout=channel-first z D initial_states final"),
    "layout-offset": dict(b=2, opts="layout=offset z dt_bias initial_states final"),
    "layout-offset-packed": dict(b=2, opts="layout=offset seq_idx=10 final"),
    "layout-expanded": dict(
        b=3, opts="layout=expanded seq_idx=10 z initial_states final"
    ),
    "layout-expanded-heads": dict(b=2, opts="layout=expanded-heads D dt_bias final"),
    "dy-expanded": dict(b=2, opts="dy=expanded final"),
    "dy-channel-first": dict(b=2, opts="dy=channel-first z D final"),
    "dy-odd": dict(b=2, opts="dy=odd z final"),
}
CALLS = {
    "no_grad": dict(b=2, opts=f"call=no_grad {ALL}"),
    "no_grad-plain": dict(b=2, opts="call=no_grad final"),
    "no_grad-packed": dict(b=2, opts="call=no_grad seq_idx=3,8 final"),
    "inference_mode": dict(b=2, opts=f"call=inference_mode {ALL}"),
    "inference_mode-plain": dict(b=2, opts="call=inference_mode final"),
    "one-input-needs-gradient": dict(b=2, opts=f"call=one-gradient {ALL}"),
    "one-plain-input-needs-gradient": dict(b=2, opts="call=one-gradient final"),
    "final-unused": dict(b=2, opts=f"call=final-unused {ALL}"),
    "final-used-alone": dict(b=2, opts=f"call=final-alone {ALL}"),
    "backward-twice": dict(b=2, opts=f"call=backward-twice {ALL}"),
    "checkpoint": dict(b=2, opts=f"call=checkpoint {ALL}"),
    "autocast": dict(b=2, opts=f"call=autocast {ALL}"),
    "autocast-plain": dict(b=2, opts="call=autocast"),
    "compile": dict(b=2, opts="call=compile"),
    "compile-all": dict(b=2, opts=f"call=compile {ALL}"),
}
STATE = {
    "repeats": dict(b=2, opts="call=repeats D z initial_states final"),
    "second-call": dict(b=2, opts=f"call=second-call {ALL}"),
    "fresh-values": dict(b=2, opts="call=fresh-values initial_states final"),
    "fresh-values-all": dict(b=2, opts=f"call=fresh-values {ALL}"),
    "interleaved": dict(b=2, opts=f"call=interleaved {ALL}"),
    "resized": dict(b=2, opts="call=resized final"),
    "resized-all": dict(b=2, opts=f"call=resized {ALL}"),
    "accumulate": dict(b=2, opts=f"call=accumulate {ALL}"),
}
# Only with --thorough: real models as they are, and long.
THOROUGH = {
    "tokens-5000": dict(
        l=5000, q=256, h=2, g=1, p=3, n=4, A=(0.003, 0.3), opts="initial_states final"
    ),
    "mamba2-2.7b": dict(l=150, q=256, h=80, g=1, p=64, n=128, A=(0.01, 1.0), opts=ALL),
    "codestral": dict(
        l=140,
        q=128,
        h=128,
        g=8,
        p=64,
        n=128,
        A=(0.01, 1.0),
        opts="D dt_bias dt_softplus initial_states final",
    ),
    "falcon-h1": dict(
        l=270, q=256, h=24, g=1, p=64, n=256, A=(0.01, 1.0), opts="D dt_bias dt_softplus final"
    ),
    "zamba2": dict(
        b=2,
        l=530,
        q=256,
        h=16,
        g=2,
        p=64,
        n=64,
        A=(0.01, 1.0),
        opts="D dt_bias dt_softplus initial_states final layout=projection",
    ),
    "batch-70": dict(b=70, l=9, h=2, g=1, p=3, n=4, q=4),
    "headdim-256": dict(l=40, q=32, h=2, g=1, p=256, n=32, opts="initial_states final"),
}
SCAN = {
    "lengths": LENGTHS,
    "options": OPTIONS,
    "packed": PACKED,
    "values": VALUES,
    "layouts": LAYOUTS,
    "calls": CALLS,
    "state": STATE,
    "sizes": SIZES,
    "thorough": THOROUGH,
}

VARLEN = {
    "lengths": {
        "plain": dict(l=37, q=16, opts="cu=7,8,24"),
        "one-sequence": dict(l=37, q=16, opts="cu="),
        "at-chunk": dict(l=32, opts="cu=8,16 final"),
        "around-chunk": dict(l=40, opts="cu=7,17,25 final"),
        "one-token": dict(l=9, q=4, opts="cu=every-1 initial_states final"),
        "short": dict(l=29, opts="cu=1,2,5,25 initial_states final"),
        "many": dict(l=450, h=2, g=1, p=3, n=4, q=64, opts="cu=many initial_states final"),
        "empty": dict(opts="cu=7,7,15 initial_states final"),
    },
    "options": {
        "initial_states": dict(opts="cu=5,13 initial_states"),
        "final_states": dict(opts="cu=5,13 final"),
        "both-states": dict(opts="cu=5,13 initial_states final"),
        "final_states-only": dict(opts="cu=5,13 initial_states final dy=zero"),
        "all": dict(opts="cu=5,13 D-headdim z dt_bias dt_softplus dt_limit initial_states final"),
        "D": dict(opts="cu=5,13 D"),
        "z": dict(opts="cu=5,13 z"),
        "dt_bias": dict(opts="cu=5,13 dt_bias"),
        "dt_softplus": dict(opts="cu=5,13 dt_softplus"),
        "dt_limit": dict(opts="cu=5,13 dt_limit"),
        "one-group": dict(h=3, g=1, opts="cu=5,13 final"),
    },
    "values": {
        "A-huge": dict(A=(50.0, 5000.0), dt=(0.1, 1.0), opts="cu=5,13 initial_states final"),
        "A-tiny": dict(A=(1e-7, 1e-4), opts="cu=5,13 initial_states final"),
        "dt-negative": dict(opts="cu=5,13 dt-negative initial_states final"),
    },
    "layouts": {
        "views": dict(opts="cu=5,13 layout=odd z initial_states final"),
        "layout-projection": dict(opts="cu=5,13 layout=projection z initial_states final"),
    },
    "calls": {
        "no_grad": dict(opts=f"cu=5,13 call=no_grad {ALL}"),
        "backward-twice": dict(opts=f"cu=5,13 call=backward-twice {ALL}"),
        "final-unused": dict(opts=f"cu=5,13 call=final-unused {ALL}"),
    },
    "state": {
        "repeats": dict(opts="cu=5,13 call=repeats initial_states final"),
        "fresh-values": dict(opts="cu=5,13 call=fresh-values initial_states final"),
        "second-call": dict(opts="cu=5,13 call=second-call initial_states final"),
        "resized": dict(opts="cu=5,13 call=resized initial_states final"),
    },
    "sizes": {
        "chunk-256": dict(
            l=600, q=256, h=2, g=1, A=(0.01, 1.0), opts="cu=100,300 initial_states final"
        ),
        "headdim-64-d_state-128": dict(
            l=70, q=64, h=2, g=1, p=64, n=128, opts="cu=20,41 initial_states final"
        ),
        "headdim-d_state-64": dict(
            l=70, q=32, h=2, g=1, p=64, n=64, opts="cu=20,41 initial_states final"
        ),
        "heads-24": dict(h=24, g=1, p=3, n=4, opts="cu=5,13 initial_states final"),
    },
}
STEP = {
    "lengths": {
        "plain": dict(b=2),
        "one-step": dict(l=1, opts="initial_states"),
        "many-steps": dict(l=200, h=2, g=1, A=(0.01, 0.3), opts="initial_states"),
        "one-group": dict(h=3, g=1),
        "three-groups": dict(h=9, g=3),
        "group-per-head": dict(h=3, g=3),
        "all-ones": dict(h=1, g=1, p=1, n=1),
    },
    "options": {
        "initial_states": dict(b=2, opts="initial_states"),
        "D": dict(b=2, opts="D"),
        "z": dict(b=2, opts="z"),
        "z+D": dict(b=2, opts="z D"),
        "dt_bias": dict(b=2, opts="dt_bias"),
        "dt_softplus": dict(b=2, opts="dt_softplus"),
        "dt_softplus-wide": dict(opts="dt_softplus dt_bias", dt=(0.003, 30.0), A=(0.03, 0.3)),
        "all": dict(b=3, opts="D z dt_bias dt_softplus initial_states"),
    },
    "values": {
        "A-huge": dict(A=(50.0, 5000.0), dt=(0.1, 1.0), opts="initial_states"),
        "A-tiny": dict(A=(1e-7, 1e-4), opts="initial_states"),
        "dt-zero": dict(opts="dt-zero initial_states"),
        "long-memory": dict(l=300, h=1, g=1, dt=(0.05, 0.1), A=(0.01, 0.03), mean=1.0, opts=""),
    },
    "layouts": {
        "views": dict(b=2, opts="layout=odd z initial_states"),
        "layout-projection": dict(
            b=2, opts="layout=projection D z dt_bias dt_softplus initial_states"
        ),
    },
    "state": {
        "repeats": dict(b=2, opts="call=repeats initial_states"),
        "fresh-values": dict(b=2, opts="call=fresh-values D z initial_states"),
        "second-call": dict(b=2, opts="call=second-call initial_states"),
        "resized": dict(b=2, opts="call=resized initial_states"),
    },
    "sizes": {
        "batch-9": dict(b=9, l=5),
        "heads-80": dict(h=80, g=1, p=3, n=4, l=5),
        "headdim-64-d_state-128": dict(
            l=9, h=4, p=64, n=128, opts="D dt_bias dt_softplus initial_states"
        ),
        "headdim-d_state-64": dict(l=9, h=4, p=64, n=64, opts="initial_states"),
        "headdim-128-d_state-256": dict(l=5, h=2, g=1, p=128, n=256, opts="initial_states"),
    },
}
BIDIRECTIONAL = {
    "lengths": {k: LENGTHS[k] | {"opts": ""} for k in LENGTHS},
    "options": {k: v for k, v in OPTIONS.items() if "states" not in k and k != "all"}
    | {"all": dict(b=2, opts="D-headdim z dt_bias dt_softplus dt_limit")},
    "values": {
        k: VALUES[k] | {"opts": ""}
        for k in ("dt-tiny", "A-tiny", "A-huge", "A-dt-mixed", "long-memory")
    }
    | {"dt-negative": dict(opts="dt-negative")},
    "layouts": {
        "views": dict(b=2, opts="layout=odd z D"),
        "layout-projection": dict(b=2, opts="layout=projection z D dt_bias dt_softplus"),
        "dy-expanded": dict(b=2, opts="dy=expanded"),
    },
    "calls": {
        "no_grad": dict(b=2, opts="call=no_grad D z"),
        "one-input-needs-gradient": dict(b=2, opts="call=one-gradient D z dt_bias dt_softplus"),
        "backward-twice": dict(b=2, opts="call=backward-twice D z"),
        "checkpoint": dict(b=2, opts="call=checkpoint D z"),
    },
    "state": {
        "repeats": dict(b=2, opts="call=repeats D z"),
        "fresh-values": dict(b=2, opts="call=fresh-values D z"),
        "interleaved": dict(b=2, opts="call=interleaved D z"),
        "resized": dict(b=2, opts="call=resized D z"),
    },
    "sizes": {
        "chunk-256": dict(l=600, q=256, h=2, g=1, A=(0.01, 1.0), opts=""),
        "heads-24": dict(h=24, g=1, p=3, n=4, opts=""),
        "headdim-64-d_state-128": dict(l=70, q=64, h=2, g=1, p=64, n=128, opts=""),
    },
}
# Here p, n and g are those of the scan inside, d_model is h p / 2, and w is the width of the
# convolution.
LAYER = {
    "lengths": {
        "plain": dict(b=2, p=8, w=4, opts=""),
        "length-1": dict(l=1, p=8, w=4, opts=""),
        "shorter-than-convolution": dict(l=3, p=8, w=4, opts=""),
        "chunk": dict(l=16, q=16, p=8, w=4, opts=""),
        "chunk-plus-1": dict(l=17, q=16, p=8, w=4, opts=""),
        "many-chunks": dict(l=131, p=4, w=4, opts=""),
        "one-group": dict(b=2, p=8, g=1, w=4, opts=""),
        "convolution-2": dict(b=2, p=8, w=2, opts=""),
    },
    "layouts": {"views": dict(b=2, p=8, w=4, opts="layout=odd"),
                "dy-expanded": dict(b=2, p=8, w=4, opts="dy=expanded")},
    "calls": {"no_grad": dict(b=2, p=8, w=4, opts="call=no_grad"),
              "backward-twice": dict(b=2, p=8, w=4, opts="call=backward-twice")},
    "state": {"repeats": dict(b=2, p=8, w=4, opts="call=repeats"),
              "fresh-values": dict(b=2, p=8, w=4, opts="call=fresh-values"),
              "resized": dict(b=2, p=8, w=4, opts="call=resized")},
    "sizes": {"headdim-64-d_state-128": dict(l=40, q=32, h=2, p=64, g=1, n=128, w=4, opts=""),
              "heads-24": dict(h=24, g=1, p=4, w=4, opts="")},
}
for features in LAYER.values():
    for feature in features:
        features[feature] = {"m": 0} | features[feature]
# What official kernels define and others need not: judged, and called lacking, not wrong, unless
# required.
OPTIONAL = {"seq_idx-padding", "empty"}
WORDS = {
    "D": (),
    "D-headdim": (),
    "z": (),
    "dt_bias": (),
    "dt_softplus": (),
    "dt_limit": ("", "low", "high"),
    "initial_states": (),
    "final": (),
    "dt-negative": (),
    "dt-zero": (),
    "seq_idx": None,
    "cu": None,
    "numbers": ("fall", "above-0", "large", "padding"),
    "layout": ("odd", "projection", "channel-first", "offset", "expanded", "expanded-heads"),
    "dy": ("zero", "expanded", "channel-first", "odd"),
    "call": (
        "no_grad",
        "inference_mode",
        "one-gradient",
        "final-unused",
        "final-alone",
        "backward-twice",
        "checkpoint",
        "autocast",
        "compile",
        "repeats",
        "second-call",
        "fresh-values",
        "interleaved",
        "resized",
        "accumulate",
    ),
}
LIMITS = {"": (0.06, 0.15), "low": (0.06, INF), "high": (0.0, 0.15)}


def parse(spec, signature="scan"):
    """"feature:l=17,opts=D+z" -> (feature, the whole case). Raises ValueError for what is not
    known."""
    cases = SIGNATURES[signature].cases if isinstance(signature, str) else signature.cases
    feature, _, changes = spec.partition(":")
    if feature not in cases:
        near = difflib.get_close_matches(feature, cases)
        near = [name for name in cases if feature in name] or near
        near = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(f"--case: no feature {feature!r}; {near}There are {', '.join(cases)}")
    case = BASE | cases[feature]
    for change in filter(None, changes.split(",")):
        key, equals, value = change.partition("=")
        if key not in case or key in ("dt", "A", "mean", "scale", "dy"):
            keys = [k for k in case if k not in ("dt", "A", "mean", "scale", "dy")]
            raise ValueError(f"--case: no key {key!r}; there are {', '.join(keys)}")
        if key == "opts" and equals:
            case[key] = value.replace("+", " ").replace(";", ",")
        elif value.isascii() and value.isdigit() and int(value) > 0:
            case[key] = int(value)
        else:
            raise ValueError(f"--case: {key} must be a whole number above 0, got {value!r}")
    if case["h"] % case["g"]:
        raise ValueError(f"--case: g={case['g']} does not divide h={case['h']}")
    for word in case["opts"].split():
        key, equals, value = word.partition("=")
        known = WORDS.get(key, "unknown")
        if known == "unknown" or (known is not None and value not in (known or ("",))):
            raise ValueError(f"--case: no option {word!r} in opts; there are {', '.join(WORDS)}")
        if known is None and not re.fullmatch(r"(\d+(,\d+)*)?|every-1|many", value):
            raise ValueError(f"--case: {key} takes borders as in {key}=3;8, got {value!r}")
    return feature, case


def options_of(case):
    return dict(word.partition("=")[::2] for word in case["opts"].split())


def spell(feature, case, signature="scan"):
    """The reverse of `parse`."""
    start = parse(feature, signature)[1]
    changes = []
    for key, value in case.items():
        if value != start[key]:
            text = value.replace(",", ";").replace(" ", "+") if key == "opts" else str(value)
            changes.append(f"{key}={text}")
    return ":".join(filter(None, [feature, ",".join(changes)]))


# --- The inputs of a case -------------------------------------------------------------------------


@dataclasses.dataclass
class Inputs:
    """The tensors that get a gradient, the other arguments, and the gradients of the outputs."""
    t: dict
    kw: dict
    d: dict                      # {"y": dy, "final_states": dfinal}
    q: int
    free: dict = dataclasses.field(default_factory=dict)       # name -> places that nobody judges

    def tensors(self):
        return [
            *self.t.values(),
            *self.d.values(),
            *(v for v in self.kw.values() if torch.is_tensor(v)),
        ]

    def double(self):
        double = lambda tensors: {k: v.double() for k, v in tensors.items()}
        return Inputs(double(self.t), self.kw, double(self.d), self.q, self.free)


class Draw:
    """Random numbers in float64, the same for the same seed on every machine."""

    def __init__(self, feature, seed):
        self.generator = torch.Generator().manual_seed(
            zlib.crc32(f"{feature} {seed}".encode()) if seed else zlib.crc32(feature.encode())
        )

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape):
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def spread(self, low, high, *shape):
        return low * (high / low) ** self.uniform(*shape)

    def order(self, size):
        return torch.randperm(size, generator=self.generator)


def build(feature, case, dtype, device="cpu", seed=0):
    """The inputs of the scan, of packed rows (`cu`) and of steps."""
    b, l, h, p, g, n = (case[k] for k in "blhpgn")
    opts, draw, mean = options_of(case), Draw(feature, seed), case["mean"]
    single = torch.promote_types(dtype, torch.float32)    # parameters and states stay in float32

    def biased(*shape):
        return mean + draw.normal(*shape) * (0.5 if mean else 1)

    t = {"x": biased(b, l, h, p), "dt": draw.spread(*case["dt"], b, l, h),
         "B": biased(b, l, g, n) * case["scale"], "C": biased(b, l, g, n) * case["scale"]}
    # The rates of the heads span the whole range in every draw.
    exponents = torch.linspace(0, 1, h, dtype=torch.float64)[draw.order(h)]
    t["A"] = -case["A"][0] * (case["A"][1] / case["A"][0]) ** exponents
    if "dt_limit" in opts:  # so near to a limit, half precision may fall on either side of it
        for limit in LIMITS[opts["dt_limit"]]:
            t["dt"] = torch.where(
                (t["dt"] - limit).abs() < 0.03 * min(limit, 1),
                t["dt"] + 0.07 * min(limit, 1),
                t["dt"],
            )
    if "dt-negative" in opts:
        t["dt"] = torch.where(draw.uniform(b, l, h) < 0.4, -t["dt"], t["dt"])
    if "dt_softplus" in opts:
        t["dt"] = t["dt"] + torch.log(-torch.expm1(-t["dt"]))                   # softplus undoes it
    if "dt_bias" in opts:
        t["dt_bias"] = draw.normal(h) * (1 if "dt_softplus" in opts else 0.01)
        t["dt"] = t["dt"] - t["dt_bias"]
    if "dt-zero" in opts:
        t["dt"] = torch.where(draw.uniform(b, l, h) < 0.3, 0.0, t["dt"])
    if "D" in opts:
        t["D"] = draw.normal(h)
    if "D-headdim" in opts:
        t["D"] = draw.normal(h, p)
    if "z" in opts:
        t["z"] = draw.normal(b, l, h, p)
    kw = {}
    sequences = b
    if "cu" in opts:
        kw["cu_seqlens"] = torch.tensor([0, *borders_of(opts["cu"], l), l], dtype=torch.int32)
        sequences = len(kw["cu_seqlens"]) - 1
    if "initial_states" in opts:
        t["initial_states"] = biased(sequences, h, p, n)
    if "dt_softplus" in opts:
        kw["dt_softplus"] = True
    if "dt_limit" in opts:
        kw["dt_limit"] = LIMITS[opts["dt_limit"]]
    if "final" in opts:
        kw["return_final_states"] = True
    if "seq_idx" in opts:
        kw["seq_idx"] = numbered(opts, b, l)
    d = {"y": draw.normal(b, l, h, p) * case["dy"] + mean}
    dfinal = draw.normal(sequences, h, p, n) * case["dy"] + mean
    if "final" in opts:
        d["final_states"] = dfinal
    return finished(t, kw, d, case, opts, dtype, single, device)


def finished(t, kw, d, case, opts, dtype, single, device):
    """Dtypes, device and layout, and what is zero or free."""
    in_single = {"A", "D", "dt_bias", "initial_states", "final_states"}
    cast = lambda tensors: {
        k: v.to(single if k in in_single else dtype).to(device) for k, v in tensors.items()
    }
    t, d = cast(t), cast(d)
    kw = {k: v.to(device) if torch.is_tensor(v) else v for k, v in kw.items()}
    inputs = Inputs(t, kw, d, case["q"])
    call = opts.get("call")
    if opts.get("dy") == "zero" or call == "final-alone":
        d["y"] = torch.zeros_like(d["y"])
    if call == "final-unused" and "final_states" in d:
        d["final_states"] = torch.zeros_like(d["final_states"])
    if "dt-zero" in opts:  # a limit is touched: half of the conventions give 0 for its slope
        inputs.free["ddt"] = t["dt"].cpu() == 0
    if opts.get("numbers") == "padding":
        padding = kw["seq_idx"] < 0
        d["y"] = d["y"].masked_fill(padding[..., None, None], 0)
        for name in ("y", "dx", "ddt", "dB", "dC", "dz"):
            inputs.free[name] = padding.cpu()
        inputs.free["dA"] = None
    if "layout" in opts:
        arrange(inputs, opts["layout"])
    if opts.get("dy") == "expanded" and "final_states" in d:
        state = d["final_states"]
        d["final_states"] = state[:1, :1, :1, :1].expand_as(state)
    if opts.get("dy") == "expanded":  # what y.sum().backward() sends
        d["y"] = d["y"].flatten()[:1].view([1] * d["y"].dim()).expand_as(d["y"])
    elif opts.get("dy") == "channel-first":
        d["y"] = channel_first(d["y"])
    elif opts.get("dy") == "odd":
        d["y"] = odd(d["y"])
    return inputs


def borders_of(text, l):
    """Where sequences begin, in a row of l tokens."""
    if text == "every-1":
        return list(range(1, l))
    if text == "many":  # of one token and of two, in turn
        return [i for i in range(1, l) if i % 3]
    return [int(s) for s in text.split(",") if s and int(s) <= l]


def numbered(opts, b, l):
    borders = torch.tensor(borders_of(opts["seq_idx"], l))
    at = torch.arange(l) - torch.arange(b)[:, None]                     # (b, l)
    number = (at[..., None] >= borders).sum(-1)
    numbers = opts.get("numbers")
    if numbers == "fall":
        number = number.max() - number
    elif numbers == "above-0":
        number = number * 2 + 3
    elif numbers == "large":
        number = (
            70_000 + torch.tensor([0, 256, 65_792, 65_793])[number]
        )  # 8 bits and 16 lose a border each
    elif numbers == "padding":  # the second and the last of them
        number = torch.where((number == 1) | (number == number.max()), -1, number)
    return number.int()


def arrange(inputs, layout):
    """The same values (but for `expanded`, which repeats them) in another order in memory."""
    t, kw, d = inputs.t, inputs.kw, inputs.d
    tokens = [k for k in ("z", "x", "B", "C", "dt", "u") if k in t]
    if layout == "odd":
        for tensors in (t, d):
            tensors.update({k: odd(v) for k, v in tensors.items()})
        kw.update({k: odd(v) for k, v in kw.items() if k == "seq_idx"})
    elif layout == "offset":
        for tensors in (t, d):
            tensors.update({k: offset(v) for k, v in tensors.items()})
        kw.update({k: offset(v) for k, v in kw.items() if k == "seq_idx"})
    elif layout == "expanded":
        rows = [*tokens, "initial_states"]
        t.update({k: v[:1].expand_as(v) for k, v in t.items() if k in rows})
        kw.update({k: v[:1].expand_as(v) for k, v in kw.items() if k == "seq_idx"})
    elif layout == "expanded-heads":
        t.update({k: t[k][:1].expand_as(t[k]) for k in ("A", "D", "dt_bias") if k in t})
        t.update({k: t[k][:, :, :1].expand_as(t[k]) for k in "BC"})
    else:  # slices of one wide projection
        wide = torch.cat([t[k].flatten(2) for k in tokens], 2)          # (b, l, all)
        if layout == "channel-first":
            wide = wide.transpose(1, 2).contiguous().transpose(1, 2)
        parts = wide.split([t[k].flatten(2).shape[2] for k in tokens], 2)
        for k, part in zip(tokens, parts, strict=False):
            t[k] = part.unflatten(2, t[k].shape[2:]) if t[k].dim() == 4 else part


def odd(t):
    """The first two axes swapped in memory, two unused numbers behind each row."""
    if t.dim() < 2:
        return F.pad(t[:, None], (0, 2), value=77)[:, 0]
    room = F.pad(t.transpose(0, 1), (0, 2), value=77).contiguous()
    return room.transpose(0, 1)[tuple(map(slice, t.shape))]


def offset(t):
    """Three unused numbers in front."""
    return F.pad(t.flatten(), (3, 0), value=77)[3:].view(t.shape)


def channel_first(t):
    """(b, l, h, p) with l as the last axis in memory."""
    return t.transpose(1, -1).contiguous().transpose(1, -1)


def build_layer(feature, case, dtype, device="cpu", seed=0):
    """Tokens u, and parameters by the names of mamba_ssm.modules.mamba2.Mamba2, dots as double
    underscores."""
    b, l, h, p, g, n, w = (case[k] for k in "blhpgnw")
    draw, opts = Draw(feature, seed), options_of(case)
    inner = h * p
    d_model = case.get("m") or max(1, inner // 2)
    convolved = inner + 2 * g * n
    dt = draw.spread(*case["dt"], h)
    exponents = torch.linspace(0, 1, h, dtype=torch.float64)[draw.order(h)]
    t = {"u": draw.normal(b, l, d_model),
         "in_proj__weight": draw.normal(inner + convolved + h, d_model) / math.sqrt(d_model),
         "conv1d__weight": draw.normal(convolved, 1, w) / math.sqrt(w),
         "conv1d__bias": draw.normal(convolved) * 0.1,
         "dt_bias": dt + torch.log(-torch.expm1(-dt)),
         "A_log": math.log(case["A"][0]) + exponents * math.log(case["A"][1] / case["A"][0]),
         "D": 1 + 0.3 * draw.normal(h),
         "norm__weight": 1 + 0.3 * draw.normal(inner),
         "out_proj__weight": draw.normal(d_model, inner) / math.sqrt(inner)}
    d = {"y": draw.normal(b, l, d_model)}
    t = {k: v.to(dtype).to(device) for k, v in t.items()}
    d = {k: v.to(dtype).to(device) for k, v in d.items()}
    inputs = Inputs(t, {"d_state": n}, d, case["q"])
    if opts.get("layout"):
        t["u"] = odd(t["u"])
    if opts.get("dy") == "expanded":
        d["y"] = d["y"][:1, :1, :1].expand_as(d["y"])
    return inputs


# --- The truth, and what a careful kernel may miss it by ------------------------------------------


def outputs(scan, t, kw, q):
    """Call a scan: {"y": ...}, with "final_states" where they were asked for."""
    t = dict(t)
    first = [t.pop(name) for name in ("x", "dt", "A", "B", "C")]
    wants = kw.get("return_final_states", False)
    passed = {k: v for k, v in kw.items() if k not in getattr(scan, "implied", ())}
    out = scan(*first, q, **t, **passed)
    if isinstance(out, list):
        out = tuple(out)
    if isinstance(out, tuple) != wants or (wants and len(out) != 2):
        what = f"a tuple of {len(out)}" if isinstance(out, tuple) else "one value"
        raise Wrong(f"returned {what} with return_final_states={wants}")
    return dict(zip(("y", "final_states"), out if wants else (out,), strict=False))


class Wrong(Exception):
    """The kernel broke its contract in a way that needs no comparison of numbers."""


def recurrent(x, dt, A, B, C, chunk_size, *, initial_states=None, seq_idx=None,
              return_final_states=False, **kw):
    """ssd_recurrent; with large states in segments, so that its backward pass fits into memory."""
    l, numbers = x.shape[1], x[:, 0].numel() * B.shape[-1]
    segment = max(16, 2**21 // numbers)
    if l <= segment:
        return mamba2_ref.ssd_recurrent(
            x,
            dt,
            A,
            B,
            C,
            initial_states=initial_states,
            seq_idx=seq_idx,
            return_final_states=return_final_states,
            **kw,
        )
    state, ys = initial_states, []
    for i in range(0, l, segment):
        c = slice(i, i + segment)
        part = {k: v[:, c] if k == "z" else v for k, v in kw.items()}
        if seq_idx is not None:
            part["seq_idx"] = seq_idx[:, c]
            if i:
                kept = seq_idx[:, i] == seq_idx[:, i - 1]
                state = torch.where(kept[:, None, None, None], state, 0.0)
        y, state = checkpoint(
            mamba2_ref.ssd_recurrent,
            x[:, c],
            dt[:, c],
            A,
            B[:, c],
            C[:, c],
            **part,
            initial_states=state,
            return_final_states=True,
            use_reentrant=False,
        )
        ys.append(y)
    return (torch.cat(ys, 1), state) if return_final_states else torch.cat(ys, 1)


def chunked(x, dt, A, B, C, chunk_size, **kw):
    return mamba2_ref.ssd_chunked(x, dt, A, B, C, chunk_size, **kw)


class Rounding(torch.autograd.Function):
    """t (1 + u e) with random |e| <= 1, on the way forward and, independently, on the gradient."""
    random = torch.Generator().manual_seed(0)

    @staticmethod
    def errors(t):
        return torch.rand(t.shape, generator=Rounding.random, dtype=t.dtype) * 2 - 1

    @staticmethod
    def forward(ctx, t, forward, backward, least, errors=(None, None)):
        ctx.noise = backward, least, errors[1]
        return Rounding.noisy(t, forward, least, errors[0]) if forward else t.clone()

    @staticmethod
    def backward(ctx, grad):
        return Rounding.noisy(grad, *ctx.noise), None, None, None, None

    @staticmethod
    def noisy(t, u, least, e):
        return t + (u * t.abs() + least * (t != 0)) * (Rounding.errors(t) if e is None else e)


class Noise:
    """Where a careful kernel rounds.

    u is the unit roundoff of what is stored in the tested dtype: results and operands of products.
    u_sum is that of what a kernel keeps in float32, times the root of the number of summands: a
    random walk of rounding errors. u_in is not 0 only where the inputs themselves are cut before a
    product, as to tf32. eps is what rounding loses of a 1.
    """

    def __init__(self, precision, summands, tf32):
        self.eps = torch.finfo(torch.promote_types(precision, torch.float32)).eps / 2
        self.u_sum = self.eps * math.sqrt(summands)
        self.u_in = (
            2**-10 if tf32 and precision == torch.float32 else 0.0
        )  # the 13 bits that tf32 lacks
        self.u = max(torch.finfo(precision).eps / 2, self.u_sum, self.u_in)
        # float16 ends at the bottom, too: there the error no longer shrinks with the value.
        self.least = 2**-25 if precision == torch.float16 else 1e-40
        self.floor = 4 * self.least if precision == torch.float16 else 1e-36

    def op(self, t):
        """An operand of a product, stored in the dtype."""
        return Rounding.apply(t, self.u, self.u, self.least)

    def add(self, t):
        """A sum, kept in float32."""
        return Rounding.apply(t, self.u_sum, self.u_sum, 0.0)

    def each(self, t, like):
        """A parameter: noise on each summand of its gradient."""
        return self.add(t.expand_as(like) if t.shape != like.shape else t)

    def own(self, t):
        """An input, whose gradient is stored in the dtype."""
        return Rounding.apply(t, self.u_in, self.u, self.least)

    def step(self, t):
        return Rounding.apply(t, 0.0, self.u, self.least)

    def near_1(self, t):
        return self.eps * Rounding.errors(t)

    def state(self, t, errors):
        """A state that hardly changes from chunk to chunk is rounded the same way in each: one
        error for all."""
        return Rounding.apply(t, self.u, self.u, self.least, errors)


class Exact:
    """The noise of the truth: none."""
    op = add = own = step = staticmethod(lambda t: t)
    each = staticmethod(lambda t, like: t)


def chunked_with_errors(
    x,
    dt,
    A,
    B,
    C,
    q,
    *,
    noise,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    dt_softplus=False,
    dt_limit=(0.0, INF),
    return_final_states=False,
):
    """The chunked algorithm with rounding errors where a kernel has them. A leading axis k of draws
    on each tensor."""
    op, add, each = noise.op, noise.add, noise.each
    x, B, C, dt = noise.own(x), noise.own(B), noise.own(C), noise.step(dt)      # (k, b, l, ...)
    b, l, h = dt.shape[1:]
    dt = dt if dt_bias is None else dt + each(dt_bias[:, None, None], dt)
    if dt_softplus:  # kernels compute log(1 + exp(dt)): the 1 costs a small step its digits
        dt = F.softplus(dt) + noise.near_1(dt)
    dt = dt.clamp(*dt_limit)
    if dt_bias is not None or dt_softplus or dt_limit != (0.0, INF):
        dt = op(dt)  # some return the step to the dtype
    # (k, b, l, h); a recurrent kernel rounds exp(a), which may be near 1
    a = each(A[:, None, None], dt) * dt + noise.near_1(dt)
    B, C = (t.repeat_interleave(h // t.shape[3], 3) for t in (B, C))    # (k, b, l, h, n)
    sequence = torch.zeros(b, l)
    if seq_idx is not None:
        sequence = F.pad(seq_idx.diff(dim=1) != 0, (1, 0)).cumsum(1)
    before, state, ys = torch.zeros(b), initial_states, []
    if state is None:
        state = x.new_zeros(*x.shape[:2], *x.shape[3:], B.shape[-1])    # (k, b, h, p, n)
    same_errors = Rounding.errors(state), Rounding.errors(state)
    for c in (slice(i, min(i + q, l)) for i in range(0, l, q)):
        s, sums, x_c, B_c, C_c = (
            sequence[:, c],
            a[:, :, c].cumsum(2),
            x[:, :, c],
            B[:, :, c],
            C[:, :, c],
        )
        start, end = add(sums), add(sums[:, :, -1:])                    # (k, b, i, h), (k, b, 1, h)
        same = (s[:, :, None] == s[:, None]).tril()[..., None]          # (b, i, j, 1)
        L = (start[:, :, :, None] - add(sums)[:, :, None]).masked_fill(~same, -INF).exp()
        M = op(torch.einsum("kbihn,kbjhn->kbijh", C_c, B_c) * L * dt[:, :, None, c])
        into = torch.where((s == before[:, None])[..., None], start.exp(), 0.0)  # (k, b, i, h)
        out = torch.where((s == s[:, -1:])[..., None], (end - add(sums)).exp(), 0.0) * dt[:, :, c]
        y = torch.einsum("kbijh,kbjhp->kbihp", M, x_c)
        read = torch.einsum("kbihn,kbhpn->kbihp", C_c, noise.state(state, same_errors))
        ys.append(add(y + into[..., None] * read))
        keep = torch.where((s[:, -1] == before)[:, None, None], end.exp(), 0.0)[
            :, :, 0, :, None, None
        ]
        state = add(
            keep * state + torch.einsum("kbjhn,kbjhp->kbhpn", op(out[..., None] * B_c), x_c)
        )
        before = s[:, -1]
    y = skip_and_gate(torch.cat(ys, 2), x, D, z, noise)
    return (y, state) if return_final_states else y


def skip_and_gate(y, x, D, z, noise):
    """(y + D x) silu(z), with or without a leading axis of draws."""
    if D is not None:
        per_channel = D.shape[-2:] == x.shape[-2:]
        D = (D if per_channel else D[..., None])[..., None, None, :, :]         # (..., 1, 1, h, p)
        y = y + noise.each(D, x) * x
    if z is not None:
        y = noise.op(y) * F.silu(noise.own(z))
    return noise.op(y)


# --- Signatures: how a kernel is called, and how the truth is made of a scan ----------------------


@dataclasses.dataclass(frozen=True)
class Signature:
    """`call(kernel, t, kw, q)` gives named outputs; `lift(scan, noise)(t, kw, q)` gives the same
    out of a scan."""
    name: str
    kinds: dict                  # kind -> feature -> case
    build: callable
    call: callable
    lift: callable
    grads: bool = True

    @property
    def cases(self):
        return {name: case for cases in self.kinds.values() for name, case in cases.items()}

    @property
    def kind_of(self):
        return {name: kind for kind, cases in self.kinds.items() for name in cases}


def lift_scan(scan, noise=Exact):
    return lambda t, kw, q: outputs(scan, t, kw, q)


def call_varlen(kernel, t, kw, q):
    return outputs(kernel, t, kw, q)


def lift_varlen(scan, noise=Exact):
    """A loop over the sequences, each a row of its own."""
    def varlen(t, kw, q):
        kw = dict(kw)
        cu = kw.pop("cu_seqlens").tolist()
        kw["return_final_states"] = True
        ys, finals = [], []
        for i, (start, end) in enumerate(zip(cu, cu[1:], strict=False)):
            part = {k: v[..., start:end, :, :] for k, v in t.items() if k in ("x", "B", "C", "z")}
            part["dt"] = t["dt"][..., start:end, :]
            part |= {k: t[k] for k in ("A", "D", "dt_bias") if k in t}
            if "initial_states" in t:
                part["initial_states"] = t["initial_states"][..., i : i + 1, :, :, :]
            if start == end:  # an empty sequence keeps its state
                state = part.get("initial_states")
                finals.append(torch.zeros_like(finals[-1]) if state is None else state)
                continue
            out = outputs(scan, part, kw, q)
            ys.append(out["y"])
            finals.append(out["final_states"])
        out = {"y": torch.cat(ys, -3), "final_states": torch.cat(finals, -4)}
        return out
    return lambda t, kw, q: {k: v for k, v in varlen(t, kw, q).items()
                             if k == "y" or kw.get("return_final_states")}


def call_step(kernel, t, kw, q):
    """One token after another, with arguments expanded as Mamba2's layer expands them."""
    b, l, h, p = t["x"].shape
    n = t["B"].shape[3]
    state = t["initial_states"].clone() if "initial_states" in t else None
    if state is None:
        state = torch.zeros(b, h, p, n, dtype=t["A"].dtype, device=t["x"].device)
    A = t["A"][:, None, None].expand(h, p, n)
    more = {
        k: v
        for k, v in kw.items()
        if k == "dt_softplus" and k not in getattr(kernel, "implied", ())
    }
    for name in ("D", "dt_bias"):
        if name in t:
            more[name] = t[name][:, None].expand(h, p)
    ys = []
    for i in range(l):
        dt = t["dt"][:, i, :, None].expand(b, h, p)
        if "z" in t:
            more["z"] = t["z"][:, i]
        before = state.clone() if i == 0 else None
        y = kernel(state, t["x"][:, i], dt, A, t["B"][:, i], t["C"][:, i], **more)
        if not torch.is_tensor(y):
            raise Wrong(
                f"returned {type(y).__name__}, not one tensor; the state is updated in place"
            )
        if i == 0 and torch.equal(before, state) and bool((t["dt"][:, 0] > 0).any()):
            raise Wrong("the state is not updated in place")
        ys.append(y)
    return {"y": torch.stack(ys, 1), "final_states": state}


def lift_step(scan, noise=Exact):
    return lambda t, kw, q: outputs(scan, t, kw | {"return_final_states": True}, q)


def call_bidirectional(kernel, t, kw, q):
    return outputs(kernel, t, kw, q)


def lift_bidirectional(scan, noise=Exact):
    """The scan plus the scan of the flipped sequence; D and the gate once, on the sum."""
    def both(t, kw, q):
        inner = {k: v for k, v in t.items() if k not in ("D", "z")}
        flipped = (
            inner | {k: inner[k].flip(-3) for k in ("x", "B", "C")} | {"dt": inner["dt"].flip(-2)}
        )
        forward, backward = outputs(scan, inner, kw, q)["y"], outputs(scan, flipped, kw, q)["y"]
        y = forward + backward.flip(-3)
        return {"y": skip_and_gate(y, t["x"], t.get("D"), t.get("z"), noise)}
    return both


def sizes_of_layer(t):
    """d_model, inner width, heads and width of the convolution of a Mamba2 layer, from its
    parameters."""
    d_model, inner = t["out_proj__weight"].shape[-2:]
    return d_model, inner, t["dt_bias"].shape[-1], t["conv1d__weight"].shape[-1]


def call_layer(kernel, t, kw, q):
    """kernel watches a class or function that builds the module from its sizes, or a module."""
    d_model, inner, h, w = sizes_of_layer(t)
    convolved = t["conv1d__weight"].shape[0]
    module = kernel.kernel
    if not isinstance(module, torch.nn.Module):
        n = kw.get("d_state")
        module = kernel(
            d_model=d_model,
            d_state=n,
            d_conv=w,
            expand=inner / d_model,
            headdim=inner // h,
            ngroups=(convolved - inner) // (2 * n),
            chunk_size=q,
        )
    module = module.to(device=t["u"].device, dtype=t["u"].dtype)
    named = {k.replace("__", "."): v for k, v in t.items() if k != "u"}
    known = dict(module.named_parameters())
    if {k: tuple(v.shape) for k, v in known.items()} != {
        k: tuple(v.shape) for k, v in named.items()
    }:
        wrong = sorted({k for k in known.keys() ^ named.keys()}
                       or {k for k in known if known[k].shape != named[k].shape})
        raise Wrong(f"parameters differ from Mamba2's in name or shape: {', '.join(wrong)}")
    y = kernel.run(torch.func.functional_call, module, named, (t["u"],))
    return {"y": y[0] if isinstance(y, tuple) else y}


def gated_norm(y, z, groups, noise):
    """The gate first, then the root mean square of each group."""
    y = noise.op(y * F.silu(z)).unflatten(-1, (groups, -1))
    return noise.op(y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(-2)


def lift_layer(scan, noise=Exact, norm=gated_norm, ahead=0):
    """Mamba2 around the scan: projection, short convolution, scan, gated norm, projection.

    Mistaken layers have another `norm`, or a convolution that looks so many tokens `ahead`.
    """
    def layer(t, kw, q):
        _, inner, h, w = sizes_of_layer(t)
        n = kw["d_state"]
        op, own, each = noise.op, noise.own, noise.each
        gn = (t["conv1d__weight"].shape[-3] - inner) // 2
        weight = lambda name: op(t[name]).mT.unsqueeze(-3)
        row = lambda name, like: each(t[name][..., None, None, :], like)
        projected = op(own(t["u"]) @ weight("in_proj__weight"))                 # (..., b, l, all)
        z, xBC, dt = projected.split([inner, inner + 2 * gn, h], -1)
        padded = F.pad(xBC, (0, 0, w - 1 - ahead, ahead))
        taps = op(t["conv1d__weight"])[..., 0, :]                               # (..., channels, w)
        total = row("conv1d__bias", xBC)
        for i in range(w):
            total = total + padded[..., i : i + xBC.shape[-2], :] * taps[..., i][..., None, None, :]
        xBC = op(F.silu(op(total)))
        x, B, C = xBC.split([inner, gn, gn], -1)
        part = {"x": x.unflatten(-1, (h, -1)), "dt": dt, "A": -op(t["A_log"]).exp(),
                "B": B.unflatten(-1, (-1, n)), "C": C.unflatten(-1, (-1, n)),
                "D": t["D"], "dt_bias": t["dt_bias"]}
        y = outputs(scan, part, {"dt_softplus": True}, q)["y"].flatten(-2)
        y = norm(y, z, gn // n, noise)
        y = op(y * row("norm__weight", y))
        return {"y": op(y @ weight("out_proj__weight"))}
    return layer


SIGNATURES = {s.name: s for s in (
    Signature("scan", SCAN, build, lambda kernel, t, kw, q: outputs(kernel, t, kw, q), lift_scan),
    Signature("varlen", VARLEN, build, call_varlen, lift_varlen),
    Signature("step", STEP, build, call_step, lift_step, grads=False),
    Signature("bidirectional", BIDIRECTIONAL, build, call_bidirectional, lift_bidirectional),
    Signature("layer", LAYER, build_layer, call_layer, lift_layer),
)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How kernels are judged; every field but `signature` is an option of the command."""
    signature: Signature = SIGNATURES["scan"]
    device: str = "cpu"
    tf32: bool = False
    forward_only: bool = False
    allow_delegation: bool = False
    always: tuple = ()
    compile_backend: str = "inductor"
    poison: bool = True
    seed: int = 0

    def but(self, **changes):
        return dataclasses.replace(self, **changes)


def truth_and_limits(spec, dtype, precision, settings, seed):
    """The truth for a case whose inputs have `dtype`, and the tolerances for a kernel of
    `precision`.

    A tolerance is two numbers per head (or group): one for the root mean square error, one for the
    largest.
    """
    signature = settings.signature
    feature, case = parse(spec, signature)
    inputs = signature.build(feature, case, dtype, seed=seed).double()
    want = run(signature.lift(recurrent), inputs, signature.grads)
    want = {
        k: torch.zeros_like(inputs.t[k[1:]]) if v is None else v.detach() for k, v in want.items()
    }

    numbers = (
        case["b"] * case["l"] * case["h"] * (case["p"] + case["n"] + min(case["q"], case["l"]))
    )
    draws = max(1, min(DRAWS, 1_500_000 // numbers))
    noise = Noise(precision, max(case["b"] * case["l"], case["n"], case["p"]), settings.tf32)
    many = lambda tensors: {k: v.expand(draws, *v.shape) for k, v in tensors.items()}
    careful = functools.partial(chunked_with_errors, noise=noise)
    Rounding.random.manual_seed(0)
    noisy = run(signature.lift(careful, noise),
                Inputs(many(inputs.t), inputs.kw, many(inputs.d), inputs.q), signature.grads)
    limits = {}
    for name, value in want.items():
        drawn = torch.zeros(draws, *value.shape) if noisy[name] is None else noisy[name].detach()
        if not (value.isfinite().all() and drawn.isfinite().all()):
            raise AssertionError(f"the truth of {spec} is not finite: {name}")
        error = rows((drawn - value).abs(), name, 1).clamp(min=noise.floor)     # (heads, the rest)
        both = error.square().mean(1).sqrt(), error.amax(1)
        if error.shape[1] < DRAWS:              # too few samples to tell heads apart
            both = tuple(limit.max().expand_as(limit) for limit in both)
        limits[name] = tuple(SLACK * limit for limit in both)
    return want, limits


HEAD = {"y": 2, "x": 2, "dt": 2, "B": 2, "C": 2, "z": 2, "A": 0, "D": 0, "dt_bias": 0,
        "final_states": 1, "initial_states": 1}            # the axis of the head or group


def head_axis(name, value):
    key = name if name in HEAD else name[1:]
    return HEAD[key] if key in HEAD and value.dim() > HEAD[key] else None


def rows(value, name, skip=0):
    """(heads or groups, the rest); one row where a tensor has no heads."""
    axis = HEAD.get(name, HEAD.get(name[1:]))
    if axis is None or value.dim() <= axis + skip:
        return value.reshape(1, -1)
    return value.movedim(axis + skip, 0).flatten(1) if value.dim() > 1 else value[:, None]


def sealed_cache(size=400):
    """Truths, kept as bytes inside a closure: whoever looks through memory for tensors finds
    none."""
    kept = OrderedDict()

    def truth(spec, dtype, precision, settings, seed=0):
        key = (settings.signature.name, spec, dtype, precision, settings.tf32, seed)
        if key not in kept:
            buffer = io.BytesIO()
            torch.save(truth_and_limits(spec, dtype, precision, settings, seed), buffer)
            kept[key] = buffer.getvalue()
            while len(kept) > size:
                kept.popitem(last=False)
        return torch.load(io.BytesIO(kept[key]))
    return truth, kept.clear, lambda: hash(tuple(kept.items()))


truth, forget_truths, seal_of_truths = sealed_cache()


def excess(got, want, limits, name):
    """Error over tolerance, per head (root mean square) and per element: above 1 is wrong."""
    error = (got.double() - want).abs().nan_to_num(INF, INF)
    per_row = rows(error, name)
    per_head = per_row.square().mean(1).sqrt() / limits[0]
    axis = HEAD.get(name, HEAD.get(name[1:]))
    if axis is None or error.dim() <= axis:
        return per_head, error / limits[1]
    shape = [1] * error.dim()
    shape[axis] = -1
    return per_head, error / limits[1].view(shape)


# --- Watching the kernel --------------------------------------------------------------------------


class Poison(TorchDispatchMode):
    """Memory that nobody has written yet holds NaN, so that a kernel that reads or returns it is
    found out; in the second look it holds 0, which tells this fault from other sources of NaN."""
    NAMES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}

    def __init__(self, value):
        super().__init__()
        self.value = value

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in Poison.NAMES and out.is_floating_point():
            out.fill_(self.value)
        return out


class Watch:
    """Calls the kernel, and sees whether it hands the call on to a reference or reaches into the
    judge.

    While the kernel runs, the interpreter reports each Python function that is entered, by the file
    that its code came from: an alias, a wrapper or a second import does not hide it. A copy in
    another file is no reference.
    """

    def __init__(self, kernel, settings):
        self.kernel, self.settings = kernel, settings
        self.handed_on, self.reached, self.forward = None, None, False
        self.depth = 0
        # What it always applies it need not take as an argument.
        always = {"final": "return_final_states"}
        self.implied = [name for name in (always.get(word, word) for word in settings.always)
                        if not names_argument(kernel, name)]

    def __call__(self, *args, **kwargs):
        self.forward = True
        out = self.run(self.kernel, *args, **kwargs)
        self.forward = False
        return out

    def run(self, function, *args, **kwargs):
        if self.settings.allow_delegation or self.depth:
            return function(*args, **kwargs)
        self.depth += 1
        before = sys.getprofile()
        sys.setprofile(self.seen)
        threading.setprofile(self.seen)
        try:
            return function(*args, **kwargs)
        finally:
            if getattr(sys.getprofile(), "__self__", None) is not self:
                self.reached = self.reached or "sys.setprofile, which watches it"
            sys.setprofile(before)
            threading.setprofile(before)
            self.depth -= 1

    def seen(self, frame, event, argument):
        if event == "call":
            code = frame.f_code
            owner = owner_of(code.co_filename)
            if owner == "the judge":
                if code not in ALLOWED:
                    self.reached = self.reached or f"{code.co_name} of the judge"
            elif owner and not self.handed_on and not imports(frame):
                self.handed_on = f"{owner}: {code.co_name}"
            elif code in LOOKING and is_kernels_own(frame.f_back, self.kernel):
                self.reached = self.reached or f"inspect.{code.co_name}"
        elif (
            event == "c_call"
            and id(argument) in LOOKING_IN_C
            and not owner_of(frame.f_code.co_filename)
            and is_kernels_own(frame, self.kernel)
        ):
            self.reached = self.reached or f"{argument.__module__}.{argument.__name__}"


ALLOWED = {inspect.unwrap(Poison.__torch_dispatch__).__code__}
def imports(frame):
    """Does the frame belong to an import, which runs a reference's file without handing on?"""
    while frame is not None and owner_of(frame.f_code.co_filename) != "the judge":
        if frame.f_code.co_name == "<module>":
            return True
        frame = frame.f_back
    return False


LOOKING = {inspect.stack.__code__, inspect.currentframe.__code__, inspect.getouterframes.__code__,
           inspect.trace.__code__}
LOOKING_IN_C = {id(f) for f in (gc.get_objects, gc.get_referrers, gc.get_referents, sys._getframe,
                                sys._current_frames, sys.setprofile)}


@functools.cache
def owner_of(filename):
    """Whose file it is: a reference's, the judge's, or None."""
    path = os.path.realpath(filename).replace(os.sep, "/")
    if path == os.path.realpath(__file__).replace(os.sep, "/"):
        return "the judge"
    if path == os.path.realpath(mamba2_ref.__file__).replace(os.sep, "/"):
        return "mamba2_ref"
    for name, folder in (("mamba_ssm", "/mamba_ssm/"), ("transformers", "/transformers/models/"),
                         ("fla", "/fla/ops/"), ("fla", "/fla/layers/")):
        if folder in path:
            return name
    return None


@functools.cache
def package_of(filename):
    """The folder of an installed package, "python" for Python itself, "" for any other file."""
    path = os.path.realpath(filename)
    before, installed, after = path.rpartition(os.sep + "site-packages" + os.sep)
    if installed:
        return before + installed + after.partition(os.sep)[0]
    return (
        "python"
        if path.startswith(os.path.realpath(sysconfig.get_path("stdlib"))) or "<" in filename
        else ""
    )


def is_kernels_own(frame, kernel):
    """Is it a line of the kernel, or of its surroundings? Many packages look at frames when they
    are imported."""
    if frame is None:
        return False
    code = getattr(inspect.unwrap(kernel), "__code__", None)
    home = package_of(code.co_filename) if code else ""
    return package_of(frame.f_code.co_filename) in ("", home)


def fingerprint():
    """What a kernel may not change: the judge, the oracle, and the parts of torch and Python that
    both use."""
    seen = {"the truths that it keeps": seal_of_truths()}
    for module in (sys.modules[__name__], mamba2_ref):
        for name, value in vars(module).items():
            if name.startswith("__"):
                continue
            seen[f"{module.__name__}.{name}"] = value_of(value)
            if inspect.isclass(value) and value.__module__ == module.__name__:
                for inner, part in vars(value).items():
                    if not inner.startswith("__") or inner == "__call__":
                        seen[f"{module.__name__}.{name}.{inner}"] = value_of(part)
    for owner, label in (
        (torch.Tensor, "torch.Tensor"),
        (torch, "torch"),
        (F, "torch.nn.functional"),
        (torch.autograd, "torch.autograd"),
        (builtins, "builtins"),
        (math, "math"),
        (io, "io"),
    ):
        for name, value in vars(owner).items():
            used = isinstance(value, BUILT_IN) or name in USED
            if used and not name.startswith("__"):
                seen[f"{label}.{name}"] = value_of(value)
    return seen


# Functions of C, and what the judge and the oracle use of those written in Python. torch replaces
# some when parts of it are first used: manual_seed, which is a method of generators here.
USED = {
    name
    for module in (sys.modules[__name__], mamba2_ref)
    for name in re.findall(r"\.(\w+)", inspect.getsource(module))
} - {"manual_seed"}
BUILT_IN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType,
            types.GetSetDescriptorType)


def value_of(value):
    function = inspect.unwrap(value) if callable(value) and not inspect.isclass(value) else value
    function = getattr(function, "__func__", function)
    if inspect.isfunction(function):
        defaults = repr((function.__defaults__, function.__kwdefaults__))
        cells = function.__closure__ if function.__module__ == __name__ else None
        cells = tuple(id(cell.cell_contents) for cell in cells or ())
        return id(value), id(function.__code__), defaults, cells
    if isinstance(value, (int, float, str, tuple, dict, set, frozenset)):
        return repr(value)
    return id(value)


def settings_of_torch():
    return {
        "the default dtype": torch.get_default_dtype(),
        "whether gradients are recorded": torch.is_grad_enabled(),
        "the precision of float32 products": torch.get_float32_matmul_precision(),
        "whether tf32 is allowed": torch.backends.cuda.matmul.allow_tf32,
        "whether autocast is on": torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda"),
        "the deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "the modes that see each operation": (
            torch._C._len_torch_function_stack(),
            torch._C._len_torch_dispatch_stack(),
        ),
    }


def changed(before, after):
    return [name for name in before if before[name] != after.get(name)]


# --- Ways of calling ------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    """One result of a kernel, and the case and seed whose truth it is held against."""
    label: str
    spec: str
    seed: int
    got: dict


def call(function, *args, **kwargs):
    return function(*args, **kwargs)


def run(function, inputs, grads=True, watched=call):
    """Forward and backward of a lifted scan: {"y", "final_states", "dx", "ddt", ...}."""
    leaves, outs = forward(function, inputs, grads)
    return gradients(leaves, outs, inputs, watched=watched) if grads else outs


def forward(function, inputs, grads=True):
    """grads: whether the inputs need a gradient, or the names of those that do."""
    needs = set(inputs.t) if grads is True else set(grads or ())
    leaves = {k: v.detach().requires_grad_(k in needs) for k, v in inputs.t.items()}
    outs = function(leaves, inputs.kw, inputs.q)
    marked = [k for k, v in leaves.items() if v.requires_grad != (k in needs)]
    if marked:
        raise Wrong(f"changes whether its inputs need a gradient: {', '.join(marked)}")
    for name, out in outs.items():
        if not torch.is_tensor(out):
            raise Wrong(f"{name} is {type(out).__name__}, not a tensor")
        if type(out) not in (torch.Tensor, torch.nn.Parameter):
            raise Wrong(f"{name} is a {type(out).__name__}, not a plain tensor")
    return leaves, outs


def gradients(leaves, outs, inputs, used=None, retain=False, watched=call):
    """autograd.grad of the outputs named in `used`, through `watched`, for each input that needs a
    gradient."""
    needs = {k: v for k, v in leaves.items() if v.requires_grad}
    for name in outs:
        reaches = name == "y" or set(needs) - {"C", "D", "z"}
        if reaches and not outs[name].requires_grad:
            raise Wrong(f"{name} does not require grad: the path back to the inputs is cut")
    used = [k for k in (used or outs) if outs[k].requires_grad]
    grads = watched(
        torch.autograd.grad,
        [outs[k] for k in used],
        list(needs.values()),
        [matched(inputs.d[k], outs[k]) for k in used],
        allow_unused=True,
        retain_graph=retain,
    )
    written = [k for k, v in leaves.items() if v.grad is not None]
    if written:
        raise Wrong(f"writes into .grad of its inputs: {', '.join(written)}")
    return dict(outs) | {"d" + k: g for k, g in zip(needs, grads, strict=False)}


def matched(d, out):
    """The gradient of an output whose dtype autocast has changed."""
    return d if d.dtype == out.dtype else d.to(out.dtype)


def detached(got, inputs):
    """On the CPU, with zeros for a gradient of None, as autograd has it."""
    full = {}
    for name, value in got.items():
        full[name] = torch.zeros_like(inputs.t[name[1:]]) if value is None else value.detach()
    return full


class Calls:
    """The ways of calling. Each takes the case and returns Results; `make(seed, **changes)` gives
    inputs."""

    def __init__(self, function, feature, case, dtype, settings, watched):
        self.function, self.feature, self.case, self.dtype = function, feature, case, dtype
        self.settings, self.seed, self.watched = settings, settings.seed, watched
        self.grads = settings.signature.grads and not settings.forward_only
        self.made = []  # (inputs, the case and seed to make them again)

    def make(self, seed=None, **changes):
        seed = self.seed if seed is None else seed
        case = self.case | changes
        inputs = self.settings.signature.build(
            self.feature, case, self.dtype, self.settings.device, seed
        )
        self.made.append((inputs, case, seed))
        return inputs

    def result(self, inputs, got, label=""):
        case, seed = next((case, seed) for made, case, seed in self.made if made is inputs)
        return Result(
            label, spell(self.feature, case, self.settings.signature), seed, detached(got, inputs)
        )

    def plain(self, label="", grads=None, **changes):
        inputs = self.make(**changes)
        got = run(self.function, inputs, self.grads if grads is None else grads, self.watched)
        return [self.result(inputs, got, label)]

    def no_grad(self):
        with torch.no_grad():
            results = self.plain("under torch.no_grad", False)
            results += self.needing("under torch.no_grad, where inputs need a gradient")
        return results + self.plain("where no input needs a gradient", False)

    def needing(self, label):
        """Inputs that need a gradient, and no backward pass."""
        inputs = self.make()
        _, got = forward(self.function, inputs)
        return [self.result(inputs, got, label)]

    def inference_mode(self):
        results = []
        for made_inside in (True, False):
            inputs = None if made_inside else self.make()
            with torch.inference_mode():
                inputs = inputs or self.make()
                got = run(self.function, inputs, False, self.watched)
            results.append(self.result(inputs, got, "under torch.inference_mode"))
        return results

    def one_gradient(self):
        results = []
        for name in self.make().t:
            results += self.plain(f"where only {name} needs a gradient", [name])
        return results

    def final_unused(self):
        inputs = self.make()
        leaves, outs = forward(self.function, inputs)
        got = gradients(leaves, outs, inputs, ["y"], watched=self.watched)
        return [self.result(inputs, got, "where the final state is returned and not used")]

    def final_alone(self):
        inputs = self.make()
        leaves, outs = forward(self.function, inputs)
        got = gradients(leaves, outs, inputs, ["final_states"], watched=self.watched)
        return [self.result(inputs, got, "where the loss uses the final state alone")]

    def backward_twice(self):
        inputs = self.make()
        leaves, outs = forward(self.function, inputs)
        first = gradients(leaves, outs, inputs, retain=True, watched=self.watched)
        first = self.result(inputs, {k: v if v is None else v.clone() for k, v in first.items()},
                            "in the first of two backward passes")
        second = gradients(leaves, outs, inputs, watched=self.watched)
        return [first, self.result(inputs, second, "in a second backward pass over one graph")]

    def checkpoint(self):
        inputs = self.make()

        def inner(leaves, kw, q):
            names = list(leaves)
            parts = checkpoint(
                lambda *values: self.function(dict(zip(names, values, strict=False)), kw, q),
                *leaves.values(),
                use_reentrant=False,
            )
            return dict(parts)
        leaves, outs = forward(inner, inputs)
        return [
            self.result(inputs, gradients(leaves, outs, inputs), "inside torch.utils.checkpoint")
        ]

    def autocast(self):
        inputs = self.make()
        with torch.autocast(torch.device(self.settings.device).type, torch.bfloat16):
            leaves, outs = forward(self.function, inputs)
        got = gradients(leaves, outs, inputs, watched=self.watched)
        return [self.result(inputs, got, "under torch.autocast")]

    def compile(self):
        return self.plain("under torch.compile")

    def repeats(self):
        return [self.plain(f"in call {i} of the same")[0] for i in (1, 2, 3, 4)]

    def second_call(self):
        """Earlier results are looked at after further calls: buffers may be used in turn."""
        made = [self.make(self.seed + i) for i in range(4)]
        got = [run(self.function, inputs, self.grads, self.watched) for inputs in made]
        return [self.result(*pair, f"in result {i} of 4, all looked at after the last call")
                for i, pair in enumerate(zip(made, got, strict=True), 1)]

    def fresh_values(self):
        """New values in the same memory, twice, and the first ones again."""
        room, results = None, []
        for i, label in enumerate(("first", "second", "third", "fourth")):
            inputs = self.make(self.seed + i % 3)
            if room is None:
                room = inputs
            else:
                for old, new in zip(room.tensors(), inputs.tensors(), strict=False):
                    old.data.copy_(new)                 # the same address, the same _version
            inputs.t, inputs.kw, inputs.d = room.t, room.kw, room.d
            got = run(self.function, inputs, self.grads, self.watched)
            got = {k: v if v is None else v.clone() for k, v in got.items()}
            results.append(
                self.result(inputs, got, f"in the {label} call, new values in the same memory")
            )
        for made, _case, _seed in self.made[:-1]:         # overwritten, on purpose
            made.t, made.kw, made.d = {}, {}, {}
        return results

    def interleaved(self):
        first, second = self.make(), self.make(self.seed + 1)
        results = []
        one, two = (
            forward(self.function, first, self.grads),
            forward(self.function, second, self.grads),
        )
        for inputs, (leaves, outs), label in ((first, one, "first"), (second, two, "second")):
            got = gradients(leaves, outs, inputs, watched=self.watched) if self.grads else outs
            results.append(
                self.result(inputs, got, f"in the {label} of two calls, both forward first")
            )
        return results

    def resized(self):
        """Longer, shorter, more rows, and the first again."""
        results, b, l = [], self.case["b"], self.case["l"]
        for i, changes in enumerate(
            (dict(), dict(l=max(1, l // 2)), dict(l=l + 9), dict(b=b + 1), dict())
        ):
            if "cu" in self.case["opts"]:
                changes.pop("b", None)
            results += self.plain(
                f"in call {i + 1}, after calls of other sizes", seed=self.seed + i, **changes
            )
        return results

    def accumulate(self):
        """.backward() twice, which adds to .grad."""
        inputs = self.make()
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.t.items()}
        results, before = [], {k: None for k in leaves}
        for label in ("first", "second"):
            outs = self.function(leaves, inputs.kw, inputs.q)
            self.watched(torch.autograd.backward, list(outs.values()), [inputs.d[k] for k in outs])
            got = {k: v.detach().clone() for k, v in outs.items()}
            for k, leaf in leaves.items():
                total = None if leaf.grad is None else leaf.grad.detach().double().clone()
                got["d" + k] = total if before[k] is None or total is None else total - before[k]
                before[k] = total
            results.append(
                self.result(inputs, got, f"in what the {label} .backward() adds to .grad")
            )
        return results


STATEFUL = {"fresh-values", "resized", "second-call", "interleaved", "accumulate", "repeats"}
NEEDS_GRADIENT = {
    "one-gradient",
    "final-unused",
    "final-alone",
    "backward-twice",
    "checkpoint",
    "autocast",
    "accumulate",
}


# --- One case -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """What came out for one case: "right", "wrong" or "not supported"; why; the worst error over
    its tolerance."""
    status: str
    why: str = ""
    worst: float = 0.0
    where: str = ""
    got: dict = None             # the result that is worst
    over: dict = None            # its errors over their tolerances, by name
    result: Result = None
    note: str = ""
    spec: str = ""
    dtype: torch.dtype = None
    refused: bool = False        # raised, by its own will or not
    deterministic: bool = True
    trail: tuple = ()  # of each result: where it came, and its worst error over its tolerance


SAYS_SO = re.compile(
    r"support|implement|divisible|multiple of|power of|out of resource|no working C\+\+ compiler",
    re.I,
)
SAYS_SO_IF_RAISED = re.compile(
    r"must|has to|have to|need|expect|requir|should|at most|at least|limit|cannot|can't"
    r"|\bonly\b|\bno\b|too (large|small|long|short|many)",
    re.I,
)
NOT_SO = re.compile(r"unsupported operation: |unsupported operand", re.I)


def lacking(error, watch):
    """Does the error say that a feature is lacking? The words, or None."""
    text = f"{type(error).__name__}: {error}".split("\n")[0]
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, NotImplementedError):
        return text
    if isinstance(error, TypeError):
        if not watch.forward:
            return None
        if os.path.realpath(frames[-1].filename) == os.path.realpath(
            __file__
        ):  # it came to no line of the kernel's
            return text
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        return text if unexpected and not names_argument(watch.kernel, unexpected[1]) else None
    triton = type(error).__module__.startswith("triton")
    if not isinstance(error, (ValueError, AssertionError, RuntimeError)) and not triton:
        return None
    raised = re.search(r"\b(raise|assert)\b", frames[-1].line or "")
    own_will = raised and "/torch/" not in frames[-1].filename
    says = SAYS_SO.search(str(error)) or (own_will and SAYS_SO_IF_RAISED.search(str(error)))
    return text if says and not NOT_SO.search(str(error)) else None


def names_argument(kernel, name):
    try:
        return name in inspect.signature(kernel).parameters
    except (TypeError, ValueError):
        return False


def judge_case(kernel, spec, dtype, settings=Settings(), precision=None, again=True):
    """Run one case and compare every output and gradient with the truth.

    No truth is in memory while the kernel runs: it is made afterwards.
    """
    signature = settings.signature
    feature, case = parse(spec, signature)
    way = options_of(case).get("call", "plain").replace("-", "_")
    watch = Watch(kernel, settings)
    if way == "compile":
        torch.compiler.reset()
        watch.kernel = torch.compile(kernel, backend=settings.compile_backend)
        watch.settings = settings.but(allow_delegation=True)            # it sees Python only

    def function(t, kw, q):
        return signature.call(watch, t, kw, q)

    calls = Calls(function, feature, case, dtype, settings, watch.run)
    torch_state = settings_of_torch()
    state = fingerprint() | {
        k: v for k, v in ORIGINAL.items() if k.startswith((__name__, "mamba2_ref"))
    }
    results, trouble = [], None
    with contextlib.ExitStack() as stack:
        if way != "compile":
            stack.enter_context(Poison(math.nan if settings.poison else 0.0))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            results = getattr(calls, way)()
        except Wrong as error:
            trouble = Outcome("wrong", str(error), INF, "call")
        except Exception as error:
            trouble = after_error(error, watch, calls)
    outcome = misconduct(watch, calls, state, torch_state) or trouble
    outcome = outcome or compared(results, dtype, precision, way, settings)
    outcome.spec, outcome.dtype = spec, dtype
    if outcome.status == "wrong" and again:
        second_look(kernel, outcome, settings, precision)
    if outcome.status == "not supported" and outcome.why.startswith("no backward") and again:
        alone = judge_case(
            kernel, spec, dtype, settings.but(forward_only=True), precision, again=False
        )
        if alone.status == "wrong":
            outcome = dataclasses.replace(
                alone, why=alone.why or "in the forward pass", spec=spec, dtype=dtype
            )
    if outcome.status == "wrong" and dtype == torch.float64 and precision is None:
        less = judge_case(kernel, spec, dtype, settings, torch.float32, again=False)
        if less.status == "right":
            outcome = Outcome(
                "not supported", "takes float64 but computes in float32", spec=spec, dtype=dtype
            )
    if feature in OPTIONAL and outcome.status == "wrong":
        outcome.status, outcome.why = (
            "not supported",
            f"optional, and not as official kernels do it: {amiss(outcome)}",
        )
    return outcome


def after_error(error, watch, calls):
    lacks = lacking(error, watch)
    frames = traceback.extract_tb(error.__traceback__)
    at = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}, {frames[-1].line}"
    first_line = str(error).strip().split("\n")[0]
    if lacks and not watch.forward and calls.grads:
        return Outcome(
            "not supported", f"no backward pass ({lacks}); --forward-only judges the forward pass"
        )
    if lacks:
        return Outcome("not supported", lacks)
    return Outcome(
        "wrong", f"raised {type(error).__name__}: {first_line} ({at})", INF, "call", refused=True
    )


def misconduct(watch, calls, state, torch_state):
    """What a kernel must not do whatever its results are: an Outcome, or None."""
    differing = changed(state, fingerprint())
    if differing:
        return Outcome(
            "wrong",
            f"reaches into the judge or its tools: changed {', '.join(differing[:4])}",
            INF,
            "call",
        )
    if watch.reached:
        return Outcome("wrong", f"reaches into the judge: calls {watch.reached}", INF, "call")
    if watch.handed_on:
        return Outcome(
            "wrong",
            f"hands the call on to a reference, {watch.handed_on}; --allow-delegation admits it",
            INF,
            "call",
        )
    differing = changed(torch_state, settings_of_torch())
    if differing:
        return Outcome(
            "wrong", f"leaves a setting of torch changed: {', '.join(differing)}", INF, "call"
        )
    for inputs, case, seed in calls.made:
        fresh = calls.settings.signature.build(
            calls.feature, case, calls.dtype, calls.settings.device, seed
        )
        for given, same in ((inputs.t, fresh.t), (inputs.kw, fresh.kw), (inputs.d, fresh.d)):
            for name, value in given.items():
                if torch.is_tensor(value) and not torch.equal(value, same[name]):
                    return Outcome(
                        "wrong", f"the kernel writes into its inputs: {name}", INF, "inputs"
                    )
    return None


def compared(results, dtype, precision, way, settings):
    """Hold every result against its truth."""
    single = torch.promote_types(dtype, torch.float32)
    tolerance = precision or dtype
    if way == "autocast":
        tolerance = torch.bfloat16 if dtype != torch.float16 else dtype
    worst, drift, base, trail = Outcome("right"), 0.0, None, []
    for result in results:
        feature, case = parse(result.spec, settings.signature)
        want, limits = truth(result.spec, dtype, tolerance, settings, result.seed)
        inputs = settings.signature.build(feature, case, dtype, seed=result.seed)
        label = f" {result.label}" if result.label else ""
        got = {}
        for name, value in result.got.items():
            if name not in want:
                continue
            if value.shape != want[name].shape:
                why = f"{name} has shape {tuple(value.shape)}, not {tuple(want[name].shape)}{label}"
                return Outcome("wrong", why, INF, name)
            expected = {"y": dtype, "final_states": single}.get(name)
            if expected and value.dtype != expected and precision is None and way != "autocast":
                if dtype == torch.float64:
                    return Outcome(
                        "not supported", f"returns {name} in {value.dtype} for float64 inputs"
                    )
                return Outcome(
                    "wrong", f"{name} is {value.dtype}, not {expected}{label}", INF, name
                )
            got[name] = value.cpu()
            if name in inputs.free:
                free = inputs.free[name]
                place = slice(None) if free is None else free
                got[name] = got[name].clone()
                got[name][place] = want[name][place].to(got[name].dtype)
        over = {k: max(float(e.max()) for e in excess(got[k], want[k], limits[k], k)) for k in got}
        where = max(over, key=over.get)
        trail.append((result.label, over[where], result.seed))
        if over[where] > worst.worst or worst.got is None:
            why = result.label if over[where] > 1 else ""
            worst = Outcome(
                "right" if over[where] <= 1 else "wrong", why, over[where], where, got, over, result
            )
        if way == "repeats":
            base = base or got
            for k in over:
                drift = max(
                    [drift]
                    + [float(e.max()) for e in excess(got[k], base[k].double(), limits[k], k)]
                )
    worst.trail = tuple(trail)
    if drift > 0.5:
        worst.status, worst.deterministic = "wrong", False
        worst.why, worst.worst = (
            f"repeats differ, by {drift:.2g} of the tolerance",
            max(worst.worst, drift),
        )
    elif drift > 0:
        worst.note = "repeats differ by rounding, as with atomics"
    return worst


def second_look(kernel, outcome, settings, precision):
    """Make the same call again: do the results differ?"""
    if outcome.where in ("call", "inputs") and not outcome.refused:
        return
    other = judge_case(kernel, outcome.spec, outcome.dtype, settings, precision, again=False)
    if other.status == "wrong" and other.where in ("call", "inputs") and outcome.refused:
        return
    if other.status != "wrong" or other.got is None or outcome.got is None:
        outcome.deterministic = other.status == "wrong" and (other.got is None) == (
            outcome.got is None
        )
    elif other.result.label == outcome.result.label:
        _, limits = truth_of(outcome, settings)
        for name in outcome.got:
            if name in other.got and not same(
                outcome.got[name], other.got[name], limits[name], name
            ):
                outcome.deterministic = False
    if not outcome.deterministic:
        then = "" if other.status == "wrong" else f", {other.status} the second time"
        outcome.note = f"not deterministic: the same call gives other results{then}"


def same(one, two, limits, name):
    if not torch.equal(one.isfinite(), two.isfinite()):
        return False
    one, two = (t.double().nan_to_num(0, 0, 0) for t in (one, two))
    return all(float(e.max()) <= 0.5 for e in excess(one, two, limits, name))


def truth_of(outcome, settings):
    """The truth and the tolerances that an outcome was held against."""
    result = outcome.result
    way = options_of(parse(result.spec, settings.signature)[1]).get("call")
    precision = outcome.dtype
    if way == "autocast" and precision != torch.float16:
        precision = torch.bfloat16
    return truth(result.spec, outcome.dtype, precision, settings, result.seed)


def amiss(outcome):
    """What is wrong, in a line."""
    forward = ("y", "final_states")                          # gradients follow from these
    over = (outcome.over or {}).items()
    over = sorted(over, key=lambda pair: (pair[0] not in forward, -pair[1]))
    numbers = ", ".join(f"{k} {v:.3g}x its tolerance" for k, v in over if v > 1)
    return "; ".join(filter(None, [outcome.why, numbers, outcome.note]))


# --- What is wrong, precisely enough to find the line ---------------------------------------------


def shrink(kernel, spec, dtype, seconds, settings=Settings()):
    """The smallest case that is still wrong: drop options and halve sizes for as long as it is, and
    time allows."""
    feature, case = parse(spec, settings.signature)
    end, progress = time.monotonic() + seconds, True
    while progress:
        progress = False
        words = case["opts"].split()
        moves = [{"opts": " ".join(words[:i] + words[i + 1 :])} for i in range(len(words))
                 if not words[i].startswith("cu=")]
        moves += [dict(b=1), dict(h=1, g=1), dict(h=2, g=2), dict(h=2, g=1), dict(p=1), dict(n=1)]
        moves += [dict(q=q, l=l) for q in (case["q"], 2, 4, 8)
                  for l in (1, 2, q - 1, q, q + 1, 2 * q + 1, case["l"] // 2)]
        moves += [dict(p=case["p"] // 2), dict(n=case["n"] // 2), dict(l=case["l"] - 1)]
        if isinstance(kernel, torch.nn.Module):  # its sizes are what they are
            moves = [move for move in moves if not set(move) & set("hpgn")]
        for move in moves:
            smaller = case | move
            if time.monotonic() > end:
                break
            sizes = [smaller[k] for k in "blhpgnq"]
            if min(sizes) < 1 or smaller["h"] % smaller["g"] or not size(smaller) < size(case):
                continue
            if size(smaller)[1] > size(case)[1]:
                continue
            found = spell(feature, smaller, settings.signature)
            if judge_case(kernel, found, dtype, settings, again=False).status == "wrong":
                case, progress = smaller, True
                break
    return spell(feature, case, settings.signature)


def size(case):
    return len(case["opts"].split()), math.prod(case[k] for k in "blhpng"), case["q"]


AXES = {
    "y": "batch position head headdim",
    "final_states": "batch head headdim state",
    "dA": "head",
    "ddt_bias": "head",
    "ddt": "batch position head",
    "dB": "batch position group state",
    "dC": "batch position group state",
    "dx": "batch position head headdim",
    "dz": "batch position head headdim",
    "dD": "head headdim",
    "dinitial_states": "batch head headdim state",
    "du": "batch position channel",
}


def axes_of(name, settings):
    if settings.signature.name == "layer":
        return {"y": "batch position channel", "du": "batch position channel"}.get(
            name, "row column"
        ).split()
    return AXES[name].split()


def locate(name, outcome, settings):
    """Where the error starts, in words."""
    want, limits = truth_of(outcome, settings)
    q = parse(outcome.result.spec, settings.signature)[1]["q"]
    _, ratio = excess(outcome.got[name], want[name], limits[name], name)
    bad = (
        ratio > 1 if bool((ratio > 1).any()) else ratio == ratio.max()
    )  # else the mean square is too large
    axes = axes_of(name, settings)
    spots = bad.nonzero().tolist()
    at = axes.index("position") if "position" in axes else 0
    spot = min(spots, key=lambda s: (s[at], *s))
    words = []
    for axis, i in zip(axes, spot, strict=False):
        words.append(
            f"{axis} {i}" + (f" (chunk {i // q}, place {i % q})" if axis == "position" else "")
        )
    return (f"{name}: {int(bad.sum())} of {bad.numel()} wrong, first at {', '.join(words)}: "
            f"got {outcome.got[name][tuple(spot)]:.6g}, truth {want[name][tuple(spot)]:.6g}")


def without(kw, *names):
    return {k: v for k, v in kw.items() if k not in names}


def gate(function):
    """y as the oracle has it, but with another gate on z: function(the scan alone, D x, z)."""
    def variant(x, dt, A, B, C, q, D=None, z=None, return_final_states=False, **kw):
        y, final = mamba2_ref.ssd_recurrent(x, dt, A, B, C, return_final_states=True, **kw)
        skip = 0 if D is None else x * (D if D.dim() == 2 else D[:, None])
        y = function(y, skip, z) if z is not None else y + skip
        return (y, final) if return_final_states else y
    return variant


def step(function):
    """The oracle with another formula for the step: function(dt, dt_bias, dt_softplus, (low,
    high))."""
    def variant(x, dt, A, B, C, q, dt_bias=None, dt_softplus=False, dt_limit=(0.0, INF), **kw):
        bias = torch.zeros_like(A) if dt_bias is None else dt_bias
        soft = F.softplus if dt_softplus else lambda t: t
        dt = function(dt, bias, soft, dt_limit)
        return bare(x, dt, dt * A, B, C, **kw)
    return variant


def decay(function):
    """The oracle with other decays: function(x, dt, a) -> (v, a), where the scan takes v = dt x and
    a = dt A."""
    def variant(x, dt, A, B, C, q, dt_bias=None, dt_softplus=False, dt_limit=(0.0, INF), **kw):
        dt = dt if dt_bias is None else dt + dt_bias
        dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
        v, a = function(x, dt, dt * A)
        return bare(x, dt, a, B, C, v=v, **kw)
    return variant


def bare(
    x,
    dt,
    a,
    B,
    C,
    *,
    v=None,
    D=None,
    z=None,
    initial_states=None,
    seq_idx=None,
    return_final_states=False,
):
    """The recurrence on v = dt x and a = dt A, whatever their signs: the oracle refuses negative
    steps."""
    r = x.shape[2] // B.shape[2]
    v = dt[..., None] * x if v is None else v
    B, C = B.repeat_interleave(r, 2), C.repeat_interleave(r, 2)
    state = initial_states
    if state is None:
        state = x.new_zeros(*x[:, 0].shape, B.shape[-1])
    ys = []
    for i in range(x.shape[1]):
        if seq_idx is not None and i:
            state = torch.where(
                (seq_idx[:, i] == seq_idx[:, i - 1])[:, None, None, None], state, 0.0
            )
        state = a[:, i, :, None, None].exp() * state + v[:, i, :, :, None] * B[:, i, :, None]
        ys.append((state * C[:, i, :, None]).sum(-1))
    y = skip_and_gate(torch.stack(ys, 1), x, D, z, Exact)
    return (y, state) if return_final_states else y


def straight(soft, dt):
    """softplus, with the slope of the identity."""
    return dt + (soft(dt) - dt).detach()


def borders(function):
    """The oracle with other borders between packed sequences: function(seq_idx, chunk) ->
    seq_idx."""
    def variant(x, dt, A, B, C, q, seq_idx=None, **kw):
        seq_idx = torch.zeros(x.shape[:2], dtype=torch.int64) if seq_idx is None else seq_idx.long()
        return mamba2_ref.ssd_recurrent(x, dt, A, B, C, seq_idx=function(seq_idx, q), **kw)
    return variant


def per_group(function):
    def variant(x, dt, A, B, C, q, **kw):
        heads, groups = torch.arange(x.shape[2]), B.shape[2]
        index = function(heads, len(heads) // groups, groups)
        return mamba2_ref.ssd_recurrent(x, dt, A, B[:, :, index], C[:, :, index], **kw)
    return variant


def blind(x, dt, A, B, C, q, return_final_states=False, **kw):
    """The oracle without what a token sees of itself, for cases that leave the step alone."""
    if set(kw) & {"z", "dt_bias", "dt_softplus", "dt_limit"}:
        raise NotImplementedError
    y, final = mamba2_ref.ssd_recurrent(x, dt, A, B, C, return_final_states=True, **kw)
    y = y - ((B * C).sum(-1).repeat_interleave(x.shape[2] // B.shape[2], 2) * dt)[..., None] * x
    return (y, final) if return_final_states else y


def late_reading(x, dt, A, B, C, q, D=None, z=None, return_final_states=False, **kw):
    """y_t read from the state of the token before."""
    y0 = x[:, :1] * 0
    if kw.get("initial_states") is not None:
        state = kw["initial_states"]
        y0 = (state * C[:, 0].repeat_interleave(x.shape[2] // C.shape[2], 1)[:, :, None]).sum(-1)[
            :, None
        ]
    y, final = mamba2_ref.ssd_recurrent(
        x[:, :-1], dt[:, :-1], A, B[:, :-1], C[:, 1:], return_final_states=True, **kw
    )
    final = mamba2_ref.ssd_recurrent(x, dt, A, B, C, return_final_states=True, **kw)[1]
    y = skip_and_gate(torch.cat([y0, y], 1), x, D, z, Exact)
    return (y, final) if return_final_states else y


def step_late(x, dt, A, B, C, q, initial_states, **kw):
    """The first token takes the initial state as it is, where the step is plain."""
    if set(kw) & {"dt_bias", "dt_softplus", "dt_limit"}:
        raise NotImplementedError
    grown = initial_states / (dt[:, 0] * A).exp()[..., None, None]
    return oracle(x, dt, A, B, C, q, initial_states=grown, **kw)


def oracle(x, dt, A, B, C, q, **kw):
    return mamba2_ref.ssd_recurrent(x, dt, A, B, C, **kw)


def transposed(state):
    """The state that a kernel meant which read or wrote the memory of `state` as (b, h, n, p)."""
    return state.flatten(2).unflatten(2, state.shape[:1:-1]).mT


def clamp(t, limit):
    return t.clamp(*limit)


def chunk_of(seq, q):
    return torch.arange(seq.shape[1]) // q


def only_inside(seq, q):
    """Borders that lie inside a chunk."""
    return F.pad((seq.diff(dim=1) != 0) & (torch.arange(1, seq.shape[1]) % q > 0), (1, 0)).cumsum(1)


def at_borders(a, q, times):
    """a, counted so many times where the state enters a chunk after the first."""
    place = torch.arange(a.shape[1])
    return torch.where(((place > 0) & (place % q == 0))[:, None], times * a, a)


def shifted(a, by):
    """a of the token before (1) or after (-1), and 0 at the end."""
    return F.pad(a[:, :-1], (0, 0, 1, 0)) if by == 1 else F.pad(a[:, 1:], (0, 0, 0, 1))


# Known mistakes as mistaken oracles. A kernel whose outputs, or else whose gradients, are those of
# one has made it.
MISTAKES = {
    "D x is left out": lambda *a, **kw: oracle(*a, **without(kw, "D")),
    "only D[:, 0] is used, as if D had no headdim": lambda *a, **kw: oracle(
        *a, **kw | {"D": kw["D"][:, 0]}
    ),
    "the gate z is left out": lambda *a, **kw: oracle(*a, **without(kw, "z")),
    "the gate is applied before D x is added": gate(lambda y, skip, z: y * F.silu(z) + skip),
    "the gate is sigmoid(z), not silu(z)": gate(lambda y, skip, z: (y + skip) * z.sigmoid()),
    "the gate is z, without silu": gate(lambda y, skip, z: (y + skip) * z),
    "dt_bias is left out": lambda *a, **kw: oracle(*a, **without(kw, "dt_bias")),
    "negative steps are not clamped to 0, as dt_limit=(0, inf) asks": step(
        lambda dt, bias, soft, limit: (
            soft(dt + bias).clamp(max=limit[1])
            if limit[0] == 0 and soft is not F.softplus
            else None
        )
    ),
    "negative steps are made positive, not clamped to 0": step(
        lambda dt, bias, soft, limit: soft(dt + bias).abs()
    ),
    "dt_softplus is ignored": lambda *a, **kw: oracle(*a, **without(kw, "dt_softplus")),
    "dt_softplus is ignored, and negative steps are not clamped": step(
        lambda dt, bias, soft, limit: dt + bias if soft is F.softplus else None
    ),
    "dt_bias is added after softplus": step(
        lambda dt, bias, soft, limit: clamp(soft(dt) + bias, limit)
    ),
    "dt_limit is ignored": lambda *a, **kw: oracle(*a, **without(kw, "dt_limit")),
    "dt_limit is ignored, and negative steps are not clamped": step(
        lambda dt, bias, soft, limit: soft(dt + bias)
    ),
    "dt is clamped before softplus": step(
        lambda dt, bias, soft, limit: soft(clamp(dt + bias, limit))
    ),
    "dt is clamped before dt_bias is added": step(
        lambda dt, bias, soft, limit: soft(clamp(dt, limit) + bias)
    ),
    "dt is clamped from one side only": step(
        lambda dt, bias, soft, limit: soft(dt + bias).clamp(max=limit[1])
    ),
    "dt is clamped from one side only (the lower)": step(
        lambda dt, bias, soft, limit: soft(dt + bias).clamp(min=limit[0])
    ),
    "initial_states are ignored": lambda *a, **kw: oracle(*a, **without(kw, "initial_states")),
    "the first token's own step does not decay the initial state": step_late,
    "initial_states are read transposed": lambda *a, **kw: oracle(
        *a, **kw | {"initial_states": transposed(kw["initial_states"])}
    ),
    "seq_idx is ignored: the state leaks over the borders": borders(lambda seq, q: seq * 0),
    "the state leaks over borders inside a chunk": borders(
        lambda seq, q: seq[:, chunk_of(seq, q) * q]
    ),
    "the state leaks over borders that lie between two chunks": borders(only_inside),
    "the state is emptied one token late": borders(lambda seq, q: F.pad(seq, (1, 0))[:, :-1]),
    "the state is emptied one token early": borders(
        lambda seq, q: torch.cat([seq[:, 1:], seq[:, -1:]], 1)
    ),
    "a sequence number that falls is not taken for a border": borders(
        lambda seq, q: seq.cummax(1).values
    ),
    "a sequence number that rises is not taken for a border": borders(
        lambda seq, q: seq.cummin(1).values
    ),
    "sequence numbers are cut to 8 bits": borders(lambda seq, q: seq % 256),
    "sequence numbers are cut to 16 bits": borders(lambda seq, q: seq % 65536),
    "a token does not see itself: the diagonal of L is left out": blind,
    "no state passes from chunk to chunk": borders(lambda seq, q: seq * 10**6 + chunk_of(seq, q)),
    "heads take their groups in turn (head % ngroups), not in blocks": per_group(
        lambda head, r, g: head % g
    ),
    "all heads use group 0": per_group(lambda head, r, g: head * 0),
    "B and C are exchanged": lambda x, dt, A, B, C, q, **kw: oracle(x, dt, A, C, B, q, **kw),
    "A is taken with the wrong sign": lambda x, dt, A, B, C, q, **kw: oracle(
        x, dt, -A, B, C, q, **kw
    ),
    "x is not multiplied by dt": decay(lambda x, dt, a: (x, a)),
    "the decay is off by one token: each uses that of the token before": decay(
        lambda x, dt, a: (dt[..., None] * x, shifted(a, 1))
    ),
    "the decay is off by one token: each uses that of the token after": decay(
        lambda x, dt, a: (dt[..., None] * x, shifted(a, -1))
    ),
    "the decay is off by one token: a token's own part is decayed by its own step": decay(
        lambda x, dt, a: (dt[..., None] * x * a.exp()[..., None], a)
    ),
    "a state that enters a chunk is decayed once too often": lambda x, dt, A, B, C, q, **kw: decay(
        lambda x, dt, a: (dt[..., None] * x, at_borders(a, q, 2))
    )(x, dt, A, B, C, q, **kw),
    "a state that enters a chunk is decayed once too little": lambda x, dt, A, B, C, q, **kw: decay(
        lambda x, dt, a: (dt[..., None] * x, at_borders(a, q, 0))
    )(x, dt, A, B, C, q, **kw),
    "a token reads the state before it writes into it: y lags by one token": late_reading,
    "there is no decay": decay(lambda x, dt, a: (dt[..., None] * x, a * 0)),
    "the decay takes A without dt": decay(lambda x, dt, a: (dt[..., None] * x, a / dt)),
}
# Mistakes that show in gradients alone.
SLOPES = {
    "the slope of softplus is missing": step(
        lambda dt, bias, soft, limit: (
            straight(soft, dt + bias).clamp(*limit) if soft is F.softplus else None
        )
    ),
    "the slope of the limits is missing: a clamped step gets a gradient": step(
        lambda dt, bias, soft, limit: (
            soft(dt + bias) + (clamp(soft(dt + bias), limit) - soft(dt + bias)).detach()
        )
    ),
    "the gradient of dt through the decay is missing": decay(
        lambda x, dt, a: (
            dt[..., None] * x,
            a - (dt - dt.detach()) * (a / dt.clamp(min=1e-30)).detach(),
        )
    ),
    "the gradient of dt through dt x is missing": decay(
        lambda x, dt, a: (dt.detach()[..., None] * x, a)
    ),
}


def only_one_direction(t, kw, q):
    y = outputs(oracle, {k: v for k, v in t.items() if k not in ("D", "z")}, kw, q)["y"]
    return {"y": skip_and_gate(y, t["x"], t.get("D"), t.get("z"), Exact)}


def twice_closed(t, kw, q):
    """D and the gate in each direction."""
    flipped = t | {k: t[k].flip(1) for k in ("x", "B", "C", "dt", "z") if k in t}
    return {"y": outputs(oracle, t, kw, q)["y"] + outputs(oracle, flipped, kw, q)["y"].flip(1)}


def not_flipped_back(t, kw, q):
    inner = {k: v for k, v in t.items() if k not in ("D", "z")}
    flipped = inner | {k: inner[k].flip(1) for k in ("x", "B", "C", "dt")}
    y = outputs(oracle, inner, kw, q)["y"] + outputs(oracle, flipped, kw, q)["y"]
    return {"y": skip_and_gate(y, t["x"], t.get("D"), t.get("z"), Exact)}


def counted_once(t, kw, q):
    """The token itself in one direction alone."""
    inner = {k: v for k, v in t.items() if k not in ("D", "z")}
    flipped = inner | {k: inner[k].flip(1) for k in ("x", "B", "C", "dt")}
    y = outputs(oracle, inner, kw, q)["y"] + outputs(blind, flipped, kw, q)["y"].flip(1)
    return {"y": skip_and_gate(y, t["x"], t.get("D"), t.get("z"), Exact)}


def one_row(t, kw, q):
    """Packed rows read as one sequence."""
    kw = without(kw, "cu_seqlens", "return_final_states")
    return {"y": outputs(oracle, without(t, "initial_states"), kw, q)["y"]}


def first_state_for_all(t, kw, q):
    first = t["initial_states"][:1].expand_as(t["initial_states"])
    return lift_varlen(oracle)(t | {"initial_states": first}, kw, q)


def norm_before_gate(y, z, groups, noise):
    y = y.unflatten(-1, (groups, -1))
    return (y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(-2) * F.silu(z)


def norm_of_all_groups(y, z, groups, noise):
    return gated_norm(y, z, 1, noise)


def looks_ahead(t, kw, q):
    return lift_layer(oracle, ahead=t["conv1d__weight"].shape[-1] - 1)(t, kw, q)


OTHER_MISTAKES = {
    "bidirectional": {
        "only the forward direction is scanned": only_one_direction,
        "D and the gate are applied in each direction, not once on the sum": twice_closed,
        "the backward result is not flipped back": not_flipped_back,
        "a token's own part is counted in one direction only": counted_once,
    },
    "varlen": {
        "cu_seqlens is ignored: the state leaks over the borders": one_row,
        "all sequences start from the first sequence's state": first_state_for_all,
    },
    "layer": {
        "the norm comes before the gate": lift_layer(oracle, norm=norm_before_gate),
        "one norm for all groups": lift_layer(oracle, norm=norm_of_all_groups),
        "the convolution looks ahead": looks_ahead,
    },
}


def explain(kernel, outcome, settings, deadline=INF):
    """Hints, the most telling first: what mistake it looks like, and in which part of the tensors
    it shows."""
    feature, case = parse(outcome.spec, settings.signature)
    if not outcome.deterministic:
        return [outcome.note or outcome.why]
    dtype, options = outcome.dtype, options_of(case)
    hints = []
    passed = [label for label, over, _ in outcome.trail if over <= 1]
    if options.get("call") in STATEFUL and passed and outcome.got is not None:
        hints += remembered(outcome, settings)
        return hints + [
            f"right {passed[0]}, wrong {outcome.result.label}: it keeps state between calls"
        ]
    for word, value in options.items():
        if word not in ("layout", "dy", "call") or (word, value) == ("dy", "zero"):
            continue
        rest = " ".join(w for w in case["opts"].split() if not w.startswith(word + "="))
        plain = spell(feature, case | {"opts": rest}, settings.signature)
        if judge_case(kernel, plain, dtype, settings, again=False).status == "right":
            hints.append(right_without(word, value, outcome))
            if outcome.got is None:
                hints += refusal_hints(kernel, outcome, settings)
            if word == "layout":
                hints += guilty_inputs(kernel, outcome, settings)
            return hints
    if outcome.got is None:
        return refusal_hints(kernel, outcome, settings)
    hints += hints_on_numbers(kernel, outcome, settings, deadline)
    wrong = [k for k in outcome.over if outcome.over[k] > 1]
    outputs_wrong = [k for k in wrong if k in ("y", "final_states")]
    if not outputs_wrong:
        hints.append(
            f"forward is right; only {', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} wrong"
            + {
                ("dA", "ddt"): ": the gradient of the running sum of dt A",
                ("dA",): ": its sum over batch and length",
                ("ddt",): ": what comes to it through dt x",
            }.get(tuple(sorted(set(wrong) - {"ddt_bias"})), "")
        )
    elif outputs_wrong == ["final_states"] and outcome.over.get("y", 0) <= 1:
        partial = ", and the length is no multiple of the chunk" if case["l"] % case["q"] else ""
        hints.append(f"y is right, final_states are not{partial}")
    if not (hints and outputs_wrong):  # a known mistake says more than where it shows
        hints += [hint for name in wrong[:3] for hint in pattern(name, outcome, settings)]
    return list(dict.fromkeys(filter(None, hints)))


def right_without(word, value, outcome):
    if word == "layout":
        what = {
            "odd": "inputs with odd strides",
            "projection": "slices of one wide projection",
            "channel-first": "inputs whose last stride is not 1",
            "offset": "inputs with a storage offset",
            "expanded": "inputs expanded along the batch (stride 0)",
            "expanded-heads": "parameters expanded over the heads, B and C over the groups"
            " (stride 0)",
        }[value]
        return f"right for contiguous tensors, wrong for {what}"
    if word == "dy":
        what = {"expanded": "a gradient of y with stride 0, as y.sum() gives",
                "channel-first": "a gradient of y whose last stride is not 1",
                "odd": "a gradient of y with odd strides"}[value]
        return f"right for contiguous tensors, wrong for {what}"
    label = (
        outcome.result.label
        if outcome.result
        else {
            "no_grad": "under torch.no_grad",
            "inference_mode": "under torch.inference_mode",
            "checkpoint": "inside torch.utils.checkpoint",
            "autocast": "under torch.autocast",
            "compile": "under torch.compile",
            "backward-twice": "in a second backward pass over one graph",
            "one-gradient": "where one input alone needs a gradient",
            "final-unused": "where the final state is returned and not used",
            "final-alone": "where the loss uses the final state alone",
        }.get(value, f"in {value}")
    )
    if value in STATEFUL:
        return f"right when called once, wrong {label}: it keeps state between calls"
    return f"right when called plainly, wrong {label}"


def remembered(outcome, settings):
    """Is the result that of an earlier call?"""
    seed, got = outcome.result.seed, outcome.got
    for earlier in dict.fromkeys(s for _, _, s in outcome.trail if s != seed):
        want, limits = truth(outcome.result.spec, outcome.dtype, outcome.dtype, settings, earlier)
        if all(close(got[k], want[k], limits[k], k) for k in got if k in ("y", "final_states")):
            return [
                "returns the result of an earlier call: "
                "results are remembered by shape or by pointer"
            ]
    return []


def guilty_inputs(kernel, outcome, settings):
    """Which inputs does the layout matter for?"""
    feature, case = parse(outcome.spec, settings.signature)
    rest = " ".join(w for w in case["opts"].split() if not w.startswith("layout="))
    guilty = []
    for name in settings.signature.build(feature, case, outcome.dtype).t:
        def one(feature, other, *args, name=name, **kwargs):
            plain = settings.signature.build(feature, case | {"opts": rest}, *args, **kwargs)
            whole = settings.signature.build(feature, case, *args, **kwargs)
            if "expanded" in case["opts"]:
                return whole if name in whole.t else plain
            plain.t[name] = whole.t[name]
            return plain
        if "expanded" in case["opts"]:
            break
        signature = dataclasses.replace(settings.signature, build=one)
        got = judge_case(
            kernel, outcome.spec, outcome.dtype, settings.but(signature=signature), again=False
        )
        if got.status == "wrong":
            guilty.append(name)
    return [f"it is the layout of {', '.join(guilty)}"] if guilty else []


def refusal_hints(kernel, outcome, settings):
    feature, case = parse(outcome.spec, settings.signature)
    l, q = case["l"], case["q"]
    if "number of gradients" in outcome.why:
        return [
            "backward must return one value per argument of forward, "
            "None for those without a gradient"
        ]
    if "the path back" in outcome.why:
        return ["a kernel without a backward pass is judged with --forward-only"]
    if "second time" in outcome.why:
        return ["saved tensors are freed: a graph cannot be used twice"]
    if outcome.refused and l % q:
        whole = spell(feature, case | {"l": 2 * q}, settings.signature)
        if judge_case(kernel, whole, outcome.dtype, settings, again=False).status == "right":
            return ["refuses a length that is no multiple of the chunk"]
    return []


def hints_on_numbers(kernel, outcome, settings, deadline):
    """Not a number; else a known mistake; else zero or a factor; else precision."""
    feature, case = parse(outcome.result.spec, settings.signature)
    got, over, _dtype = outcome.got, outcome.over, outcome.dtype
    wrong = [k for k in over if over[k] > 1]
    if any(not got[k].isfinite().all() for k in wrong):
        return hints_on_nan(kernel, outcome, settings, wrong)
    want, limits = truth_of(outcome, settings)
    outputs_wrong = [k for k in wrong if k in ("y", "final_states")]
    if not outputs_wrong:
        zero = [k for k in wrong if got[k].double().abs().max() == 0]
        if zero:
            return [
                f"{', '.join(zero)} {'is' if len(zero) == 1 else 'are'} zero throughout, or None"
            ]
    if not in_finer_dtype(kernel, outcome, settings):
        return precision_hint(kernel, outcome, settings, wrong)
    hints = known_mistakes(outcome, settings, want, limits, deadline)
    if hints:
        return hints
    for k in wrong:
        value = got[k].double()
        factor = float((value * want[k]).sum() / want[k].square().sum().clamp(min=1e-300))
        if (
            abs(factor) > 1e-3
            and abs(factor - 1) > 0.02
            and close(value / factor, want[k], limits[k], k)
        ):
            hints.append(f"{k} is off by the factor {factor:.4g}")
        elif k == "final_states" and close(transposed(got[k]), want[k], limits[k], k):
            hints.append("final_states are written transposed")
        elif k == "final_states" and got[k].shape[-1] == got[k].shape[-2] and close(
                got[k].mT, want[k], limits[k], k):
            hints.append("final_states are written transposed")
    return hints


def hints_on_nan(kernel, outcome, settings, wrong):
    feature, case = parse(outcome.result.spec, settings.signature)
    names = ", ".join(k for k in wrong if not outcome.got[k].isfinite().all())
    again = judge_case(kernel, outcome.spec, outcome.dtype, settings.but(poison=False), again=False)
    if again.got is not None and all(
        again.got[k].isfinite().all() for k in wrong if k in again.got
    ):
        return [f"{names}: memory that was allocated but never written is read or returned"]
    inputs = settings.signature.build(
        feature, case, outcome.dtype, seed=outcome.result.seed
    ).double()
    if "A" in inputs.t:
        dt = inputs.t["dt"] + inputs.t.get("dt_bias", 0)
        if float(dt.max()) > 20 and "dt_softplus" in inputs.kw:
            return [f"{names}: NaN or inf where a step is large: exp inside softplus overflows"]
        sums = (
            (F.softplus(dt) if "dt_softplus" in inputs.kw else dt.clamp(min=0))
            .mul(inputs.t["A"])
            .abs()
        )
        q = min(case["q"], case["l"])
        if float(sums.unfold(1, q, 1).sum(-1).max()) > 80:  # exp of it is beyond float32
            return [
                f"{names}: NaN or inf where |A dt| is large: exp of a positive number overflows, "
                "as in exp(-cumsum); "
                "where it is a difference, mask before exp"
            ]
    if outcome.dtype == torch.float16:
        return [f"{names}: inf or NaN: a product or a sum leaves the range of float16"]
    return [f"{names}: NaN or inf"]


def known_mistakes(outcome, settings, want, limits, deadline):
    """Mistaken oracles that give the same numbers."""
    feature, case = parse(outcome.result.spec, settings.signature)
    if size(case)[1] > 4_000_000 or case["l"] > 800:
        return []
    double = settings.signature.build(
        feature, case, outcome.dtype, seed=outcome.result.seed
    ).double()
    got, over = outcome.got, outcome.over
    wrong = [k for k in over if over[k] > 1]
    outputs_wrong = [k for k in wrong if k in ("y", "final_states")]
    grads = settings.signature.grads and not outputs_wrong
    part = outputs_wrong or wrong
    lift = settings.signature.lift
    candidates = {words: lift(mistake) for words, mistake in MISTAKES.items()}
    candidates |= OTHER_MISTAKES.get(settings.signature.name, {})
    if not outputs_wrong:
        candidates = {words: lift(mistake) for words, mistake in SLOPES.items()} | {
            f"{words}, in the backward pass only": mistake for words, mistake in candidates.items()}
    hints = []
    for words, mistake in candidates.items():
        if time.monotonic() > deadline:
            break
        try:
            as_if = run(mistake, double, grads)
        except Exception:  # the mistake needs an option that this case lacks
            continue
        if any(as_if.get(k) is None for k in part):
            continue
        differs = [
            k
            for k in part
            if float(max(e.max() for e in excess(as_if[k], want[k], limits[k], k))) > 1
        ]
        if differs == part and all(close(got[k], as_if[k], limits[k], k) for k in part):
            hints.append(words)
            if outputs_wrong and len(hints) == 2:
                break
    if (
        not outputs_wrong
        and "final_states" in double.d
        and double.d["final_states"].abs().max() > 0
    ):
        silent = dataclasses.replace(
            double, d=double.d | {"final_states": double.d["final_states"] * 0}
        )
        as_if = run(lift(oracle), silent, grads)
        if all(as_if[k] is not None and close(got[k], as_if[k], limits[k], k) for k in wrong):
            hints.insert(0, "the gradient of the final states is dropped")
    return hints


def close(got, want, limits, name):
    """Within twice the tolerance, or within rounding of values that are much larger than the
    truth's."""
    if all(float(e.max()) <= 2 for e in excess(got, want, limits, name)):
        return True
    error = (got.double() - want).square().mean().sqrt()
    return bool(error <= 16 * torch.finfo(got.dtype).eps * want.square().mean().sqrt())


def in_finer_dtype(kernel, outcome, settings):
    """Is the mistake there in a finer dtype as well, or too large to be one of precision?"""
    want, _ = truth_of(outcome, settings)
    dtype = outcome.dtype
    errors = []
    for k in outcome.over:
        if outcome.over[k] > 1:
            error = (outcome.got[k].double() - want[k]).square().mean().sqrt()
            errors.append(float(error / want[k].square().mean().sqrt().clamp(min=1e-300)))
    if dtype == torch.float64 or (dtype == torch.float32 and min(errors) > 0.03):
        return True
    finer = torch.float64 if dtype == torch.float32 else torch.float32
    return judge_case(kernel, outcome.spec, finer, settings, again=False).status == "wrong"


def precision_hint(kernel, outcome, settings, wrong):
    dtype = outcome.dtype
    how = "in tf32 or half precision" if dtype == torch.float32 else f"in {NAME_OF[dtype]}"
    admits = ""
    if dtype == torch.float32 and not settings.tf32:
        with_tf32 = judge_case(kernel, outcome.spec, dtype, settings.but(tf32=True), again=False)
        admits = "; --tf32 admits such products" if with_tf32.status == "right" else ""
    return [
        f"too little precision: something is summed {how} that a careful kernel keeps in float32"
        + along(outcome, wrong, settings)
        + admits
    ]


def along(outcome, wrong, settings):
    """Does the error grow along the chunk (a running sum that restarts) or along the sequence (a
    state)?"""
    want, _ = truth_of(outcome, settings)
    case = parse(outcome.result.spec, settings.signature)[1]
    if "y" not in wrong:
        return ""
    size = want["y"].abs()
    axes = [i for i in range(size.dim()) if i != 1]
    error = (outcome.got["y"].double() - want["y"]).abs().mean(axes) / size.mean(axes)  # (l,)
    if case["l"] >= 8 * case["q"]:
        half = len(error) // 2
        grows = error[half:].mean() > 1.5 * error[:half].mean()
        return ", and its error grows along the sequence: the state" if grows else ""
    place = error[: case["q"]]
    half = len(place) // 2
    grows = half and place[half:].mean() > 1.5 * place[:half].mean()
    return ", and its error grows along the chunk: the running sum" if grows else ""


def pattern(name, outcome, settings):
    """The part of a tensor to which its error is confined."""
    case = parse(outcome.result.spec, settings.signature)[1]
    axes = axes_of(name, settings)
    want, limits = truth_of(outcome, settings)
    _, ratio = excess(outcome.got[name], want[name], limits[name], name)
    bad, l, q, r = ratio > 1, case["l"], case["q"], case["h"] // case["g"]
    if not bad.any() or bad.all():
        return
    seen = {axis: set(bad.nonzero()[:, i].tolist()) for i, axis in enumerate(axes[: bad.dim()])}
    last = (l - 1) // q * q
    if "position" in seen and l > q:
        first, end = min(seen["position"]), max(seen["position"])
        if l % q and first >= last:
            yield f"{name}: only in the last, partial chunk"
        elif first > q + 1:
            yield f"{name}: position from {first} on"
        elif first >= q:
            yield f"{name}: only from the second chunk on"
        elif end < last:
            yield f"{name}: only before the last chunk"
        elif len({p % q for p in seen["position"]}) < min(4, q):
            places = ", ".join(map(str, sorted({p % q for p in seen["position"]})))
            yield f"{name}: only at place {places} of a chunk"
    beyond_first = (
        "head" in seen and r > 1 and 1 in seen["head"] and not any(h % r == 0 for h in seen["head"])
    )
    if beyond_first:
        yield f"{name}: only for heads beyond the first of a group"
    sizes = dict(
        zip(
            "batch head group headdim state row column channel".split(),
            [case[k] for k in "bhgpn"] + list(ratio.shape[:1]) + list(ratio.shape[-1:]) * 2,
            strict=False,
        )
    )
    for axis, size in sizes.items():
        if axis not in seen or (axis == "head" and beyond_first):
            continue
        first, end = min(seen[axis]), max(seen[axis])
        label = {"state": "d_state"}.get(axis, axis)
        if first > 0 and end == size - 1 and first < end:
            yield f"{name}: {label} from {first} on"
        elif len(seen[axis]) == 1 and size > 1:
            yield f"{name}: only for {label} {first}"
        elif first > 0 and end < size - 1:
            yield f"{name}: {label} {first} to {end} only"
        elif first == 0 and end < size - 1 and size > 1:
            yield f"{name}: {label} up to {end} only"


def report(kernel, outcome, settings, name, hints, seconds=5):
    """The text of one failure: what, where, smallest case, hints, and the command that shows it
    again."""
    spec, dtype = outcome.spec, outcome.dtype
    lines = [f"{parse(spec, settings.signature)[0]} in {NAME_OF[dtype]} is wrong: {amiss(outcome)}"]
    lines += [f"hint: {hint}" for hint in hints]
    small = spec
    if outcome.where != "call" or outcome.refused:
        small = shrink(kernel, spec, dtype, seconds, settings)
    again = judge_case(kernel, small, dtype, settings, again=False)
    lines += [f"smallest case: {small}" + (f" ({again.why})" if again.why else "")]
    if again.over:
        lines += ["  " + locate(k, again, settings) for k, v in again.over.items() if v > 1]
    flags = "".join(
        [
            f" --signature {settings.signature.name}" if settings.signature.name != "scan" else "",
            f" --device {settings.device}" if settings.device != "cpu" else "",
            " --tf32" if settings.tf32 else "",
            f" --seed {settings.seed}" if settings.seed else "",
            " --forward-only" if settings.forward_only else "",
            " --allow-delegation" if settings.allow_delegation else "",
            f" --always {','.join(settings.always)}" if settings.always else "",
        ]
    )
    try:
        by_name = load(name) is kernel
    except ValueError:
        by_name = False
    if by_name:
        again = f"python -m pytest tests/test_kernel.py --kernel {name}"
        again += f" --dtype {NAME_OF[dtype]}{flags} --case '{small}'"
    else:
        again = f"judge(kernel, dtypes={NAME_OF[dtype]!r}, cases=[{small!r}]"
        again += f", seed={settings.seed}" if settings.seed else ""
        again += ", ...)  # and your other options"
    return "\n".join([*lines, f"again: {again}"])


# --- The whole verdict ----------------------------------------------------------------------------


class Verdict:
    """What came out: `ok`, `outcomes`, and as text a summary, the causes, three reports, the rest
    as a list."""

    def __init__(self, name, settings, outcomes, required, left_out, seconds):
        self.name, self.settings, self.outcomes = name, settings, outcomes
        self.required, self.left_out, self.seconds = required, left_out, seconds
        self.causes = {}                                    # cause -> (hints, outcomes)
        self.reports = []

    def of(self, status):
        return [o for o in self.outcomes if o.status == status]

    @property
    def missing(self):
        """What --require names and nobody could judge."""
        named = []
        for o in self.of("not supported"):
            feature = parse(o.spec, self.settings.signature)[0]
            if {"all", feature, NAME_OF[o.dtype]} & self.required and not (
                    feature in OPTIONAL and feature not in self.required):
                named.append(o)
        return named

    @property
    def ok(self):
        return bool(self.of("right")) and not self.of("wrong") and not self.missing

    def feature(self, outcome):
        return parse(outcome.spec, self.settings.signature)[0]

    def __str__(self):
        right, wrong, lacking = self.of("right"), self.of("wrong"), self.of("not supported")
        judged = list(dict.fromkeys(self.feature(o) for o in right + wrong))
        lacked = [f for f in dict.fromkeys(map(self.feature, lacking)) if f not in judged]
        s = self.settings
        scope = ", forward only" if s.forward_only else ""
        word = (
            "right"
            if self.ok
            else "WRONG"
            if wrong
            else "NOT ENOUGH"
            if right
            else "NOTHING JUDGED"
        )
        lines = [f"verdict on {self.name}, signature {s.signature.name}, {s.device}{scope}: {word}",
                 f"{len(right)} right, {len(wrong)} wrong, {len(lacking)} not supported; features: "
                 f"{len(judged)} judged, {len(lacked)} lacking ({self.seconds:.0f} s)"]
        if not right and not wrong:
            lines.append("nothing was judged: no case ran to its end, so this is no pass")
        dtypes = {NAME_OF[o.dtype] for o in right + wrong}
        silent = [
            NAME_OF[d]
            for d in dict.fromkeys(o.dtype for o in self.outcomes)
            if NAME_OF[d] not in dtypes
        ]
        if silent:
            lines.append(f"no case judged in: {', '.join(silent)}")
        if self.left_out:
            lines.append(self.left_out)
        for o in self.missing:
            lines.append(
                f"required, not supported: {self.feature(o)} in {NAME_OF[o.dtype]}: {o.why}"
            )
        lines += self.tell_causes()
        lines += [""] + ["\n".join([text, ""]) for text in self.reports]
        lines += self.tell_lacking(lacking)
        notes = {}
        for o in right:
            if o.note:
                notes.setdefault(o.note, []).append(f"{self.feature(o)} {NAME_OF[o.dtype]}")
        lines += [f"note: {note}: {', '.join(cases)}" for note, cases in notes.items()]
        return "\n".join([*lines, "", *self.table()])

    def tell_causes(self):
        if not self.causes:
            return []
        lines = ["", f"{len(self.causes)} cause{'s' if len(self.causes) > 1 else ''}:"]
        for i, (cause, (_, outcomes)) in enumerate(self.causes.items(), 1):
            cases = [f"{self.feature(o)} {NAME_OF[o.dtype]}" for o in outcomes]
            more = f" and {len(cases) - 12} more" if len(cases) > 12 else ""
            lines.append(f"{i}. {cause}")
            lines.append(
                f"   {len(cases)} case{'s' if len(cases) > 1 else ''}:"
                f" {', '.join(cases[:12])}{more}"
            )
        return lines

    def tell_lacking(self, lacking):
        groups = {}
        for o in lacking:
            groups.setdefault(digits(o.why), []).append(o)
        lines = ["not supported:"] if groups else []
        for outcomes in groups.values():
            features = list(dict.fromkeys(map(self.feature, outcomes)))
            more = f" and {len(features) - 12} more" if len(features) > 12 else ""
            lines.append(
                f"  {len(outcomes)} cases ({', '.join(features[:12])}{more}): {outcomes[0].why}"
            )
        if lacking and not self.of("wrong") and len(lacking) > len(self.outcomes) / 2:
            lines.append(
                "  a kernel for certain shapes is judged at them: "
                "--shape headdim=64,d_state=128,chunk=256"
            )
        return lines

    def table(self):
        """The worst error of any output or gradient over its tolerance; above 1 is wrong."""
        dtypes = [d for d in DTYPES.values() if any(d == o.dtype for o in self.outcomes)]
        cells = {}
        for o in self.outcomes:
            cell = "not supported"
            if o.status != "not supported":
                cell = (
                    f"{o.worst:.2f} {o.where}"
                    if o.status == "right"
                    else f"WRONG {o.worst:.3g} {o.where}"
                )
            cells[self.feature(o), o.dtype] = cell
        yield "worst error over its tolerance, and where; above 1 is wrong"
        yield f"{'feature':30}" + "".join(f"{NAME_OF[d]:>25}" for d in dtypes)
        for feature in dict.fromkeys(map(self.feature, self.outcomes)):
            yield f"{feature:30}" + "".join(f"{cells.get((feature, d), ''):>25}" for d in dtypes)


def digits(text):
    return re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "N", text)


def find_causes(kernel, verdict, name, reports=3, seconds=25):
    """Group the failing cases, explain one of each group, and report on three."""
    settings, end = verdict.settings, time.monotonic() + seconds
    groups = {}
    for o in verdict.of("wrong"):
        groups.setdefault(look(o), []).append(o)
    order = sorted(groups.values(), key=len, reverse=True)
    for outcomes in order:
        first = min(outcomes, key=lambda o: size(parse(o.spec, settings.signature)[1]))
        seeded = settings.but(seed=first.seed)
        hints = explain(kernel, first, seeded, end) if time.monotonic() < end else []
        cause = (
            hints[0]
            if hints
            else first.why and digits_kept(first) or f"wrong: {', '.join(look(first)[1])}"
        )
        known = verdict.causes.setdefault(cause, (hints, []))
        if not known[1]:
            known[1].append(first)
            known[1].extend(o for o in outcomes if o is not first)
        else:
            known[1].extend(outcomes)
    verdict.causes = dict(sorted(verdict.causes.items(), key=lambda item: -len(item[1][1])))
    for hints, outcomes in list(verdict.causes.values())[:reports]:
        left = max(1.0, min(5.0, end + 5 - time.monotonic()))
        seeded = settings.but(seed=outcomes[0].seed)
        verdict.reports.append(report(kernel, outcomes[0], seeded, name, hints, left))


def digits_kept(outcome):
    return amiss(outcome).split(" (")[0]


def look(outcome):
    """What failing cases must share to be taken for one cause before they are examined."""
    wrong = tuple(k for k, v in (outcome.over or {}).items() if v > 1)
    forward = tuple(k for k in wrong if k in ("y", "final_states"))
    nan = bool(wrong) and any(not outcome.got[k].isfinite().all() for k in wrong)
    way = [w for w in parse_opts(outcome.spec) if w.startswith(("call=", "layout=", "dy="))]
    return (digits(outcome.why), forward or wrong, nan, tuple(way), outcome.deterministic)


def parse_opts(spec):
    for signature in SIGNATURES.values():
        with contextlib.suppress(ValueError):
            return parse(spec, signature)[1]["opts"].split()
    return []


def load(path):
    """package.module:function -> the function."""
    module, _, name = path.partition(":")
    try:
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except Exception as error:  # whatever the kernel's own file raises
        raise ValueError(f"--kernel {path} cannot be imported: {type(error).__name__}: {error}. "
                         "Expected package.module:function, importable from here") from error


SHAPE_KEYS = {
    "batch": "b",
    "nheads": "h",
    "headdim": "p",
    "ngroups": "g",
    "d_state": "n",
    "chunk": "q",
}


def read_shape(shape):
    """"headdim=64,chunk=256" or a dict -> {"p": 64, "q": 256}."""
    if isinstance(shape, str):
        shape = dict(part.partition("=")[::2] for part in shape.split(",") if part)
    sizes = {}
    for key, value in (shape or {}).items():
        if key not in SHAPE_KEYS:
            raise ValueError(f"--shape: no size {key!r}; there are {', '.join(SHAPE_KEYS)}")
        if not str(value).isdigit() or int(value) < 1:
            raise ValueError(f"--shape: {key} must be a whole number above 0, got {value!r}")
        sizes[SHAPE_KEYS[key]] = int(value)
    return sizes


def fit(case, sizes):
    """A case at other sizes. Lengths and borders keep their place relative to the chunk."""
    new = case | sizes
    if new["h"] % new["g"]:
        new["g"] = 1 if "g" not in sizes else new["g"]
        new["h"] = new["h"] if "h" in sizes else new["g"]
    if "q" not in sizes or sizes["q"] == case["q"]:
        return new
    old, q = case["q"], sizes["q"]

    def place(i):
        whole, rest = min(i // old, 2), i % old
        rest = q - (old - rest) if rest > old // 2 and q > old else min(rest, q - 1)
        return whole * q + rest

    new["l"] = max(1, place(case["l"]))
    words = []
    for word in case["opts"].split():
        key, _, value = word.partition("=")
        if key in ("seq_idx", "cu") and value and value[0].isdigit():
            word = f"{key}=" + ",".join(str(place(int(i))) for i in value.split(","))
        words.append(word)
    new["opts"] = " ".join(words)
    return new


def add_always(case, always):
    """What the kernel always applies, in every case."""
    words = case["opts"].split()
    for word in always:
        if word not in words and not (word == "D" and "D-headdim" in words):
            words.append(word)
    return case | {"opts": " ".join(words)}


def chosen(settings, cases, thorough, compiles, sizes, always):
    """The specs to judge, small ones first."""
    signature = settings.signature
    if cases:
        given = []
        for spec in [cases] if isinstance(cases, str) else cases:
            names = [n for n, kind in signature.kind_of.items() if kind == spec or fnmatch(n, spec)]
            given += names or [spec]
    else:
        given = [
            name for name in signature.cases if thorough or signature.kind_of[name] != "thorough"
        ]
    specs = []
    for spec in given:
        feature, case = parse(spec, signature)
        way = options_of(case).get("call")
        if (
            not cases
            and (way == "compile") > compiles
            or (settings.forward_only and way in NEEDS_GRADIENT)
        ):
            continue
        if settings.forward_only and not cases and options_of(case).get("dy"):
            continue
        case = add_always(fit(case, sizes), always)
        specs.append(spell(feature, case, signature))
    return list(dict.fromkeys(specs))


def is_large(case):
    return case["b"] * case["l"] * case["h"] * case["p"] * case["n"] > 3_000_000 or case["l"] > 1000


def judge(
    kernel,
    signature="scan",
    device="cpu",
    dtypes="float64,float32,bfloat16,float16",
    cases=None,
    require=(),
    tf32=False,
    shape=None,
    always=(),
    forward_only=False,
    compiles=False,
    compile_backend="inductor",
    allow_delegation=False,
    thorough=False,
    seed=None,
    name=None,
    progress=None,
):
    """Judge a kernel; print the Verdict, or ask it for `ok`.

    kernel: a function, or "package.module:function". signature: scan, varlen, step, bidirectional
    or layer. dtypes: names or torch dtypes. cases: specs as a verdict prints them; default: all.
    require: features or dtypes that must be supported, or "all". shape: sizes that the kernel is
    restricted to. always: options that it always applies. seed: of the cases that draw fresh
    values; default: drawn anew. Raises ValueError for what is not known.
    """
    start = time.monotonic()
    name = name or name_of(kernel)
    if signature not in SIGNATURES:
        raise ValueError(f"--signature: no {signature!r}; there are {', '.join(SIGNATURES)}")
    split = lambda given: given.split(",") if isinstance(given, str) else list(given)
    dtypes = [
        NAME_OF.get(d, d)
        for d in split(dtypes if not isinstance(dtypes, torch.dtype) else [dtypes])
    ]
    unknown = [str(d) for d in dtypes if d not in DTYPES]
    if unknown or not dtypes:
        raise ValueError(f"--dtype: no {', '.join(unknown)}; there are {', '.join(DTYPES)}")
    always = [w for w in split(always) if w]
    unknown = [w for w in always if w not in WORDS or WORDS[w]]
    if unknown:
        raise ValueError(f"--always: no {', '.join(unknown)}; there are "
                         f"{', '.join(w for w in WORDS if WORDS[w] == ())}")
    settings = Settings(
        SIGNATURES[signature],
        str(device),
        tf32,
        forward_only,
        allow_delegation,
        tuple(always),
        compile_backend,
    )
    required = {r for r in split(require) if r}
    unknown = required - {"all"} - set(settings.signature.cases) - set(DTYPES)
    if unknown:
        raise ValueError(f"--require: no feature or dtype {', '.join(sorted(unknown))}")
    if isinstance(kernel, str):
        kernel = load(kernel)
    sizes = read_shape(shape)
    if isinstance(kernel, torch.nn.Module):
        sizes |= sizes_of_module(kernel)
    specs = chosen(settings, cases, thorough, compiles, sizes, always)
    plan = [
        (spec, d) for spec in specs for d in wanted(spec, dtypes, settings, thorough or bool(cases))
    ]
    plan.sort(key=lambda pair: is_large(parse(pair[0], settings.signature)[1]))
    fresh = int.from_bytes(os.urandom(3)) if seed is None else int(seed)
    outcomes, left_out = [], ""
    forget_truths()
    for i, (spec, dtype) in enumerate(plan):
        way = options_of(parse(spec, settings.signature)[1]).get("call")
        with_seed = settings.but(
            seed=fresh if way in ("fresh-values", "resized") or seed is not None else 0
        )
        outcomes.append(judge_case(kernel, spec, DTYPES[dtype], with_seed))
        outcomes[-1].seed = with_seed.seed
        if progress:
            progress(outcomes[-1])
        left_out = enough(outcomes, plan[i + 1 :], settings)
        if left_out:
            break
    verdict = Verdict(name, settings, outcomes, required, left_out, 0)
    find_causes(kernel, verdict, name)
    verdict.seconds = time.monotonic() - start
    return verdict


def name_of(kernel):
    if isinstance(kernel, str):
        return kernel
    name = getattr(kernel, "__qualname__", type(kernel).__name__)
    return f"{getattr(kernel, '__module__', '')}:{name}"


def wanted(spec, dtypes, settings, every):
    """The dtypes of a case; large ones run in two unless asked for, and autocast is for float32 and
    bfloat16."""
    case = parse(spec, settings.signature)[1]
    if options_of(case).get("call") == "autocast":
        return [d for d in dtypes if d in ("float32", "bfloat16")]
    if is_large(case) and not every:
        return [d for d in ("float32", "bfloat16", "float16", "float64") if d in dtypes][:2]
    return dtypes


def enough(outcomes, rest, settings):
    """Stop where nothing is right, or where the large cases would add nothing but time."""
    if not rest:
        return ""
    wrong = sum(o.status == "wrong" for o in outcomes)
    right = sum(o.status == "right" for o in outcomes)
    if wrong >= 12 and not right:
        return f"stopped after {len(outcomes)} cases, none right: {len(rest)} cases were left out"
    if wrong >= 30 and wrong > 4 * right:
        return f"stopped after {len(outcomes)} cases, {right} right: {len(rest)} were left out"
    if wrong >= 24 and is_large(parse(rest[0][0], settings.signature)[1]):
        return f"{len(rest)} large cases were left out: {wrong} small ones are wrong already"
    if outcomes[-1].status == "wrong" and "CUDA error" in outcomes[-1].why:
        return f"stopped at a CUDA error: {len(rest)} cases were left out"
    return ""


def sizes_of_module(module):
    """The sizes that a module was built with."""
    shapes = {k: tuple(v.shape) for k, v in module.named_parameters()}
    try:
        d_model, inner = shapes["out_proj.weight"]
        h, (convolved, _, w) = shapes["dt_bias"][0], shapes["conv1d.weight"]
    except (KeyError, ValueError) as error:
        raise ValueError(
            "the module has not the parameters of Mamba2: "
            "in_proj.weight, conv1d.weight, conv1d.bias, "
            f"dt_bias, A_log, D, norm.weight, out_proj.weight ({error})"
        ) from error
    g = getattr(module, "ngroups", 1)
    return {
        "m": d_model,
        "h": h,
        "p": inner // h,
        "g": g,
        "n": (convolved - inner) // (2 * g),
        "w": w,
    }


# As it was before any kernel was loaded.
ORIGINAL = types.MappingProxyType(fingerprint())
