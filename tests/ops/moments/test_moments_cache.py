"""TeacherMoments as a value, on disk, tied to its head; and everything that is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import es2fast
from es2fast import TeacherMoments, half_head, moment_kl_div, teacher_moments
from es2fast.ops.moments.cache import head_fingerprint
from tests.ops.linear_kl.matrix import BF16, FP16, FP32, make_problem
from tests.ops.moments.matrix import moments_of

# --- the moments as a value -----------------------------------------------------------------------


def test_index_cat_move(tmp_path: Path):
    problem = make_problem(n=9)
    whole = moments_of(problem)
    mask = torch.arange(9) % 2 == 0
    parts = TeacherMoments.cat([whole[:4], whole[4:]])
    assert len(whole) == 9 and len(whole[mask]) == 5 and len(whole[torch.tensor([8, 0])]) == 2
    assert whole.nbytes == 9 * (4 * 65 + 8 * 16 + 24) and whole.top_k == 16
    for name in ("tail_moment", "top_ids", "top_probs", "tail_sums"):
        assert torch.equal(getattr(parts.to("cpu"), name), getattr(whole, name))
    alone = moments_of(replace_tokens(problem, mask))
    got = whole[mask]
    assert torch.equal(got.top_ids, alone.top_ids)
    torch.testing.assert_close(got.tail_moment, alone.tail_moment)
    for bad in (3, torch.tensor(3)):
        with pytest.raises(ValueError, match="one token"):
            whole[bad]
    with pytest.raises(ValueError, match=r"temperature is 1\.0 and 2\.0"):
        TeacherMoments.cat([whole, replace(whole, temperature=2.0)])
    with pytest.raises(ValueError, match="at least one"):
        TeacherMoments.cat([])


def replace_tokens(problem, mask):
    return replace(
        problem, hidden=problem.hidden[mask], teacher_hidden=problem.teacher_hidden[mask]
    )


def test_anchor_mass_is_the_probability_of_the_anchors():
    problem = make_problem(FP32, v=300)
    p = torch.softmax(problem.teacher_hidden @ problem.weight.t(), -1)
    mass = moments_of(problem).anchor_mass
    torch.testing.assert_close(mass.float(), p.topk(16).values.sum(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", (BF16, torch.float64), ids=str)
def test_save_and_load(tmp_path: Path, dtype):
    problem = make_problem(dtype, temperature=2.0, bias=torch.randn(127).to(dtype))
    moments, path = moments_of(problem), tmp_path / "teacher.safetensors"
    moments.save(path)
    weight, bias = problem.weight, problem.options["bias"]
    loaded = TeacherMoments.load(path, weight=weight, bias=bias)
    for name, value in vars(moments).items():
        same = getattr(loaded, name)
        assert torch.equal(same, value) if isinstance(value, torch.Tensor) else same == value
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["format"] == "es2fast-teacher-moments" and header["version"] == "1"
    expected = dict(temperature=2.0, logit_scale=1.0, top_k=16, vocab_size=127, hidden_size=65)
    assert {k: json.loads(header[k]) for k in expected} == expected
    other = weight.clone()
    other[-1] += 1
    for refused in (dict(weight=other, bias=bias), dict(weight=weight), dict(weight=weight[:, 1:])):
        with pytest.raises(ValueError, match="linear_kl_div"):
            TeacherMoments.load(path, **refused)


def test_files_of_another_kind_are_refused(tmp_path: Path):
    other, text = tmp_path / "other.safetensors", tmp_path / "text.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    text.write_text("no")
    with pytest.raises(ValueError, match="expected 'es2fast-teacher-moments' version 1"):
        TeacherMoments.load(other)
    with pytest.raises(ValueError, match="not a safetensors file"):
        TeacherMoments.load(text)


def test_fingerprint_knows_a_head_and_its_float16_copy():
    w = torch.randn(50, 8).to(BF16)
    assert head_fingerprint(w) == head_fingerprint(half_head(w).weight)
    assert head_fingerprint(w) == head_fingerprint(torch.cat([w, w[:3]]), vocab_size=50)
    assert head_fingerprint(w) != head_fingerprint(w, torch.zeros(50).to(BF16))
    assert head_fingerprint(w) != head_fingerprint(w.float())
    assert head_fingerprint(w) != head_fingerprint(w.flip(0))


def test_half_head():
    w = torch.tensor([[1.0, 2**-17, 0.0], [-3.5, 1.0078125 * 2**-18, 2**-30]]).to(BF16)
    half = half_head(w)
    assert half.weight.dtype == FP16 and half.inexact == 2 and not half.exact
    assert half.largest_change <= 2**-25
    assert half_head(w[:1]).exact
    with pytest.raises(ValueError, match="beyond float16"):
        half_head(torch.tensor([[1e6]]).to(BF16))


# --- refusals -------------------------------------------------------------------------------------


def _loss_refusals() -> dict[str, tuple[dict, str]]:
    w = torch.randn(127, 65)
    return {
        "reverse": (dict(direction="reverse"), "direction='reverse'.*linear_kl_div"),
        "jsd": (dict(direction="jsd"), "linear_kl_div"),
        "soft-cap": (dict(softcap=30.0), "softcap=30.0.*linear_kl_div"),
        "temperature": (dict(temperature=2.0), "temperature=2.0.*made with 1.0.*linear_kl_div"),
        "scale": (dict(logit_scale=2.0), "logit_scale=2.0.*linear_kl_div"),
        "head grad": (dict(weight=w.clone().requires_grad_()), "weight requires grad.*linear_kl"),
        "bias grad": (dict(bias=torch.zeros(127, requires_grad=True)), "bias requires grad"),
        "head": (dict(weight=w[:100]), "made for a head of 127 tokens.*linear_kl_div"),
        "width": (dict(weight=w[:, 1:], hidden=torch.randn(5, 64)), "width 65.*linear_kl_div"),
        "tokens": (dict(hidden=torch.randn(4, 65)), r"moments\[index\]"),
        "float64": (dict(hidden=torch.randn(5, 65).double(), weight=w.double()), "float64"),
        "dtype": (dict(hidden=torch.randn(5, 65).half()), "cast one of them"),
        "reduction": (dict(reduction="avg"), "reduction='avg'"),
        "chunk": (dict(chunk_tokens=0), "chunk_tokens=0"),
        "weights": (dict(token_weights=torch.ones(4)), r"expected \(5,\)"),
        "backend": (dict(backend="cuda"), "backend='cuda'"),
    }


@pytest.mark.parametrize("name", _loss_refusals())
def test_loss_refuses(name):
    change, message = _loss_refusals()[name]
    problem = make_problem()
    arguments = dict(hidden=problem.hidden, weight=problem.weight, moments=moments_of(problem))
    with pytest.raises(ValueError, match=message):
        moment_kl_div(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(softcap=30.0), "softcap=30.0.*linear_kl_div"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_k=128), "top_k=128: expected 0"),
        (dict(temperature=0.0), "temperature=0.0"),
        (dict(teacher_bias=torch.zeros(127)), "without weight"),
        (dict(weight=torch.randn(100, 33)), "vocab_size"),
        (dict(vocab_size=128), "vocab_size=128"),
        (dict(chunk_tokens=0), "chunk_tokens=0"),
        (dict(teacher_hidden=torch.randn(5, 60)), "teacher_hidden is 60 wide"),
    ),
)
def test_making_refuses(change, message):
    arguments = dict(teacher_hidden=torch.randn(5, 65), teacher_weight=torch.randn(127, 65))
    with pytest.raises(ValueError, match=message):
        teacher_moments(**(arguments | change))


def test_public_names():
    assert {"TeacherMoments", "teacher_moments", "moment_kl_div", "half_head"} <= set(
        es2fast.__all__
    )
