"""A model without its weights: what can be said about a run before anything large is loaded."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from es2fast.config import ModelConfig, TrainConfig
from es2fast.errors import UserError
from es2fast.modeling.adapter import damaged
from es2fast.modeling.taps import blocks

# what transformers raises over a config.json that is not what its family has
BROKEN_CONFIG = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError,
                 AssertionError, StrictDataclassError)  # fmt: skip
_POSITIONS = ("wpe", "positions_embed", "embed_positions", "position_embeddings")
_SEVERAL_STATES = ("gemma3n", "gemma3n_text")  # whose blocks hold four states per token


def make_skeleton(model: ModelConfig, config: Any) -> nn.Module:
    """The model of a transformers config on the meta device.

    Raises:
        UserError: no decoder-only causal language model; an unknown or missing attention
            implementation; no decoder blocks.
    """
    from transformers import AutoModelForCausalLM

    check_causal(model.name, config)
    if config.model_type in _SEVERAL_STATES:
        raise UserError(
            f"model.name: {model.name!r} is a {config.model_type!r} model, whose blocks hold "
            "several states per token and not one that could be separated; use another model"
        )
    if "flex" in (model.attn_implementation or ""):
        raise UserError(
            f"model.attn_implementation: {model.attn_implementation!r} is not supported, since its "
            "masks are not those of the rows that go on after an early exit; use sdpa, eager or "
            "flash_attention_2"
        )
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
    except (*BROKEN_CONFIG, ImportError) as error:
        if model.attn_implementation is None:
            raise UserError(
                f"model.name: {model.name!r} cannot be built ({_line(error)})"
            ) from None
        raise UserError(
            f"model.attn_implementation: {model.attn_implementation!r} cannot be used "
            f"({_line(error)}); use sdpa or eager, or leave it out"
        ) from None
    blocks(skeleton)
    return skeleton


def check_causal(name: str, config: Any) -> None:
    """UserError where a transformers config is not that of a decoder-only causal language model."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    causal: Any = AutoModelForCausalLM
    masked: Any = AutoModelForMaskedLM
    kind = type(config)
    text = f"model.name: {name!r} is a {config.model_type!r} model"
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{text}, which has an encoder; use a decoder-only chat model")
    if kind in masked._model_mapping and not getattr(config, "is_decoder", False):
        raise UserError(f"{text}, which fills masks; use a decoder-only chat model")
    remote = hasattr(config, "auto_map")  # code of its own, which the mapping does not know
    if kind not in causal._model_mapping and not remote:
        raise UserError(f"{text}, which is no causal language model; use a decoder-only chat model")
    if config.get_text_config().num_hidden_layers < 1:
        raise UserError(f"model.name: {name!r} has no blocks (num_hidden_layers in config.json)")


def check_positions(model: nn.Module, tokens: Callable[[], int], remedy: str) -> None:
    """UserError where a row is longer than the model's table of learned positions; positions that
    are computed, as rotary ones are, have no end.

    Args:
        model: of any device, also meta.
        tokens: of the longest row, answer included; asked only where there is a table.
        remedy: what to set.
    """
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return
    for name, table in model.named_modules():
        if not isinstance(table, nn.Embedding) or not name.endswith(_POSITIONS):
            continue
        if table.num_embeddings < limit:  # a vision tower's
            continue
        if (longest := tokens()) > limit:
            raise UserError(
                f"model.name: a {config.model_type!r} model has {limit} learned positions, and the "
                f"longest prompt with its answer has {longest} tokens; {remedy}"
            )


def check_lora_targets(skeleton: nn.Module, train: TrainConfig) -> None:
    """UserError when `train.lora.targets` matches no module of the model, or where the update is to
    be filtered none that reads states of the residual stream's width."""
    targets = train.lora.targets
    if train.trainable != "lora":
        return
    if not any(isinstance(m, nn.Linear) for block in blocks(skeleton) for m in block.modules()):
        raise UserError(
            f"train.trainable: lora, but the blocks of a {type(skeleton).__name__} hold no linear "
            "layers that take adapters; use train.trainable=blocks or all"
        )
    if targets == "all-linear":
        return
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(target_modules=targets)
    linear = {name: m for name, m in skeleton.named_modules() if isinstance(m, nn.Linear)}
    try:
        matched = [m for name, m in linear.items() if check_target_module_exists(config, name)]
    except re.error as error:
        raise UserError(
            f"train.lora.targets: {targets!r} is no regular expression ({error})"
        ) from None
    width = skeleton.config.get_text_config().hidden_size  # type: ignore[union-attr,operator]
    if matched and train.update_filter and all(m.in_features > width for m in matched):
        raise UserError(
            f"train.update_filter: {train.update_filter:g}, but train.lora.targets {targets!r} "
            "matches only layers with wider inputs than the residual stream, which are not "
            "filtered; add other targets or set update_filter=0"
        )
    if not matched:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise UserError(
            f"train.lora.targets: {targets!r} matches no linear layer; there are {', '.join(known)}"
        )


def check_weight_files(skeleton: nn.Module, model: ModelConfig, config: Any) -> None:
    """Compares the headers of a folder's safetensors with the model they belong to.

    Names are compared only where transformers loads them as they stand. What is not seen here is
    refused when the weights are loaded.

    Raises:
        UserError: a damaged file; a tensor of another shape; missing tensors.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    shapes = stored_shapes(Path(model.name))
    converted = get_checkpoint_conversion_mapping(config.model_type) is not None
    if not shapes or converted or getattr(config, "quantization_config", None) is not None:
        return
    expected = {name: tuple(weight.shape) for name, weight in skeleton.named_parameters()}
    common = expected.keys() & shapes.keys()
    for name in sorted(common):
        if shapes[name] != expected[name]:
            raise UserError(
                f"model.name: {model.name!r} stores {name} as {list(shapes[name])}, but its "
                f"config.json makes it {list(expected[name])}; weights and config do not belong "
                "together"
            )
    missing = sorted(expected.keys() - shapes.keys() - _tied(skeleton))
    if missing and common == shapes.keys():  # else some are stored under names of another layout
        raise UserError(missing_tensors(model.name, missing))


def missing_tensors(name: str, missing: list[str]) -> str:
    """The sentence about a checkpoint that lacks tensors."""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return (
        f"model.name: {name!r} lacks the weights {missing[0]}{more}, which would be random; "
        "give a complete checkpoint"
    )


def _tied(skeleton: nn.Module) -> set[str]:
    tied = getattr(skeleton, "all_tied_weights_keys", None) or {}
    return set(tied) | set(tied.values())


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of all `*.safetensors` in a folder, from their headers; {} where there is none.

    Raises:
        UserError: a damaged file.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        try:
            with safe_open(path, framework="pt") as file:
                stored = list(file.keys())
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in stored}
        except (SafetensorError, OSError) as error:
            raise UserError(damaged(path, error)) from None
    return shapes


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
