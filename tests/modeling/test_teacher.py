"""A twin copies what trains, and no more."""

from __future__ import annotations

import torch
from tiny_models import tiny_model

from es2fast.config import TrainConfig
from es2fast.modeling.taps import backbone, blocks
from es2fast.modeling.teacher import evaluating, make_twin, set_trainable


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


def test_a_twin_of_a_whole_model_keeps_its_tied_weights() -> None:
    student = set_trainable(
        tiny_model("llama", tie_word_embeddings=True), TrainConfig(trainable="all"), 1
    )
    twin = make_twin(student)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight  # type: ignore[union-attr]
    assert twin.lm_head.weight is not student.lm_head.weight  # type: ignore[union-attr]
