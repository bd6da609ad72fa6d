"""`train.zero3_head`: when a frozen head stays sharded under ZeRO-3, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny, write_prompts
from transformers import AutoConfig

from es2fast.config import parse_config
from es2fast.errors import UserError
from es2fast.training.head_exchange import choose_head, gathered_bytes, sharded_bytes
from es2fast.training.plan import make_plan

ZERO3 = {"stage": 3}
LLAMA = {"hidden_size": 4096, "vocab_size": 128256}
NARROW = LLAMA | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def chosen(
    zero: dict[str, Any] = ZERO3, ranks: int = 8, device: str = "cuda", longest: int = 480,
    shape: dict[str, Any] = LLAMA, raw: dict[str, Any] | None = None, **train: Any,
) -> bool:  # fmt: skip
    train = {"zero3_head": "auto"} | train
    config = parse_config({"model": {"name": "m"}, "train": train} | (raw or {}))
    model = AutoConfig.for_model("llama", **shape)
    return choose_head(
        config, model, zero, world_size=ranks, device=device, dtype="bf16", longest=longest
    ).sharded


def test_bytes() -> None:
    """Of 8 ranks with 1024 tokens each: states of both sides, dX in float32, statistics."""
    assert gathered_bytes(128256, 4096, 2, 8) == 2 * 128256 * 4096 * 7 / 8
    states, gradient = 2 * 7 * 1024 * 4096 * 2, 7 * 1024 * 4096 * 4
    rest = 7 * 1024 * (28 * 8 + 4)
    assert sharded_bytes(4096, 2, 8, 1024, 0) == states + gradient + rest
    refusals = 7 * 10 * (4096 * (2 + 4) + 16 * 8 + 12)
    assert sharded_bytes(4096, 2, 8, 0, 10) == refusals


def test_auto_is_a_matter_of_bytes() -> None:
    assert chosen()  # 4 rows of 480 tokens: 443 MB instead of 919 MB
    assert not chosen(longest=500)  # 462 MB
    assert chosen(longest=4000, raw={"kl": {"positions": "last"}})
    assert not chosen(raw={"refusal": {"weight": 1.0}}) and chosen(
        longest=440, raw={"refusal": {"weight": 1.0}}
    )
    assert not chosen(device="cpu") and chosen(device="cpu", zero3_head="sharded")
    assert not chosen(zero3_head="gathered")
    assert chosen(longest=4000, zero3_head="sharded")


def test_a_tied_head_that_is_still_gathered_stays_so() -> None:
    tied = NARROW | {"tie_word_embeddings": True}
    assert chosen(shape=NARROW, longest=100) and not chosen(shape=tied, longest=100)
    assert chosen(ZERO3 | {"stage3_max_reuse_distance": 1000}, shape=tied, longest=100)
    assert chosen(shape=tied, zero3_head="sharded")


@pytest.mark.parametrize(
    ("zero", "train", "ranks", "message"),
    [
        ({"stage": 2}, {}, 2, "ZeRO stage 2 leaves the head whole"),
        (ZERO3, {}, 1, "a single rank has the whole head"),
        (ZERO3, {"trainable": "all"}, 2, "train.trainable=all trains the head"),
        (ZERO3, {"teacher": "moments"}, 2, "train.teacher=moments takes the whole head"),
        (
            ZERO3 | {"zero_quantized_nontrainable_weights": True}, {}, 2,
            "zero_quantized_nontrainable_weights keeps the head in 8 bits",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_sharded_is_gathered_or_refused_by_name(
    tmp_path: Path, zero: dict[str, Any], train: dict[str, Any], ranks: int, message: str
) -> None:
    assert not chosen(zero, ranks, **train)
    raw = {
        "model": {"name": str(save_tiny(tmp_path / "model"))},
        "data": write_prompts(tmp_path / "data"),
        "train": {"device": "cpu", "zero3_head": "sharded"} | train,
        "deepspeed": {"zero_optimization": zero},
        "output_dir": str(tmp_path / "run"),
    }
    with pytest.raises(UserError, match=f"train.zero3_head: sharded, but {message}"):
        make_plan(parse_config(raw), world_size=ranks)


def test_the_plan_says_what_it_takes(tmp_path: Path) -> None:
    raw = {
        "model": {"name": str(save_tiny(tmp_path / "model", tie_word_embeddings=False))},
        "data": write_prompts(tmp_path / "data"),
        "train": {"device": "cpu", "zero3_head": "sharded"},
        "deepspeed": "zero3",
        "output_dir": str(tmp_path / "run"),
    }
    plan = make_plan(parse_config(raw), world_size=2)
    assert plan.head.sharded
    assert any("LM head: sharded; a rank receives" in line for line in plan.lines())
