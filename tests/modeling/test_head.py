"""The head's transform against each family's own logits, and the KL against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, HEAD_FAMILIES, tiny_model

from es2fast.errors import UserError
from es2fast.modeling import head as heads
from es2fast.modeling.taps import backbone, blocks

IDS = torch.tensor([[1, 4, 10, 16, 5], [1, 4, 8, 12, 5]])


@pytest.mark.parametrize("family", [*FAMILIES, *HEAD_FAMILIES])
def test_transform_reproduces_the_models_logits(family: str) -> None:
    model = tiny_model(family)
    transform = heads.read_transform(model.config)
    assert heads.parity_error(model, transform, IDS) < 1e-5


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("gemma2", "final_logit_softcapping"),
        ("granite", "logits_scaling"),
        ("cohere", "logit_scale"),
    ],
)
def test_a_wrong_transform_is_refused_by_name(family: str, key: str) -> None:
    model = tiny_model(family)
    right = heads.read_transform(model.config)
    assert right.keys == (key,)
    error = heads.parity_error(model, heads.HeadTransform(), IDS).item()
    with pytest.raises(UserError, match=key):
        heads.check_parity(error, torch.float32, model.config)
    heads.check_parity(heads.parity_error(model, right, IDS).item(), torch.float32, model.config)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "phi"])
@pytest.mark.parametrize("share_head", [True, False])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_fused_kl_equals_full_logits_in_fp64(family: str, share_head: bool, direction: str) -> None:
    student, teacher = tiny_model(family), tiny_model(family)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in blocks(student).parameters():
            parameter += 0.3 * parameter.abs().mean() * torch.randn_like(parameter)
        if not share_head:
            student.get_output_embeddings().weight *= 1.1
    # The oracle first, on the models' own logits, before any forward is replaced.
    s = _log_probs(student)
    t = _log_probs(teacher)
    p, q = (t, s) if direction == "forward" else (s, t)
    expected = (p.exp() * (p - q)).sum(-1).flatten()
    hidden = backbone(student)(input_ids=IDS).last_hidden_state.flatten(0, 1)
    target = backbone(teacher)(input_ids=IDS).last_hidden_state.flatten(0, 1)
    lm_head, _ = heads.install(student, teacher, share_head=share_head)
    weights = torch.linspace(0.5, 1.5, len(hidden))
    found = lm_head(hidden, heads.KLTask(target.detach(), weights, direction, 1.0))
    assert expected.max() > 1e-4
    assert found.item() == pytest.approx((expected * weights).sum().item(), rel=1e-4)


def _log_probs(model: Any) -> torch.Tensor:
    import copy

    with torch.no_grad():
        return copy.deepcopy(model).double()(input_ids=IDS).logits.log_softmax(-1)


def test_called_with_hidden_states_alone_the_head_still_makes_logits() -> None:
    model = tiny_model("llama")
    before = model(input_ids=IDS).logits
    heads.install(model, None, share_head=True)
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_a_wrapped_head_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(UserError, match=r"train\.lora\.targets"):
        heads.lm_head_of(wrapped)
