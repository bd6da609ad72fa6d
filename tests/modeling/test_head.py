"""The head's transform against each family's own logits, and the KL against fp64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import FAMILIES, HEAD_FAMILIES, MORE_FAMILIES, tiny_model
from transformers import LlamaForCausalLM

from es2fast.errors import UserError
from es2fast.modeling import head as heads
from es2fast.modeling.taps import backbone, blocks

IDS = torch.tensor([[1, 4, 10, 16, 5], [1, 4, 8, 12, 5]])


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES, *HEAD_FAMILIES])
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


HEADS = [
    *("llama", "qwen2", "qwen3", "gemma2", "granite", "cohere", "phi"),
    *("llama tied", "qwen2 tied", "gemma2 untied"),
]


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_fused_kl_equals_full_logits_in_fp64(name: str, trainable: bool, direction: str) -> None:
    """Value and the gradient of every parameter. A frozen head serves the teacher too."""
    family, *tying = name.split()
    options = {"tie_word_embeddings": tying == ["tied"]} if tying else {}
    student, teacher = tiny_model(family, **options), tiny_model(family, **options)
    tied = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert not tying or tied == (tying == ["tied"])
    assert (student.get_output_embeddings().bias is not None) == (family == "phi")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in blocks(student).parameters():
            parameter += 0.3 * parameter.abs().mean() * torch.randn_like(parameter)
        for parameter in student.get_output_embeddings().parameters() if trainable else ():
            parameter *= 1.1
    student.get_output_embeddings().requires_grad_(trainable)
    weights = torch.linspace(0.5, 1.5, IDS.numel())
    # The oracle first, on the models' own logits, before any forward is replaced.
    expected, gradients = _plain_kl(student, teacher, direction, weights.double())
    hidden = backbone(student)(input_ids=IDS).last_hidden_state.flatten(0, 1)
    target = backbone(teacher)(input_ids=IDS).last_hidden_state.flatten(0, 1)
    lm_head, _ = heads.install(student, heads.lm_head_of(teacher) if trainable else None)
    found = lm_head(hidden, heads.KLTask(target.detach(), weights, direction, 1.0, beta=0.3))
    found.backward()
    assert expected > 1e-3
    assert found.item() == pytest.approx(expected, rel=1e-4)
    ours = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert ours.keys() == gradients.keys()
    assert any(name.startswith("lm_head") for name in ours) == (trainable and not tied)
    everything = torch.cat([gradients[n].flatten() for n in ours])
    error = torch.cat([ours[n].double().flatten() for n in ours]) - everything
    assert error.norm() / everything.norm() < 1e-4


def _plain_kl(
    student: Any, teacher: Any, direction: str, weights: torch.Tensor
) -> tuple[float, dict[str, torch.Tensor]]:
    """Weighted sum of token KLs in fp64 and its gradients, from the models' own logits."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    s = student(input_ids=IDS).logits.log_softmax(-1).flatten(0, 1)
    with torch.no_grad():
        t = teacher(input_ids=IDS).logits.log_softmax(-1).flatten(0, 1)
    mixed = (0.3 * t.exp() + 0.7 * s.exp()).log()
    parts = {"forward": [(1, t, s)], "reverse": [(1, s, t)]}
    terms = parts.get(direction, [(0.3, t, mixed), (0.7, s, mixed)])
    rows = sum(factor * (p.exp() * (p - q)).sum(-1) for factor, p, q in terms)
    loss = (rows * weights).sum()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


class ScaledLlama(LlamaForCausalLM):
    """A family that is not known: it multiplies its logits by a key of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * self.config.my_logit_factor
        return out


def test_an_unknown_transform_is_refused_naming_the_key_it_may_be() -> None:
    config = tiny_model("llama").config
    config.my_logit_factor = 0.5
    model = ScaledLlama(config).eval()
    error = heads.parity_error(model, heads.read_transform(config), IDS).item()
    with pytest.raises(UserError, match=r"unread candidates: .*my_logit_factor"):
        heads.check_parity(error, torch.float32, config)


def test_called_with_hidden_states_alone_the_head_still_makes_logits() -> None:
    model = tiny_model("llama")
    before = model(input_ids=IDS).logits
    heads.install(model, None)
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_a_wrapped_head_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(UserError, match=r"train\.lora\.targets"):
        heads.lm_head_of(wrapped)


@pytest.mark.parametrize("name", ["gemma2", "granite", "phi", "llama tied"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
def test_a_cross_entropy_beside_the_kl_equals_full_logits_in_fp64(
    name: str, trainable: bool
) -> None:
    """One call, rows of the KL first; a trainable head sums the gradients of both."""
    family, *tying = name.split()
    options = {"tie_word_embeddings": True} if tying else {}
    student, teacher = tiny_model(family, **options), tiny_model(family, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in student.get_output_embeddings().parameters() if trainable else ():
            parameter *= 1.1
    wide, wide_teacher = (copy.deepcopy(model).double() for model in (student, teacher))
    student.get_output_embeddings().requires_grad_(trainable)
    wide.get_output_embeddings().requires_grad_(trainable)
    weights, targets = torch.tensor([1.0, 0.5, 0.0, 0.25, 2.0]), torch.tensor([7, 3, 9, 4, 4])

    logits = wide(input_ids=IDS).logits
    with torch.no_grad():
        other = wide_teacher(input_ids=IDS[:1]).logits[0].log_softmax(-1)
    kl = (other.exp() * (other - logits[0].log_softmax(-1))).sum()
    ce = (weights.double() * F.cross_entropy(logits[1], targets, reduction="none")).sum()
    (kl + 2 * ce).backward()

    hidden = backbone(student)(input_ids=IDS).last_hidden_state
    with torch.no_grad():
        target = backbone(teacher)(input_ids=IDS[:1]).last_hidden_state[0]
    lm_head, _ = heads.install(student, heads.lm_head_of(teacher) if trainable else None)
    hit = logits[1].argmax(-1)
    kinds = ((targets, 1, ((hit == targets).sum(), 0)), (hit, 0, (0, 0)), (hit, 2, (0, 5)))
    for aim, counted, hits in kinds:
        task = heads.CETask(aim, weights, torch.full((5,), counted))
        found = lm_head(
            hidden.flatten(0, 1), heads.KLTask(target, torch.ones(5), "forward", 1.0), task
        )
        assert tuple(found[2:].tolist()) == hits
        if aim is targets:
            assert found[0].item() == pytest.approx(kl.item(), rel=1e-4, abs=1e-6)
            assert found[1].item() == pytest.approx(ce.item(), rel=1e-5)
            (found[0] + 2 * found[1]).backward(retain_graph=True)
            ours = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
            plain = {n: p.grad for n, p in wide.named_parameters() if p.grad is not None}
            assert ours.keys() == plain.keys()
            for key, gradient in plain.items():
                scale = gradient.norm().clamp_min(1e-6)
                assert (ours[key].double() - gradient).norm() <= 1e-4 * scale, key
