"""Taps: the right tensor, rows that end early, hooks that go away."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, MORE_FAMILIES, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from es2fast.errors import UserError
from es2fast.modeling.states import last_token_states
from es2fast.modeling.taps import (
    UNCUT,
    Intervention,
    SeparationTaps,
    backbone,
    blocks,
    check_layers,
    hidden_of,
    position_ids,
    tap_points,
    with_hidden,
)

IDS = torch.tensor([[0, 0, 1, 4, 10, 5], [1, 4, 8, 12, 13, 5], [0, 1, 4, 9, 14, 5]])
MASK = (IDS > 0).long()


def run(model: nn.Module, ids: Tensor = IDS, mask: Tensor = MASK) -> Tensor:
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}
    return backbone(model)(**inputs, use_cache=False).last_hidden_state


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_states_are_the_blocks_outputs_whatever_the_padding(family: str) -> None:
    model = tiny_model(family)
    found = last_token_states(model, [{"input_ids": IDS, "attention_mask": MASK}], [0, 2])
    for row, (ids, mask) in enumerate(zip(IDS, MASK)):
        alone = ids[mask.bool()][None]
        out = model(input_ids=alone, output_hidden_states=True, use_cache=False)
        for layer in (0, 2):
            expected = out.hidden_states[layer + 1][0, -1]
            torch.testing.assert_close(found[layer][row], expected, rtol=1e-4, atol=1e-5)


def norm_by_hand(model: nn.Module, norm: nn.Module, state: Tensor) -> Tensor:
    """RMSNorm, Gemma's with 1 + w, or LayerNorm, from the formula."""
    weight, config = norm.weight, model.config  # type: ignore[attr-defined]
    if config.model_type == "phi":
        centred = state - state.mean()
        scaled = centred / (centred.square().mean() + config.layer_norm_eps).sqrt()
        return scaled * weight + norm.bias
    scaled = state / (state.square().mean() + config.rms_norm_eps).sqrt()
    return scaled * (1 + weight if config.model_type == "gemma2" else weight)


@pytest.mark.parametrize("family", [*FAMILIES, "phi"])
def test_normed_states_are_what_the_next_block_reads(family: str) -> None:
    model = tiny_model(family)
    every, final = blocks(model), tap_points(model, [3], "normed")[0]
    with torch.no_grad():
        for module in (every[2].input_layernorm, final):
            module.weight.add_(torch.linspace(-0.5, 0.5, 32))
    last = last_token_states(model, [{"input_ids": IDS, "attention_mask": MASK}], [1, 3])
    found = last_token_states(
        model, [{"input_ids": IDS, "attention_mask": MASK}], [1, 3], space="normed"
    )
    for layer, norm in ((1, every[2].input_layernorm), (3, final)):
        for row in range(3):
            expected = norm_by_hand(model, norm, last[layer][row])
            torch.testing.assert_close(found[layer][row], expected, rtol=1e-5, atol=1e-5)


def test_a_family_without_input_norms_is_refused() -> None:
    model = tiny_model("llama")
    blocks(model)[2].input_norm_of_another_name = blocks(model)[2].input_layernorm
    del blocks(model)[2].input_layernorm
    with pytest.raises(UserError, match=r"entry of block 2.*space=residual"):
        tap_points(model, [1], "normed")
    with pytest.raises(UserError, match=r"Olmo2DecoderLayer has none of .*space=residual"):
        tap_points(tiny_model("olmo2"), [1], "normed")


@pytest.mark.parametrize("family", FAMILIES)
def test_in_the_normed_space_harmful_rows_end_one_block_later(family: str) -> None:
    model = tiny_model(family)
    full = run(model)
    taps = SeparationTaps(model, [0, 1], "normed")
    rows: list[int] = []
    handles = [
        block.register_forward_hook(lambda m, args, out: rows.append(hidden_of(out).shape[0]))
        for block in blocks(model)[2:]
    ]
    taps.arm(torch.tensor([5, 5, 5]), num_harmful=2)
    dropped = run(model)
    for handle in handles:
        handle.remove()
    assert rows == [3, 1] and dropped.shape[0] == 1
    torch.testing.assert_close(dropped[0], full[2], rtol=1e-5, atol=1e-5)
    expected = last_token_states(
        model, [{"input_ids": IDS, "attention_mask": MASK}], [0, 1], space="normed"
    )
    for layer in (0, 1):
        torch.testing.assert_close(taps.states[layer], expected[layer])
    taps.remove()


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
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


@pytest.mark.parametrize("family", UNCUT)
def test_where_blocks_hold_to_the_batch_nothing_is_cut(family: str) -> None:
    config = AutoConfig.for_model(family, hidden_size=32, n_layer=4, n_head=4, vocab_size=40)
    model = AutoModelForCausalLM.from_config(config).eval()

    def run(model: nn.Module) -> Tensor:
        return backbone(model)(input_ids=IDS, attention_mask=MASK).last_hidden_state

    full = run(model)
    taps = SeparationTaps(model, [0, 1])
    taps.arm(torch.tensor([5, 5, 4]), num_harmful=2)
    assert torch.equal(run(model), full)
    assert taps.states[1].shape == (3, model.config.hidden_size)
    taps.remove()


@pytest.mark.parametrize("space", ["residual", "normed"])
def test_harmful_rows_that_are_kept_run_to_the_end(space: str) -> None:
    model = tiny_model("llama")
    full = run(model)
    taps = SeparationTaps(model, [0, 1], space)
    taps.arm(torch.tensor([3, 4, 5]), num_harmful=2)
    run(model)
    states = taps.states
    taps.arm(torch.tensor([3, 4, 5]), num_harmful=2, keep=True)
    assert torch.equal(run(model), full)
    for layer in (0, 1):
        assert torch.equal(taps.states[layer], states[layer])
    taps.arm(torch.tensor([3, 4, 5]), num_harmful=2)  # the next pass cuts again
    assert run(model).shape[0] == 1
    taps.remove()


def test_an_answer_is_pushed_at_all_of_its_positions() -> None:
    """From the last prompt token on, in harmful rows only, as an attack pushes while decoding."""
    model = tiny_model("llama")
    outputs: list[torch.Tensor] = []
    taps = SeparationTaps(model, [1])
    handle = blocks(model)[1].register_forward_hook(
        lambda module, args, output: outputs.append(hidden_of(output).detach())
    )
    doubled = Intervention(frozenset([1]), lambda layer, states, rows: 2 * states + 1.0)
    for attack in (None, doubled):
        taps.arm(torch.tensor([3, 5, 4]), 2, attack, keep=True)
        run(model)
    handle.remove()
    taps.remove()
    clean, pushed = outputs
    expected = clean.clone()
    expected[0, 3:] = 2 * clean[0, 3:] + 1.0
    expected[1, 5:] = 2 * clean[1, 5:] + 1.0
    torch.testing.assert_close(pushed, expected)
    assert torch.equal(pushed[2], clean[2])


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


def test_a_decoder_is_never_the_head() -> None:
    """What ModernBERT's `get_decoder` gives."""
    config = AutoConfig.for_model(
        "modernbert-decoder", vocab_size=64, hidden_size=32, intermediate_size=48,
        num_hidden_layers=3, num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    assert len(blocks(AutoModelForCausalLM.from_config(config))) == 3
