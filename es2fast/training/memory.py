"""What a training needs of a rank's memory, estimated without loading any weights.

Under ZeRO DeepSpeed keeps, whichever the precision, an fp32 copy of what trains and two fp32 Adam
moments, and makes the rank's share of the gradients anew in fp32 at a step. Activations are counted
(`activations`); the workspace is an allowance: the process, copies of a step and of the safeguards,
buckets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from es2fast.config import Config
from es2fast.modeling.load import DTYPES
from es2fast.modeling.skeleton import make_skeleton
from es2fast.modeling.teacher import head_is_shared, resolve_teacher, set_trainable
from es2fast.ops.tokens import CPU_CHUNK, GPU_CHUNK, GPU_CHUNK_TRAINABLE
from es2fast.training.activations import Tokens, student_bytes
from es2fast.training.master_adamw import TOGETHER
from es2fast.training.robust import attacked_blocks
from es2fast.training.shape import Shape, shape_of

GB = 1e9
PARTS = (
    "weights", "teacher", "gradients", "optimizer", "activations", "head", "gathers", "workspace",
)  # fmt: skip
PROCESS = {"cuda": 1.0 * GB, "cpu": 0.8 * GB}  # libraries; a GPU's context and fragmentation
_DEFAULT_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, elements
_DEFAULT_LIVE = 1_000_000_000  # and its stage3_max_live_parameters
_TORCH_LOGIT = 52  # bytes where plain torch makes a sharded head's row pass: 13 float32 copies


@dataclass(frozen=True)
class Estimate:
    """Bytes per rank at the peak of a training under a ZeRO stage.

    weights: what the rank holds of the student; gathers: weights that stage 3 keeps gathered;
    head: chunks of logits and the head's gradients; workspace: the process, buckets, copies.
    """

    stage: int
    weights: float
    teacher: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    gathers: float
    workspace: float

    @property
    def total(self) -> float:
        return sum(self.bytes().values())

    def bytes(self) -> dict[str, float]:
        """The summands by name."""
        return {name: getattr(self, name) for name in PARTS}

    def parts(self) -> str:
        """The summands in words, in GB."""
        return ", ".join(f"{name} {size / GB:.2g}" for name, size in self.bytes().items() if size)


def model_sizes(config: Config, model: Any) -> Shape:
    """A model's shape, from the meta device; `layers: auto` counts as the deepest block that it may
    choose.

    Args:
        config: the run, for what trains.
        model: the transformers config.

    Raises:
        UserError: transformers has no causal language model for it; `train.lora.targets` names
            modules that it does not have.
    """
    top = max(int(config.layer_choice.last * model.get_text_config().num_hidden_layers), 1) - 1
    deepest = top if config.layers == "auto" else max(config.layers)
    skeleton = make_skeleton(config.model, model)
    with torch.device("meta"):
        return shape_of(set_trainable(skeleton, config.train, deepest), deepest)


def estimate(
    config: Config,
    shape: Shape,
    zero: dict[str, Any],
    *,
    world_size: int,
    device: str,
    dtype: str,
    tokens: Tokens,
    sharded: bool = False,
) -> Estimate:
    """What a rank holds at the peak.

    Args:
        config: the run.
        shape: of its model.
        zero: `zero_optimization` of the complete DeepSpeed mapping.
        world_size: ranks.
        device: "cpu" or "cuda".
        dtype: "bf16" or "fp32".
        tokens: of the largest micro-batch.
        sharded: the LM head stays parted under ZeRO-3 (`train.zero3_head`).
    """
    stage, item = int(zero.get("stage", 0)), DTYPES[dtype].itemsize
    split = world_size if stage == 3 else 1
    kind = resolve_teacher(config.train)
    twin = kind == "twin"
    teacher = 0
    if twin:  # below stage 3 it shares what does not train
        teacher = shape.total if stage == 3 else shape.trained
    if kind == "cache" and not head_is_shared(config.train):
        teacher = shape.hidden * shape.vocabulary  # a frozen copy of the LM head
    held = item * (shape.total + (shape.trained if config.train.trainable == "lora" else 0))
    states = training_states(shape.trained, stage, item, world_size, device)
    offloaded = device == "cuda" and bool(zero.get("offload_optimizer"))
    kept = _copies(config, shape, item, device, split, world_size)
    return Estimate(
        stage=stage,
        weights=held / split,
        teacher=item * teacher / split,
        gradients=states.gradients,
        optimizer=0.0 if offloaded else states.optimizer,
        activations=student_bytes(
            shape, tokens, item=item, anchored=config.refusal.weight > 0,
            checkpointed=config.train.gradient_checkpointing,
        ),
        head=_head(shape, tokens.upper, device, item, world_size if sharded else 1),
        gathers=_gathered(shape, zero, item, twin, sharded) if stage == 3 else 0.0,
        workspace=PROCESS[device] + states.copies + kept
        + _buckets(shape, zero, stage, item, device),
    )  # fmt: skip


@dataclass(frozen=True)
class TrainingStates:
    """Bytes that last from a backward to the step (gradients), for ever (optimizer: fp32 weights
    and two moments), and during a step only (copies)."""

    gradients: float
    optimizer: float
    copies: float


def training_states(trained: int, stage: int, item: int, ranks: int, device: str) -> TrainingStates:
    """What DeepSpeed keeps of the trained parameters.

    At stage 0 fp32 weights are their own copy, and bf16 ones are updated piece by piece, on a GPU
    in groups of `TOGETHER` elements. Else a step makes the rank's gradients anew in fp32.

    Args:
        trained: parameters.
        stage: of ZeRO.
        item: bytes of an element of the weights.
        ranks: of the run.
        device: "cpu" or "cuda".
    """
    if stage == 0:
        kept = 8.0 if item == 4 else 12.0
        grouped = 0 if item == 4 or device == "cpu" else min(trained, TOGETHER)
        return TrainingStates(float(item * trained), kept * trained, 4.0 * grouped)
    own = trained / ranks
    return TrainingStates(
        gradients=item * (trained if stage < 2 else own),
        optimizer=12.0 * own,
        copies=4 * own,
    )


def _chunk(shape: Shape, device: str) -> int:
    """At most (`ops.tokens.full_wave_chunk` takes up to twice the least)."""
    if device == "cpu":
        return CPU_CHUNK
    return 2 * (GPU_CHUNK_TRAINABLE if shape.head_trained else GPU_CHUNK)


def _head(shape: Shape, tokens: int, device: str, item: int, parts: int) -> float:
    """Chunks of logits, states and their gradients, and the head's own where it trains.

    Args:
        shape: of the model.
        tokens: of a rank's micro-batch behind the last block.
        device: "cpu" or "cuda".
        item: bytes of an element.
        parts: ranks among which the head lies, and to each of which the tokens of all travel.
    """
    seen = parts * tokens
    chunk, each = _chunk(shape, device), 8
    states = 2 * item * tokens * shape.hidden
    if parts > 1:  # of all ranks; the gradient in float32, and once more to be handed back
        states += (2 * item + 8) * seen * shape.hidden
        chunk = CPU_CHUNK if device == "cpu" else GPU_CHUNK
        if device == "cpu" or item == 4:
            each = _TORCH_LOGIT
    logits = each * min(chunk, seen) * shape.vocabulary / parts
    trained = (4 + item) * shape.head_trained * shape.vocabulary * shape.hidden
    return logits + states + trained


def _copies(
    config: Config, shape: Shape, item: int, device: str, split: int, ranks: int
) -> float:  # fmt: skip
    """Of a CPU's own memory: those of the safeguards during, one of the model after a training.
    Of a GPU's: the states of both groups that simulated attacks are fitted on."""
    if device != "cpu":
        robust = config.separation.robust
        layers = [shape.deepest] if config.layers == "auto" else config.layers
        hit = len(attacked_blocks(config, layers, len(shape.blocks)))
        rows = -(-robust.states // ranks) if robust.probability else 0
        return 2.0 * 4 * rows * hit * shape.hidden
    kept = 2 * item * shape.trained / split if config.safeguards.keep_every else 0.0
    return max(kept, float(item * shape.total))


def _buckets(
    shape: Shape, zero: dict[str, Any], stage: int, item: int, device: str
) -> float:  # fmt: skip
    """DeepSpeed's two buckets of gradients."""
    if stage == 0:
        return 0.0
    bucket = zero.get("reduce_bucket_size", _DEFAULT_BUCKET)
    if device == "cpu":
        bucket = min(bucket, shape.trained)  # memory that is never written is never taken
    return 2.0 * item * bucket


def _gathered(
    shape: Shape, zero: dict[str, Any], item: int, twin: bool, sharded: bool
) -> float:  # fmt: skip
    """The weights that may stay gathered, which of a small model are all, but for an LM head that
    stays parted and is not the embedding: stage 3 then saves nothing."""
    live = zero.get("stage3_max_live_parameters", _DEFAULT_LIVE)
    apart = shape.hidden * shape.vocabulary if sharded and not shape.tied else 0
    return float(item * min(live, (1 + twin) * (shape.total - apart)))
