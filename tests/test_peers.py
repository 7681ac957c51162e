"""Our scan against other people's, and theirs before the judge.

mamba_ssm's Triton kernels and its listing of the paper, transformers' plain scan, and fla's two
naive forms. Skipped, with the reason, where a package is missing (tests/requirements-peers.txt).

Without a GPU the Triton kernels run in Triton's interpreter, a second or more for the smallest
case. A few of their cases run always; all small ones with `python -m pytest tests/test_peers.py -m
slow`. On a GPU they are judged in full.
"""
import pytest
import torch

import mamba2_ref
import peers
from kernel_judge import DTYPES, SIGNATURES, Settings, build, judge, judge_case, outputs, parse, run

ADAPTER = Settings(allow_delegation=True)
LOADERS = {
    "official": peers.official_module,
    "official_varlen": peers.official_module,
    "official_step": peers.official_module,
    "minimal": peers._minimal_listing,
    "transformers": peers._transformers_module,
    "fla_chunked": peers.fla_module,
    "fla_recurrent": peers.fla_module,
}


def peer(name):
    """The peer as a function, or a skip that says what is missing."""
    try:
        LOADERS[name]()
    except ImportError as error:
        pytest.skip(str(error))
    return getattr(peers, name)


# What is wrong with the official kernels, found by the judge. The version is the one it was seen
# in; when a newer one mends it, the test below fails and this entry goes.
FINDINGS = {
    # The forward pass copies a D that is not contiguous; the backward pass is handed the original.
    ("views-D", "2.3.2.post1"): "D.stride(-1) == 1",
}


def accept(kernel, case, dtype, settings=ADAPTER):
    outcome = judge_case(kernel, case, DTYPES[dtype], settings)
    assert outcome.status != "wrong", outcome
    return outcome.status == "right"


SMALL = [name for kind, cases in SIGNATURES["scan"].kinds.items() for name in cases
         if kind not in ("sizes", "thorough") and not name.startswith("compile")]


@pytest.mark.parametrize("name, dtypes, at_least", [
    ("minimal", "float64,float32", 70), ("transformers", "float32,bfloat16", 90),
    ("fla_chunked", "float32,bfloat16", 60), ("fla_recurrent", "float32,bfloat16", 60)])
def test_the_judge_accepts_the_plain_peers(name, dtypes, at_least):
    verdict = judge(peer(name), dtypes=dtypes, cases=SMALL, allow_delegation=True)
    assert verdict.ok and len(verdict.of("right")) >= at_least, verdict


# Of each kind one, as small as it goes.
SHORT = [
    ("length-2", "float32"),
    ("chunk-plus-1", "bfloat16"),
    ("seq_idx-before-chunk", "float32"),
    ("A-huge", "float32"),
    ("both-states", "bfloat16"),
    ("z+D", "float16"),
    ("dt-negative:l=5,h=2,g=1,q=4", "float32"),
    ("seq_idx-falls:b=1,h=1,g=1", "float32"),
    ("products-large:l=5,h=2,g=1,q=4", "float16"),
    ("layout-channel-first:b=1,l=5,h=2,g=1,q=4", "float32"),
    ("final-unused:b=1,l=5,h=2,g=1,q=4", "float32"),
    ("fresh-values:b=1,l=5,h=2,g=1,q=4", "float32"),
]


