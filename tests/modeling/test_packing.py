"""Packed rows: every supported family computes them as it computes each row alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, HEAD_FAMILIES, MORE_FAMILIES, tiny_model

from es2fast.data import MicroBatch
from es2fast.data.packing import Packed, common_prefix, pack, pays
from es2fast.modeling import packed_attention
from es2fast.modeling.packing import FAMILIES as PACKED
from es2fast.modeling.packing import attends_by_rows, takes_packed
from es2fast.modeling.taps import Intervention, SeparationTaps, backbone, position_ids
from es2fast.training.micro_batch import objective_inputs, packed_form

ROWS = [[1, 4, 8, 12, 5], [1, 4, 8, 7, 9, 5], [1, 4, 8, 10, 5, 11, 2], [1, 4, 8, 13, 14, 5, 2, 6]]
LAST = [4, 5, 4, 5]  # the last prompt token of each row


def batch(rows: list[list[int]] = ROWS, last: list[int] = LAST) -> MicroBatch:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    ends = torch.tensor([width - len(row) + end for row, end in zip(rows, last)])
    mask = (ids > 0).long()
    return MicroBatch(ids, mask, ends, mask[2:].float(), 2, int(mask.sum()))


def run(model: torch.nn.Module, packed: Packed, by_rows: bool) -> torch.Tensor:
    rows: dict[str, Any] = {"attention_rows": packed.rows} if by_rows else {}
    out = backbone(model)(
        input_ids=packed.input_ids,
        attention_mask=torch.empty(1, 1, 0, 0) if by_rows else packed.mask(torch.float32),
        position_ids=packed.position_ids,
        use_cache=False,
        **rows,
    )
    return out.last_hidden_state[0]


def test_what_rows_begin_with() -> None:
    assert common_prefix(ROWS) == 3 and common_prefix(ROWS[:1]) == len(ROWS[0])
    assert common_prefix([*ROWS, [2, 4, 8]]) == 0 and common_prefix([*ROWS, [1, 4]]) == 2


def test_the_common_beginning_is_there_once_and_harmful_suffixes_come_first() -> None:
    packed = pack(batch())
    assert packed.input_ids.tolist() == [[12, 5, 7, 9, 5, 1, 4, 8, 10, 5, 11, 2, 13, 14, 5, 2, 6]]
    assert packed.segment_ids.tolist() == [[1] * 2 + [2] * 3 + [0] * 3 + [3] * 4 + [4] * 5]
    assert packed.position_ids.tolist()[0][:8] == [3, 4, 3, 4, 5, 0, 1, 2]
    assert packed.harmful == 5
    for row, place, mask in zip(ROWS, packed.place, batch().attention_mask):
        assert packed.input_ids[0, place[mask.bool()]].tolist() == row


def test_harmful_rows_that_are_whole_are_cut_off() -> None:
    packed = pack(batch(), apart=True)
    assert packed.harmful == 5 + 6 and packed.tokens == pack(batch()).tokens + 2 * 3
    assert packed.input_ids.tolist()[0][:14] == [*ROWS[0], *ROWS[1], 1, 4, 8]
    assert packed.segment_ids.tolist()[0][:14] == [-1] * 5 + [-2] * 6 + [0] * 3
    for row, place, mask in zip(ROWS, packed.place, batch().attention_mask):
        assert packed.input_ids[0, place[mask.bool()]].tolist() == row
    upper = packed.rows.without_first(packed.harmful)
    assert torch.equal(upper.prefix[0], torch.arange(3)) and len(upper.index) == 1
    assert torch.equal(upper.index[0].flatten()[upper.home], torch.arange(len(upper.home)))


def test_the_beginning_ends_before_a_last_prompt_token() -> None:
    same = [[1, 4, 8, 5], [1, 4, 8, 5], [1, 4, 8, 5, 9], [1, 4, 8, 5, 9]]
    packed = pack(batch(same, [3] * 4))
    assert packed.tokens == 3 + 1 + 1 + 2 + 2
    assert len({int(packed.place[i, 3 if i > 1 else 4]) for i in range(4)}) == 4
    other = pack(batch([[2, 4], *same[1:]], [1, 3, 3, 3]))
    assert other.tokens == 2 + 4 + 5 + 5  # nothing in common


@pytest.mark.parametrize(
    ("family", "by_rows"),
    [(family, False) for family in PACKED] + [(one, True) for one in PACKED if one != "gemma2"],
)  # gemma2 caps its scores, which sdpa cannot
@pytest.mark.parametrize("apart", [False, True], ids=["one_prefix", "apart"])
def test_states_are_those_of_each_row_alone(family: str, by_rows: bool, apart: bool) -> None:
    model = tiny_model(family)
    assert family in FAMILIES | MORE_FAMILIES | HEAD_FAMILIES
    assert takes_packed(model.config, 8)
    if by_rows:
        packed_attention.install(model)
        assert model.config._attn_implementation == packed_attention.NAME
    packed = pack(batch(), apart)
    with torch.no_grad():
        found = run(model, packed, by_rows)
        for row, place, mask in zip(ROWS, packed.place, batch().attention_mask):
            alone = backbone(model)(input_ids=torch.tensor([row]), use_cache=False)
            torch.testing.assert_close(
                found[place[mask.bool()]], alone.last_hidden_state[0], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("apart", [False, True])
def test_gathers_into_rows_and_back_are_differentiated(apart: bool) -> None:
    packed = pack(batch(), apart)
    x = torch.randn(packed.tokens, 2, 3, dtype=torch.float64, requires_grad=True)

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        rows = packed_attention.to_rows(x, packed.rows)
        mixed = [row.cumsum(1) * torch.arange(1.0, 4.0, dtype=x.dtype) for row in rows]  # causal
        return packed_attention.from_rows(mixed, packed.rows)

    assert torch.autograd.gradcheck(there_and_back, x)
    found = there_and_back(x)
    for row, place, mask in zip(ROWS, packed.place, batch().attention_mask):
        own = x[place[mask.bool()]].cumsum(0) * torch.arange(1.0, 4.0, dtype=x.dtype)
        assert len(own) == len(row)
        torch.testing.assert_close(found[place[mask.bool()]], own)


@pytest.mark.parametrize("keep", [True, False], ids=["anchored", "ends_early"])
@pytest.mark.parametrize(
    ("where", "inside"), [("last", False), ("onwards", False), ("all", False), ("all", True)]
)
def test_an_attack_does_the_same_to_packed_rows(where: Any, inside: bool, keep: bool) -> None:
    model = tiny_model("llama").double()
    packed_attention.install(model)
    rows = batch()
    attack = Intervention(
        frozenset({0, 1, 2}),
        lambda i, x, rows: 0.5 * x + 0.1 * (i + 1 + rows[:, None]),
        where,
        inside=inside,
    )
    every = backbone(model).layers
    parts = [(i, part) for i, b in enumerate(every) for part in (b.self_attn, b.mlp)]
    taps = SeparationTaps(model, [0, 2], attacked=range(4), parts=parts)
    weight = every[0].mlp.down_proj.weight

    def passed(**inputs: Any) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        final = backbone(model)(use_cache=False, **inputs).last_hidden_state
        states = [taps.states[layer] for layer in (0, 2)]
        along = torch.linspace(-1, 1, 32).double()
        loss = states[1] @ along
        return final, states, torch.autograd.grad(loss.sum(), weight)[0]

    mask = rows.attention_mask
    taps.arm(rows.prompt_last, 2, attack, keep=keep)
    final, states, slope = passed(
        input_ids=rows.input_ids, attention_mask=mask, position_ids=position_ids(mask)
    )
    packed = packed_form(rows, model.config, True, where)
    assert packed is not None and packed.tokens == pack(rows).tokens + 6 * (where == "all")
    given = objective_inputs(rows, packed, attack=where)
    elsewhere = objective_inputs(replace(rows, places=(6, 9)), packed, attack=where)
    assert elsewhere["attacked"][2].unique().tolist() == [6, 9]
    size = (packed.tokens, packed.harmful)
    taps.arm(given["prompt_last"], 2, attack, keep=keep, packed=size, attacked=given["attacked"])
    joined, found, its_slope = passed(
        input_ids=packed.input_ids,
        attention_mask=torch.empty(1, 1, 0, 0),
        position_ids=packed.position_ids,
        attention_rows=packed.rows,
    )
    taps.remove()
    torch.testing.assert_close(found, states, rtol=1e-6, atol=1e-6)  # changes are made in fp32
    torch.testing.assert_close(its_slope, slope, rtol=1e-5, atol=1e-6)
    place = packed.place if keep else packed.place[2:] - packed.harmful
    kept = mask.bool() if keep else mask[2:].bool()
    torch.testing.assert_close(joined[0, place[kept]], final[kept], rtol=1e-6, atol=1e-6)
    clean = packed_form(rows, model.config, True)
    assert clean is not None and clean.tokens == pack(rows).tokens


def test_padded_rows_are_attended_as_by_sdpa() -> None:
    torch.manual_seed(0)
    ids, mask = batch().input_ids, batch().attention_mask
    model = tiny_model("qwen2")
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    plain = backbone(model)(**inputs).last_hidden_state[mask.bool()]
    packed_attention.install(model)
    assert model.config._attn_implementation == packed_attention.NAME
    torch.testing.assert_close(backbone(model)(**inputs).last_hidden_state[mask.bool()], plain)
    assert packed_attention.NAME not in model.config.to_json_string()


def test_bf16_rows_are_as_near_to_padded_ones_as_bf16_allows() -> None:
    model = tiny_model("qwen2").to(torch.bfloat16)
    rows = batch()
    mask = rows.attention_mask
    exact = backbone(tiny_model("qwen2").double())(
        input_ids=rows.input_ids, attention_mask=mask, use_cache=False
    ).last_hidden_state[mask.bool()]
    plain = backbone(model)(input_ids=rows.input_ids, attention_mask=mask, use_cache=False)
    packed_attention.install(model)
    packed = pack(rows)
    with torch.no_grad():
        found = run(model, packed, by_rows=True)[packed.place[mask.bool()]]
    padded = plain.last_hidden_state[mask.bool()]
    assert found.dtype == torch.bfloat16
    assert (found - padded).norm() < (padded - exact).norm()


def test_what_is_not_known_to_work_is_padded() -> None:
    config = tiny_model("gemma2").config
    assert takes_packed(config, 16) and not takes_packed(config, 17)  # its window
    llama = tiny_model("llama").config
    llama._attn_implementation = "flash_attention_2"
    assert not takes_packed(llama, 8) and not attends_by_rows(llama)
    other = tiny_model("llama").config
    other.model_type = "mamba"
    assert not takes_packed(other, 8)


def test_one_sequence_is_not_taken_where_its_attention_costs_more() -> None:
    assert pays(8, 80, 400, hidden=896)
    assert not pays(64, 2000, 100_000, hidden=896)
