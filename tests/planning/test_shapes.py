"""Counts of parameters, flop and activations against models that are really run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from es2fast.config import parse_config
from es2fast.data import MicroBatch
from es2fast.data.packing import pack
from es2fast.modeling import packed_attention
from es2fast.modeling.taps import backbone, causal_lm
from es2fast.modeling.teacher import set_trainable
from es2fast.planning import flops as counts
from es2fast.planning.flops import Work, filter_flop, flops
from es2fast.training import update_filter as filters
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
    work = Work(Tokens.padded(0, ROWS, LENGTH), harmful=0, harmless=ROWS, kl_tokens=0)
    expected = flops(shape, work, checkpointed=False)
    with FlopCounterMode(display=False) as forward:
        final = run(student)
    # beside the products: the rotary angles, half a head's width per position
    assert forward.get_total_flops() == pytest.approx(expected.student, rel=2e-3)
    with FlopCounterMode(display=False) as backward:
        final.sum().backward()
    slack = 0.02 if family == "mixtral" else 2e-3
    assert backward.get_total_flops() == pytest.approx(expected.backward, rel=slack)


def kept_by_autograd(student: Any, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that a pass leaves for its backward, the parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in student.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        final = forward()
    assert final.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("train", TRAINED[:2], ids=lambda train: train["trainable"])
def test_activations_are_what_autograd_keeps(family: str, train: dict[str, Any]) -> None:
    shape, student = shape_and_student(family, train, "sdpa")
    kept = kept_by_autograd(student, lambda: run(student))
    tokens = Tokens.padded(0, ROWS, LENGTH)
    found = student_bytes(shape, tokens, item=4, anchored=False, checkpointed=False)
    assert found == pytest.approx(kept, rel=0.1)


def test_harmful_rows_end_at_the_deepest_block_and_the_anchor_carries_them_on() -> None:
    shape, _ = shape_and_student("llama", TRAINED[0], "eager")
    tokens = Tokens.padded(2, 2, 10)
    early = flops(shape, Work(tokens, 2, 2, kl_tokens=20), checkpointed=True)
    late = flops(shape, Work(tokens, 2, 2, kl_tokens=20, anchored=True), checkpointed=False)
    assert early.teacher == late.teacher
    assert early.student == pytest.approx(late.student * 7 / 8)  # 3 of 4 blocks for half the rows
    assert early.recomputation == early.student and late.recomputation == 0
    assert early.total == early.executed - early.recomputation
    assert early.head == 6 * 20 * 32 * shape.vocabulary  # frozen: two logits and dX
    kept = [
        flops(shape, Work(tokens, 2, 2, kl_tokens=20, teacher=kind), checkpointed=False)
        for kind in ("cache", "moments")
    ]
    assert kept[0].teacher == kept[1].teacher == 0 and kept[0].head == early.head
    assert kept[1].head == 4 * 20 * 32 * shape.vocabulary


@pytest.mark.parametrize("anchored", [False, True])
def test_a_densely_packed_sequence_attends_over_all_of_itself(anchored: bool) -> None:
    """13 harmful tokens, 7 shared ones, 20 harmless ones, through the real blocks."""
    shape, student = shape_and_student("llama", TRAINED[0], "eager")
    tokens = Tokens.packed([14, 13], [17, 17], 7, by_rows=False)
    inner = backbone(student)

    def through(states: torch.Tensor, first: int, last: int) -> torch.Tensor:
        count = states.shape[1]
        places = torch.arange(count)[None]
        mask = torch.zeros(1, 1, count, count)
        angles = inner.rotary_emb(states, places)
        for block in inner.layers[first:last]:
            states = block(
                states, attention_mask=mask, position_ids=places, position_embeddings=angles
            )
        return states

    split = len(shape.blocks) if anchored else shape.deepest + 1
    with FlopCounterMode(display=False) as forward:
        states = through(torch.randn(1, tokens.lower, shape.hidden), 0, split)
        through(states[:, 13:], split, len(shape.blocks))
    expected = flops(shape, Work(tokens, 2, 2, kl_tokens=0, anchored=anchored), checkpointed=False)
    assert forward.get_total_flops() == pytest.approx(expected.student, rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", TRAINED[:2], ids=lambda train: train["trainable"])
def test_a_packed_sequence_attends_by_rows(train: dict[str, Any], dtype: torch.dtype) -> None:
    shape, student = shape_and_student("qwen2", train, "sdpa")
    packed_attention.install(causal_lm(student))
    student.to(dtype)
    lengths, width, shared = [12, 9, 30, 28], 30, 6
    ids = torch.randint(6, 20, (4, width), generator=torch.Generator().manual_seed(0))
    real = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    for row, n in enumerate(lengths):  # differ behind the prefix
        ids[row, width - n : width - n + shared] = 5
        ids[row, width - n + shared] = 6 + row
    last = torch.full((4,), width - 1)
    packed = pack(MicroBatch(ids, real, last, real[2:].float(), 2, int(real.sum())))
    assert packed.tokens == sum(lengths) - 3 * shared

    def forward() -> torch.Tensor:
        return backbone(student)(
            input_ids=packed.input_ids,
            attention_mask=torch.empty(1, 1, 0, 0),
            position_ids=packed.position_ids,
            attention_rows=packed.rows,
            use_cache=False,
        ).last_hidden_state

    tokens = Tokens.packed(lengths[:2], lengths[2:], shared, by_rows=True)
    assert tokens.gathered == (2 * 12 + 2 * 30, 2 * 30)
    kept = kept_by_autograd(student, forward)
    found = student_bytes(shape, tokens, item=dtype.itemsize, anchored=True, checkpointed=False)
    assert found == pytest.approx(kept, rel=0.1)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        forward()
    work = Work(tokens, 2, 2, kl_tokens=0, anchored=True)
    expected = flops(shape, work, checkpointed=False).student
    assert counter.get_total_flops() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("held", [1 << 40, 3 * 6 * 8 * 32**2 - 1])
def test_flop_of_the_filter_are_those_of_its_passes(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks train, of six filtered layers with three inputs each; in one pass or in two."""
    monkeypatch.setattr(filters, "MOMENT_BYTES", held)
    monkeypatch.setattr(counts, "MOMENT_BYTES", held)
    shape, student = shape_and_student("llama", TRAINED[1], "eager")
    student.eval()
    ids = torch.randint(6, 20, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    passes = 0
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for layers in filters._groups(student):
            passes += 1
            moments = filters.InputMoments(layers)
            moments.mask = mask.bool()
            with moments:
                backbone(student)(input_ids=ids, attention_mask=mask, use_cache=False)
    attention = sum(4.0 * LENGTH * block.attention for block in shape.blocks) * ids.numel() * passes
    expected = filter_flop(shape, ids.numel()) + attention
    assert passes == (1 if held > 10**9 else 2)
    assert counter.get_total_flops() == pytest.approx(expected, rel=5e-3)