@pytest.mark.parametrize("case, dtype", SHORT)
def test_the_judge_accepts_the_official_kernels(case, dtype):
    assert accept(peer("official"), case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", SMALL)
def test_the_judge_accepts_the_official_kernels_in_every_small_case(case, dtype):
    kernel = peer("official")
    if (case, peers.versions()["mamba-ssm"]) in FINDINGS:
        pytest.skip("known finding, see test_findings_about_the_official_kernels")
    accept(kernel, case, dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_judge_accepts_the_official_kernels_on_a_gpu():
    known = {case for case, version in FINDINGS if version == peers.versions().get("mamba-ssm")}
    cases = [c for c in SIGNATURES["scan"].cases if c not in known and not c.startswith("compile")]
    verdict = judge(peer("official"), device="cuda", dtypes="float32,bfloat16,float16", tf32=True,
                    cases=cases, allow_delegation=True)
    assert verdict.ok, verdict


def test_the_official_kernels_return_states_of_packed_sequences_and_take_none():
    """And those states have no gradient."""
    settings = Settings(SIGNATURES["varlen"], allow_delegation=True, forward_only=True)
    kernel = peer("official_varlen")
    assert accept(kernel, "around-chunk:l=12,h=1,g=1,q=4,opts=cu=3;7+final", "float32", settings)
    taken = "initial_states:l=9,h=1,g=1,q=4,opts=cu=3+initial_states"
    assert not accept(kernel, taken, "float32", settings)


@pytest.mark.parametrize("case, dtype", [
    ("all:b=1,l=3", "float32"), ("all:b=1,l=3,opts=D+dt_bias", "bfloat16")])
def test_the_judge_accepts_the_official_step(case, dtype):
    settings = Settings(SIGNATURES["step"], allow_delegation=True)
    assert accept(peer("official_step"), case, dtype, settings)


def test_finding_the_official_step_needs_a_bias():
    """With arguments expanded over headdim it asks for the strides of dt_bias, also of None."""
    kernel = peer("official_step")
    if peers.versions()["mamba-ssm"] != "2.3.2.post1":
        pytest.skip("seen in mamba-ssm 2.3.2.post1: look again")
    settings = Settings(SIGNATURES["step"], allow_delegation=True)
    outcome = judge_case(kernel, "plain:b=1,l=1", torch.float32, settings)
    assert outcome.status == "wrong"
    assert "'NoneType' object has no attribute 'stride'" in outcome.why


@pytest.mark.parametrize("case, version", FINDINGS)
def test_findings_about_the_official_kernels(case, version):
    kernel = peer("official")
    if peers.versions()["mamba-ssm"] != version:
        pytest.skip(
            f"seen in mamba-ssm {version}, here is {peers.versions()['mamba-ssm']}: look again"
        )
    outcome = judge_case(kernel, f"{case}:b=1,l=2,h=1,g=1,p=1,n=1,q=2", torch.float32, ADAPTER)
    assert outcome.status == "wrong" and FINDINGS[case, version] in outcome.why, outcome.why


@pytest.mark.parametrize("name, spec", [
    ("official", "both-states:l=9"), ("minimal", "both-states"), ("transformers", "both-states")])
def test_our_chunked_form_gives_what_the_peer_gives(name, spec):
    """Side by side and without the judge, forward and backward."""
    kernel = peer(name)
    inputs = build("both-states", parse(spec)[1], torch.float32)
    theirs = run(lambda t, kw, q: outputs(kernel, t, kw, q), inputs)
    ours = run(lambda t, kw, q: outputs(mamba2_ref.ssd_chunked, t, kw, q), inputs)
    for key, value in theirs.items():
        scale = float(value.detach().square().mean().sqrt())
        torch.testing.assert_close(ours[key], value, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("length", [1, 15, 16, 37])
def test_a_layer_exchanges_weights_with_transformers(length):
    """Weights go from their layer into ours and back; both give the same outputs and gradients."""
    try:
        theirs = peers.transformers_mixer(d_model=32, d_state=8, headdim=16, ngroups=1)
    except ImportError as missing:
        pytest.skip(str(missing))
    torch.manual_seed(0)
    ours = mamba2_ref.Mamba2(32, d_state=8, headdim=16)
    theirs.load_state_dict(ours.state_dict())                   # strict: the same names and shapes
    ours.load_state_dict(theirs.state_dict())
    shapes = {name: tuple(p.shape) for name, p in ours.state_dict().items()}
    assert shapes == {name: tuple(theirs.state_dict()[name].shape) for name in shapes}
    u = torch.randn(2, length, 32, requires_grad=True)
    want = theirs(u)
    want = want[0] if isinstance(want, tuple) else want
    got = ours(u)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(got)
    mine, other = (torch.autograd.grad(y, u, weight) for y in (got, want))
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
