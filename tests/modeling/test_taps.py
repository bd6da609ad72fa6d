"""Taps: the right tensor, rows that end early, hooks that go away."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from torch import Tensor, nn

from es2fast.errors import UserError
from es2fast.modeling.taps import (
    SeparationTaps,
    backbone,
    blocks,
    check_layers,
    hidden_of,
    last_token_states,
    position_ids,
    with_hidden,
)

IDS = torch.tensor([[0, 0, 1, 4, 10, 5], [1, 4, 8, 12, 13, 5], [0, 1, 4, 9, 14, 5]])
MASK = (IDS > 0).long()


def run(model: nn.Module, ids: Tensor = IDS, mask: Tensor = MASK) -> Tensor:
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}
    return backbone(model)(**inputs, use_cache=False).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_the_blocks_outputs_whatever_the_padding(family: str) -> None:
    model = tiny_model(family)
    found = last_token_states(model, [{"input_ids": IDS, "attention_mask": MASK}], [0, 2])
    for row, (ids, mask) in enumerate(zip(IDS, MASK)):
        alone = ids[mask.bool()][None]
        out = model(input_ids=alone, output_hidden_states=True, use_cache=False)
        for layer in (0, 2):
            expected = out.hidden_states[layer + 1][0, -1]
            torch.testing.assert_close(found[layer][row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_harmful_rows_end_early_and_change_nothing_for_the_others(family: str) -> None:
    model = tiny_model(family)
    full = run(model)
    taps = SeparationTaps(model, [0, 1])
    rows: list[int] = []
    handle = blocks(model)[2].register_forward_hook(
        lambda module, args, output: rows.append(hidden_of(output).shape[0])
    )
    taps.arm(torch.tensor([5, 5, 4]), num_harmful=2)
    dropped = run(model)
    handle.remove()
    assert rows == [1] and dropped.shape[0] == 1
    torch.testing.assert_close(dropped[0], full[2], rtol=1e-5, atol=1e-5)
    assert taps.states[1].shape == (3, model.config.hidden_size)
    taps.disarm()
    assert torch.equal(run(model), full)
    taps.remove()
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks(model))


def test_a_model_whose_deepest_block_is_separated_keeps_all_rows() -> None:
    model = tiny_model("llama")
    taps = SeparationTaps(model, [3])
    taps.arm(torch.tensor([5, 5, 5]), num_harmful=2)
    assert run(model).shape[0] == 3


def test_block_outputs_may_be_tensors_or_tuples() -> None:
    hidden = torch.randn(2, 3, 4)
    assert hidden_of(hidden) is hidden
    assert hidden_of((hidden, None)) is hidden
    assert with_hidden((None, "cache"), hidden) == (hidden, "cache")
    assert with_hidden(torch.zeros(1), hidden) is hidden


def test_layers_out_of_range_are_named() -> None:
    with pytest.raises(UserError, match=r"block 7 .* blocks 0\.\.3"):
        check_layers([1, 7], 4)
    assert check_layers([3, 1], 4) == [1, 3]
