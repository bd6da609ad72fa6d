"""Packed rows: every supported family computes them as it computes each row alone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, HEAD_FAMILIES, MORE_FAMILIES, tiny_model

from es2fast.data import MicroBatch
from es2fast.data.packing import Packed, common_prefix, pack, pays
from es2fast.modeling.packing import FAMILIES as PACKED
from es2fast.modeling.packing import takes_packed
from es2fast.modeling.taps import backbone

ROWS = [[1, 4, 8, 12, 5], [1, 4, 8, 7, 9, 5], [1, 4, 8, 10, 5, 11, 2], [1, 4, 8, 13, 14, 5, 2, 6]]
LAST = [4, 5, 4, 5]  # the last prompt token of each row


def batch(rows: list[list[int]] = ROWS, last: list[int] = LAST) -> MicroBatch:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    ends = torch.tensor([width - len(row) + end for row, end in zip(rows, last)])
    mask = (ids > 0).long()
    return MicroBatch(ids, mask, ends, mask[2:].float(), 2, int(mask.sum()))


def run(model: torch.nn.Module, packed: Packed) -> torch.Tensor:
    out = backbone(model)(
        input_ids=packed.input_ids,
        attention_mask=packed.mask(torch.float32),
        position_ids=packed.position_ids,
        use_cache=False,
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


def test_the_beginning_ends_before_a_last_prompt_token() -> None:
    same = [[1, 4, 8, 5], [1, 4, 8, 5], [1, 4, 8, 5, 9], [1, 4, 8, 5, 9]]
    packed = pack(batch(same, [3] * 4))
    assert packed.tokens == 3 + 1 + 1 + 2 + 2
    assert len({int(packed.place[i, 3 if i > 1 else 4]) for i in range(4)}) == 4
    other = pack(batch([[2, 4], *same[1:]], [1, 3, 3, 3]))
    assert other.tokens == 2 + 4 + 5 + 5  # nothing in common


@pytest.mark.parametrize("family", PACKED)
def test_states_are_those_of_each_row_alone(family: str) -> None:
    model = tiny_model(family)
    assert family in FAMILIES | MORE_FAMILIES | HEAD_FAMILIES
    assert takes_packed(model.config, 8)
    packed = pack(batch())
    with torch.no_grad():
        found = run(model, packed)
        for row, place, mask in zip(ROWS, packed.place, batch().attention_mask):
            alone = backbone(model)(input_ids=torch.tensor([row]), use_cache=False)
            torch.testing.assert_close(
                found[place[mask.bool()]], alone.last_hidden_state[0], rtol=1e-4, atol=1e-5
            )


def test_what_is_not_known_to_work_is_padded() -> None:
    config = tiny_model("gemma2").config
    assert takes_packed(config, 16) and not takes_packed(config, 17)  # its window
    llama = tiny_model("llama").config
    llama._attn_implementation = "flash_attention_2"
    assert not takes_packed(llama, 8)
    other = tiny_model("llama").config
    other.model_type = "mamba"
    assert not takes_packed(other, 8)


def test_one_sequence_is_not_taken_where_its_attention_costs_more() -> None:
    assert pays(8, 80, 400, hidden=896)
    assert not pays(64, 2000, 100_000, hidden=896)
