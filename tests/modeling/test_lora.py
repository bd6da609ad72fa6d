"""A LoRA layer as one operation: peft's result and gradients, and peft itself where it must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from tiny_models import tiny_model
from torch import nn

from es2fast.config import LoraSection, TrainConfig
from es2fast.modeling import lora as fused
from es2fast.modeling.lora import FusedLoraLinear
from es2fast.modeling.taps import backbone
from es2fast.modeling.teacher import set_trainable

IDS = torch.tensor([[1, 4, 8, 12, 5], [1, 4, 8, 7, 9]])


def adapted(family: str = "qwen2", **lora: Any) -> Any:
    """A model whose adapters are not at their start, where B is 0."""
    torch.manual_seed(0)
    train = TrainConfig(trainable="lora", lora=LoraSection(r=4, alpha=12, **lora))
    student = set_trainable(tiny_model(family), train, 2).train()
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    return student


def layers(student: nn.Module) -> list[Any]:
    return [module for module in student.modules() if isinstance(module, FusedLoraLinear)]


def gradients(student: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    student.zero_grad()
    final = backbone(student)(input_ids=IDS, use_cache=False).last_hidden_state
    weight = torch.linspace(-1, 1, final.numel(), dtype=final.dtype).view_as(final)
    (final * weight).sum().backward()
    found = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    return final.detach(), found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts fused calls."""
    counted: list[int] = []
    real = fused._LoraLinear.apply

    def apply(*args: Any) -> Any:
        counted.append(1)
        return real(*args)

    monkeypatch.setattr(fused._LoraLinear, "apply", apply)
    return counted


# biases; fused projections; outputs that are changed in place, and a router that is a linear layer
@pytest.mark.parametrize("family", ["qwen2", "phi3", "llama4_text"])
def test_it_computes_what_peft_computes(family: str, calls: list[int]) -> None:
    student = adapted(family).double()
    final, found = gradients(student)
    assert len(calls) == len(layers(student)) > 0 and len(found) == 2 * len(calls)
    for layer in layers(student):
        layer.__class__ = Linear
    expected, wanted = gradients(student)
    assert len(calls) == len(found) // 2  # not once more
    torch.testing.assert_close(final, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    x, weight, bias, a, b = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((6, 5), (4, 5), (4,), (2, 5), (4, 2))
    )
    for part in (x, a, b):
        part.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, a, b: fused._LoraLinear.apply(x, weight, bias, a, b, 3.0), (x, a, b)
    )


def test_bf16_rounds_no_more_than_peft() -> None:
    layer = layers(adapted().bfloat16())[0]
    torch.manual_seed(1)
    x = torch.randn(64, layer.in_features, dtype=torch.bfloat16)
    base, a, b = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
    wide = x.double()
    exact = wide @ base.weight.double().T + (0 if base.bias is None else base.bias.double())
    exact = exact + 3.0 * (wide @ a.weight.double().T) @ b.weight.double().T
    with torch.no_grad():
        own = (layer(x).double() - exact).square().mean()
        theirs = (Linear.forward(layer, x).double() - exact).square().mean()
    assert own <= 1.05 * theirs


def test_without_its_adapter_it_is_the_base_model(calls: list[int]) -> None:
    student = adapted()
    plain = backbone(tiny_model("qwen2"))(input_ids=IDS, use_cache=False).last_hidden_state
    with student.disable_adapter():
        found = backbone(student)(input_ids=IDS, use_cache=False).last_hidden_state
    assert torch.equal(found, plain) and not calls


@pytest.mark.parametrize("kept", ["dropout", "hook", "merged", "dtype", "bias", "two"])
def test_peft_computes_what_is_not_the_same(kept: str, calls: list[int]) -> None:
    student = adapted(dropout=0.5 if kept == "dropout" else 0.0)
    layer = layers(student)[0]
    seen: list[int] = []
    if kept == "hook":
        layer.lora_A["default"].register_forward_hook(lambda *args: seen.append(1))
    elif kept == "merged":
        layer.merge()
    elif kept == "dtype":
        layer.lora_A.double()
        layer.lora_B.double()
    elif kept == "bias":
        layer.lora_B["default"].bias = nn.Parameter(torch.zeros(layer.out_features))
    elif kept == "two":
        student.add_adapter("second", student.peft_config["default"])
        layer.set_adapter(["default", "second"])
    x = torch.randn(3, layer.in_features)
    found = layer(x)
    assert not calls and found.shape == (3, layer.out_features) and found.dtype == torch.float32
    assert len(seen) == (kept == "hook")
    if kept == "dropout":
        layer.eval()
        layer(x)
        assert len(calls) == 1


def test_what_is_saved_is_a_peft_adapter(tmp_path: Path) -> None:
    student = adapted().eval()
    student.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("qwen2"), str(tmp_path)).eval()
    assert not layers(loaded)
    with torch.no_grad():
        ours, theirs = (
            backbone(model)(input_ids=IDS, use_cache=False).last_hidden_state
            for model in (student, loaded)
        )
    torch.testing.assert_close(ours, theirs)
