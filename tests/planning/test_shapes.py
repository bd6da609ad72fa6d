"""Counts of parameters, flop and activations against models that are really run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from es2fast.config import parse_config
from es2fast.modeling.taps import backbone
from es2fast.modeling.teacher import set_trainable
from es2fast.planning.flops import Work, flops
from es2fast.training.activations import Tokens, student_bytes
from es2fast.training.memory import model_sizes
from es2fast.training.shape import Shape

ROWS, LENGTH = 2, 24
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
TRAINED: list[dict[str, Any]] = [
    {"trainable": "blocks"},
    {"trainable": "lora", "lora": {"r": 4}},
    {"trainable": "all"},
]


def model_of(family: str) -> Any:
    if family != "mixtral":
        return tiny_model(family, tie_word_embeddings=family == "qwen2")
    like = tiny_model("mistral").config.to_dict()
    kept = {k: v for k, v in like.items() if k in ("hidden_size", "intermediate_size", "vocab_size",
            "num_hidden_layers", "num_attention_heads", "num_key_value_heads")}  # fmt: skip
    config = AutoConfig.for_model("mixtral", **kept, **EXPERTS)
    config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_config(config)


def shape_and_student(family: str, train: dict[str, Any], attention: str) -> tuple[Shape, Any]:
    config = parse_config({"model": {"name": "m"}, "train": train, "layers": [0, 2]})
    model = model_of(family)
    model.set_attn_implementation(attention)
    shape = model_sizes(config, model.config)
    return shape, set_trainable(model, config.train, 2).train()


def run(student: Any) -> Any:
    ids = torch.randint(6, 20, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padding, so that a mask is made
    return backbone(student)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mixtral"])
@pytest.mark.parametrize("train", TRAINED, ids=lambda train: train["trainable"])
def test_parameters_and_flop_are_those_of_the_real_model(
    family: str, train: dict[str, Any]
) -> None:
    shape, student = shape_and_student(family, train, "eager")
    adapters = sum(p.numel() for name, p in student.named_parameters() if "lora_" in name)
    assert shape.total == sum(p.numel() for p in student.parameters()) - adapters
    assert shape.trained == sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert shape.experts == (family == "mixtral")
    work = Work(harmful=0, harmless=ROWS, length=LENGTH, kl_tokens=0)
    expected = flops(shape, work, checkpointed=False)
    with FlopCounterMode(display=False) as forward:
        final = run(student)
    # beside the products: the rotary angles, half a head's width per position
    assert forward.get_total_flops() == pytest.approx(expected.student, rel=2e-3)
    with FlopCounterMode(display=False) as backward:
        final.sum().backward()
    slack = 0.02 if family == "mixtral" else 2e-3
    assert backward.get_total_flops() == pytest.approx(expected.backward, rel=slack)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("train", TRAINED[:2], ids=lambda train: train["trainable"])
def test_activations_are_what_autograd_keeps(family: str, train: dict[str, Any]) -> None:
    shape, student = shape_and_student(family, train, "sdpa")
    own = {p.untyped_storage().data_ptr() for p in student.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        final = run(student)
    assert final.requires_grad
    tokens = Tokens.padded(0, ROWS, LENGTH)
    found = student_bytes(shape, tokens, item=4, anchored=False, checkpointed=False)
    assert found == pytest.approx(sum(kept.values()), rel=0.1)


def test_harmful_rows_end_at_the_deepest_block_and_the_anchor_carries_them_on() -> None:
    shape, _ = shape_and_student("llama", TRAINED[0], "eager")
    early = flops(shape, Work(2, 2, 10, kl_tokens=20), checkpointed=True)
    late = flops(shape, Work(2, 2, 10, kl_tokens=20, anchored=True), checkpointed=False)
    assert early.teacher == late.teacher
    assert early.student == pytest.approx(late.student * 7 / 8)  # 3 of 4 blocks for half the rows
    assert early.recomputation == early.student and late.recomputation == 0
    assert early.total == early.executed - early.recomputation
    assert early.head == 6 * 20 * 32 * shape.vocabulary  # frozen: two logits and dX
