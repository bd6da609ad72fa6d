"""What a training needs of a rank's memory, estimated without loading any weights.

DeepSpeed keeps, whichever the precision, an fp32 copy of what trains and two fp32 Adam moments; at
a step the rank's share of the gradients exists twice, in bf16 also as fp32. Activations and
workspaces are a stated allowance, not a measurement: see `_activations` and `_workspace`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from es2fast.config import Config
from es2fast.errors import UserError
from es2fast.modeling.load import DTYPES
from es2fast.modeling.teacher import head_is_shared, resolve_teacher, set_trainable
from es2fast.ops.tokens import CPU_CHUNK, GPU_CHUNK_TRAINABLE

GB = 1e9
PROCESS = {"cuda": 1.0 * GB, "cpu": 0.8 * GB}  # libraries; a GPU's context and fragmentation
_DEFAULT_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, elements
_DEFAULT_LIVE = 1_000_000_000  # and its stage3_max_live_parameters


@dataclass(frozen=True)
class Sizes:
    """Parameters: all, those that train. Depth, width and inner width of the blocks."""

    total: int
    trained: int
    depth: int
    hidden: int
    inner: int
    vocabulary: int


@dataclass(frozen=True)
class Estimate:
    """Bytes per rank at the peak of a training under a ZeRO stage."""

    stage: int
    weights: float
    teacher: float
    gradients: float
    optimizer: float
    workspace: float

    @property
    def total(self) -> float:
        return self.weights + self.teacher + self.gradients + self.optimizer + self.workspace

    def parts(self) -> str:
        """The summands in words, in GB."""
        names = ("weights", "teacher", "gradients", "optimizer", "workspace")
        return ", ".join(f"{name} {getattr(self, name) / GB:.2g}" for name in names)


def model_sizes(config: Config, model: Any) -> Sizes:
    """Counts a model's parameters on the meta device; `layers: auto` counts as the deepest block
    that it may choose.

    Args:
        config: the run, for what trains.
        model: the transformers config.

    Raises:
        UserError: transformers has no causal language model for it; `train.lora.targets` names
            modules that it does not have.
    """
    text = model.get_text_config()
    depth, hidden = text.num_hidden_layers, text.hidden_size
    top = max(int(config.layer_choice.last * depth), 1) - 1
    with torch.device("meta"):
        empty = _empty_model(config, model)
        total = sum(p.numel() for p in empty.parameters())
        deepest = top if config.layers == "auto" else max(config.layers)
        student = set_trainable(empty, config.train, deepest)
    return Sizes(
        total=total,
        trained=sum(p.numel() for p in student.parameters() if p.requires_grad),
        depth=depth,
        hidden=hidden,
        inner=getattr(text, "intermediate_size", None) or 4 * hidden,
        vocabulary=text.vocab_size,
    )


def _empty_model(config: Config, model: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    trusted = config.model.trust_remote_code
    try:
        return AutoModelForCausalLM.from_config(copy.deepcopy(model), trust_remote_code=trusted)
    except (ValueError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"model.name: {config.model.name!r} cannot be loaded ({reason})") from None


def estimate(
    config: Config,
    sizes: Sizes,
    zero: dict[str, Any],
    *,
    world_size: int,
    device: str,
    dtype: str,
    longest: int,
) -> Estimate:
    """What a rank holds at the peak under stage 2 or 3.

    Args:
        config: the run.
        sizes: of its model.
        zero: `zero_optimization` of the complete DeepSpeed mapping.
        world_size: ranks.
        device: "cpu" or "cuda".
        dtype: "bf16" or "fp32".
        longest: tokens of the longest row.
    """
    item, trained = DTYPES[dtype].itemsize, sizes.trained / world_size
    split = world_size if zero["stage"] == 3 else 1
    teacher = 0
    kind = resolve_teacher(config.train)
    twin = kind == "twin"
    if twin:
        teacher = sizes.total
    elif kind == "cache" and not head_is_shared(config.train):
        teacher = sizes.hidden * sizes.vocabulary  # a frozen copy of the LM head
    work = _activations(config, sizes, item, device, longest)
    if device == "cpu":  # copies for the safeguards during, one of the model after the training
        copies = 2 * item * sizes.trained / split if config.safeguards.keep_every else 0
        work = max(work + copies, item * sizes.total)
    return Estimate(
        stage=zero["stage"],
        weights=item * sizes.total / split,
        teacher=item * teacher / split,
        gradients=(8 if device == "cuda" else 12) * trained,  # a CPU's AdamW is not fused
        optimizer=12 * trained,
        workspace=work + _workspace(sizes, zero, item, device, twin),
    )


def _activations(config: Config, sizes: Sizes, item: int, device: str, longest: int) -> float:
    """Bytes: per token and block 12 rows of the width and 4 of the inner width, as a Llama block
    leaves them behind for backward; two fp32 chunks of logits."""
    block = 12 * sizes.hidden + 4 * sizes.inner
    kept = sizes.depth * block
    if config.train.gradient_checkpointing:
        kept = sizes.depth * sizes.hidden + block
    tokens = 2 * config.train.micro_batch_size * longest
    chunk = GPU_CHUNK_TRAINABLE if device == "cuda" else CPU_CHUNK
    return item * kept * tokens + 8 * chunk * sizes.vocabulary


def _workspace(sizes: Sizes, zero: dict[str, Any], item: int, device: str, twin: bool) -> float:
    """Bytes: the process, DeepSpeed's two buckets of gradients, and under stage 3 the weights that
    may stay gathered, which of a small model are all: stage 3 then saves nothing."""
    bucket = zero.get("reduce_bucket_size", _DEFAULT_BUCKET)
    if device == "cpu":
        bucket = min(bucket, sizes.trained)  # memory that is never written is never taken
    gathered = 0
    if zero["stage"] == 3:
        live = zero.get("stage3_max_live_parameters", _DEFAULT_LIVE)
        gathered = min(live, (1 + twin) * sizes.total)
    return PROCESS[device] + item * (2 * bucket + gathered)
