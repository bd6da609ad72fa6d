"""Packed rows on a real GPU: attention by rows, in whatever kernel sdpa takes there."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

pytest.importorskip("pydantic", reason="es2fast's configuration needs it")

from es2fast.data import MicroBatch
from es2fast.data.packing import pack
from es2fast.modeling import packed_attention
from es2fast.modeling.taps import backbone

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
DEVICE = "cuda"
# Heads of 64, as the fused kernels want them; two of keys and values for four of queries.
WIDE = {"hidden_size": 256, "intermediate_size": 320, "max_position_embeddings": 256}


def batch() -> MicroBatch:
    """Three harmful and three harmless rows of 20 to 90 tokens that begin alike."""
    generator = torch.Generator().manual_seed(0)
    lengths, width, prompt = [20, 31, 45, 66, 80, 90], 90, 18
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(6, 20, (length,), generator=generator)
        ids[row, width - length : width - length + 12] = torch.arange(6, 18)
    mask = (ids > 0).long()
    last = torch.tensor([width - length + prompt for length in lengths])
    return MicroBatch(ids, mask, last, mask[3:].float(), 3, int(mask.sum()))


def gradient(model: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Of the first block's queries, by a loss that reads every state."""
    along = torch.linspace(-1, 1, states.shape[-1], device=states.device)
    weight = backbone(model).layers[0].self_attn.q_proj.weight
    return torch.autograd.grad((states.double() @ along.double()).square().sum(), weight)[0]


@pytest.mark.parametrize("apart", [False, True], ids=["one_prefix", "apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_states_and_gradients_are_those_of_padded_rows(dtype: torch.dtype, apart: bool) -> None:
    rows, packed = batch(), pack(batch(), apart).to(DEVICE)
    mask = rows.attention_mask.bool()
    ids, attention_mask = rows.input_ids.to(DEVICE), rows.attention_mask.to(DEVICE)

    def padded(model: torch.nn.Module) -> torch.Tensor:
        inputs = {"input_ids": ids, "attention_mask": attention_mask, "use_cache": False}
        return backbone(model)(**inputs).last_hidden_state[mask.to(DEVICE)]

    exact_model = tiny_model("llama", **WIDE).to(DEVICE, torch.float64)
    exact = padded(exact_model)
    exact_grad = gradient(exact_model, exact)
    model = tiny_model("llama", **WIDE).to(DEVICE, dtype)
    plain = padded(model)
    plain_grad = gradient(model, plain)
    packed_attention.install(model)
    assert model.config._attn_implementation == packed_attention.NAME
    found = backbone(model)(
        input_ids=packed.input_ids,
        attention_mask=torch.empty(1, 1, 0, 0, device=DEVICE),
        position_ids=packed.position_ids,
        use_cache=False,
        attention_rows=packed.rows,
    ).last_hidden_state[0, packed.place[mask].to(DEVICE)]
    found_grad = gradient(model, found)
    for got, other, right in ((found, plain, exact), (found_grad, plain_grad, exact_grad)):
        error, allowed = (got - right).norm(), (other - right).norm()
        assert error <= 2 * allowed + 1e-6 * right.norm()
