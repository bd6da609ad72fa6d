"""A twin copies what trains, and no more."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from es2fast.config import TrainConfig
from es2fast.errors import UserError
from es2fast.modeling.lora import FusedLoraLinear
from es2fast.modeling.taps import backbone, blocks
from es2fast.modeling.teacher import evaluating, make_twin, set_trainable, teacher_hidden


def test_a_twin_of_trained_blocks_shares_the_others() -> None:
    student = set_trainable(tiny_model("llama"), TrainConfig(trainable="blocks"), 1).train()
    twin = make_twin(student)
    own = {p.data_ptr() for p in twin.parameters()} - {p.data_ptr() for p in student.parameters()}
    trained = [p for p in student.parameters() if p.requires_grad]
    assert len(own) == len(trained) > 0
    assert blocks(twin)[3] is blocks(student)[3] and blocks(twin)[1] is not blocks(student)[1]
    assert not any(p.requires_grad for p in twin.parameters())
    student.train()
    ids = torch.tensor([[1, 4, 8, 12]])
    with torch.no_grad():
        before = backbone(twin)(input_ids=ids).last_hidden_state
        for p in trained:
            p.add_(0.1)
        with evaluating(twin):
            assert not blocks(student)[3].training
            after = backbone(twin)(input_ids=ids).last_hidden_state
    assert torch.equal(before, after)
    assert blocks(student)[3].training and not blocks(twin)[0].training


def test_the_student_without_adapters_is_the_base_model_without_dropout() -> None:
    base = tiny_model("llama", attention_dropout=0.5).eval()
    ids = torch.tensor([[1, 4, 8, 12]])
    with torch.no_grad():
        wanted = backbone(base)(input_ids=ids).last_hidden_state
    student = set_trainable(base, TrainConfig(trainable="lora"), 1).train()
    with torch.no_grad():
        assert not torch.equal(backbone(student)(input_ids=ids).last_hidden_state, wanted)
    assert torch.equal(teacher_hidden(student, None, {"input_ids": ids}), wanted)
    assert all(module.training for module in student.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adapters_have_the_precision_of_the_weights_and_compute_as_one(dtype: torch.dtype) -> None:
    student = set_trainable(tiny_model("llama").to(dtype), TrainConfig(trainable="lora"), 1)
    trained = [p for p in student.parameters() if p.requires_grad]
    assert trained and all(p.dtype == dtype for p in trained)
    fused = [m for m in student.modules() if isinstance(m, FusedLoraLinear)]
    x = torch.zeros(1, 1, fused[0].in_features, dtype=dtype)
    assert fused[0]._fusible(x) == "default"


def test_adapters_go_where_a_regular_expression_says_up_to_the_deepest_block() -> None:
    def targets(pattern: str, deepest: int) -> set[str]:
        lora = TrainConfig(trainable="lora", lora={"targets": pattern})
        student = set_trainable(tiny_model("llama"), lora, deepest)
        names = (name for name, p in student.named_parameters() if p.requires_grad)
        return {".".join(name.split(".")[4:7]) for name in names}

    found = targets(r".*\.(q|v)_proj", 1)
    assert found == {f"{i}.self_attn.{which}_proj" for i in (0, 1) for which in "qv"}
    with pytest.raises(UserError, match=r"train\.lora\.targets: '.*x_proj' fits no linear layer"):
        targets(r".*x_proj", 1)


def test_a_twin_of_a_whole_model_keeps_its_tied_weights() -> None:
    student = set_trainable(
        tiny_model("llama", tie_word_embeddings=True), TrainConfig(trainable="all"), 1
    )
    twin = make_twin(student)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight  # type: ignore[union-attr]
    assert twin.lm_head.weight is not student.lm_head.weight  # type: ignore[union-attr]
