"""The DeepSpeed mapping: presets, unknown keys, contradictions, batch arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from es2fast.config import Config, parse_config
from es2fast.distributed.deepspeed_config import (
    PRESETS,
    build_deepspeed,
    load_deepspeed,
)
from es2fast.errors import UserError


def config(**train: Any) -> Config:
    deepspeed = train.pop("deepspeed", "zero3")
    return parse_config({"model": {"name": "m"}, "train": train, "deepspeed": deepspeed})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_complete(name: str) -> None:
    raw = build_deepspeed(config(deepspeed=name), world_size=2, dtype="bf16")
    assert raw["bf16"] == {"enabled": True}
    assert raw["train_batch_size"] == 8
    assert "auto" not in json.dumps(raw)
    assert load_deepspeed(name)["zero_optimization"]["stage"] == int(name[4])


def test_live_parameters_hold_two_heads_and_two_blocks() -> None:
    class Text:
        hidden_size, vocab_size = 8192, 256000

        def get_text_config(self) -> Text:
            return self

    raw = build_deepspeed(config(), world_size=1, dtype="bf16", model_config=Text())
    assert raw["zero_optimization"]["stage3_max_live_parameters"] >= 2 * 8192 * 256000


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"zero_optimisation": {}}, ["zero_optimisation", "did you mean 'zero_optimization'"]),
        ({"zero_optimization": {"stge": 3}}, ["stge", "did you mean 'stage'"]),
        ({"fp16": {"enabled": True}}, ["fp16", "bf16"]),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, ["quantized"]),
        ({"train_micro_batch_size_per_gpu": 3}, ["contradicts", "3", "4"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping", "contradicts"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "train.schedule"]),
        ({"communication_data_type": "auto"}, ["communication_data_type", "auto"]),
    ],
)
def test_bad_json_is_named(raw: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build_deepspeed(config(deepspeed=raw), world_size=1, dtype="fp32")
    for word in words:
        assert word in str(caught.value)


def test_auto_values_that_belong_to_the_run_are_filled(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": "auto", "bf16": {"enabled": "auto"}}))
    raw = build_deepspeed(config(deepspeed=str(path)), world_size=3, dtype="fp32")
    assert raw["train_batch_size"] == 12
    assert raw["bf16"] == {"enabled": False}


def test_an_optimizer_of_the_hugging_face_form_is_filled_too() -> None:
    params = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    raw = build_deepspeed(config(deepspeed={"optimizer": {"type": "AdamW", "params": params}}),
                          world_size=1, dtype="bf16")  # fmt: skip
    train = config().train
    assert raw["optimizer"]["params"] == {
        "lr": train.lr, "betas": list(train.betas), "weight_decay": train.weight_decay
    }  # fmt: skip
    odd = {"optimizer": {"type": "AdamW", "params": {"amsgrad": "auto"}}}
    with pytest.raises(UserError, match=r"deepspeed\.optimizer\.params\.amsgrad: 'auto'"):
        build_deepspeed(config(deepspeed=odd), world_size=1, dtype="bf16")


def test_what_stands_beside_our_own_keys_is_kept() -> None:
    raw = {
        "bf16": {"enabled": "auto", "bf16_master_weights_and_grads": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}},
    }
    found = build_deepspeed(config(deepspeed=raw), world_size=1, dtype="bf16")
    assert found["bf16"] == {"enabled": True, "bf16_master_weights_and_grads": True}
    assert "offload_optimizer" not in found["zero_optimization"]  # which is what none means


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'zero3'"):
        load_deepspeed("zero-3")
    with pytest.raises(UserError, match="did you mean 'auto'"):
        load_deepspeed("Auto")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_deepspeed(str(tmp_path / "x.json"))


def test_batch_sizes_must_multiply() -> None:
    wanted = config(global_batch_size=10, micro_batch_size=2, gradient_accumulation=2)
    with pytest.raises(UserError, match="2 x gradient_accumulation 2 x 2 ranks = 8"):
        build_deepspeed(wanted, world_size=2, dtype="fp32")
