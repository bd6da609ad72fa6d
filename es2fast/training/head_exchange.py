"""How a frozen LM head meets the tokens under ZeRO-3: `train.zero3_head`.

Gathered, every rank has the whole head while it makes its own tokens' losses. Sharded, it stays
where it lies, and each rank makes the logits of its rows for the tokens of all ranks.

Legend: p ranks, V vocabulary, H hidden size, b bytes of an element; the most tokens that a rank
brings to a micro-batch: n to the KL, m to the refusal anchor.

Received by a rank for a micro-batch, in bytes:

    gathered    b V H (p-1)/p       once, DeepSpeed keeps the head until its backward pass; nothing
                                    where the head is tied and still gathered as the embedding
    sharded     (p-1) [n ((2 b + 4) H + 28 p + 4) + m ((b + 4) H + 16 p + 12)]

Of a token: its states (in the KL the teacher's too), dX in float32, statistics between the ranks,
weights and targets. `auto` takes the sharded way on a GPU where even the longest micro-batch
receives less than half as much: gathering may hide behind the last blocks, the tokens cannot. On
CPUs it gathers, since the native kernels take whole heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from es2fast.config import Config
from es2fast.errors import UserError
from es2fast.modeling.load import DTYPES
from es2fast.modeling.skeleton import make_skeleton
from es2fast.modeling.teacher import head_is_shared, resolve_teacher

MARGIN = 2  # times as many bytes gathered as sharded
_DEFAULT_REUSE = 1_000_000_000  # DeepSpeed's stage3_max_reuse_distance, elements


@dataclass(frozen=True)
class HeadExchange:
    """sharded: the head stays parted; line: why, for the screen, "" where nothing is parted."""

    sharded: bool
    line: str = ""


def choose_head(
    config: Config,
    model: Any,
    zero: dict[str, Any],
    *,
    world_size: int,
    device: str,
    dtype: str,
    longest: int,
) -> HeadExchange:
    """Gathered or sharded, the same on every rank and for the whole run: DeepSpeed's trace of the
    modules would not survive a change.

    Args:
        config: the run.
        model: its transformers config.
        zero: `zero_optimization` of the complete DeepSpeed mapping.
        world_size: ranks.
        device: "cpu" or "cuda".
        dtype: "bf16" or "fp32".
        longest: tokens of the longest row.
    """
    if world_size == 1 or zero.get("stage") != 3:
        return HeadExchange(False)
    why = obstacle(config, zero, world_size)
    if why is not None:
        return HeadExchange(False, f"LM head: gathered, since {why}")
    text, item = model.get_text_config(), DTYPES[dtype].itemsize
    gathered = 0.0
    if not _embedding_stays(config, model, zero):
        gathered = gathered_bytes(text.vocab_size, text.hidden_size, item, world_size)
    most = _most_tokens(config, longest)
    sharded = sharded_bytes(text.hidden_size, item, world_size, *most)
    chosen = config.train.zero3_head
    if chosen == "auto":
        pays = device == "cuda" and MARGIN * sharded < gathered
        chosen = "sharded" if pays else "gathered"
    return HeadExchange(
        chosen == "sharded",
        f"LM head: {chosen}; a rank receives {gathered / 1e6:.3g} MB per micro-batch where it is "
        f"gathered, up to {sharded / 1e6:.3g} MB where it is sharded",
    )


def check_head(config: Config, zero: dict[str, Any], world_size: int) -> None:
    """UserError where `train.zero3_head: sharded` cannot be."""
    if config.train.zero3_head != "sharded":
        return
    why = obstacle(config, zero, world_size)
    if why is not None:
        raise UserError(f"train.zero3_head: sharded, but {why}; use train.zero3_head=auto")


def obstacle(config: Config, zero: dict[str, Any], world_size: int) -> str | None:
    """Why the head cannot stay sharded, in words; None: it can."""
    stage, train = int(zero.get("stage", 0)), config.train
    if stage != 3:
        return f"ZeRO stage {stage} leaves the head whole on every rank"
    if world_size == 1:
        return "a single rank has the whole head"
    if not head_is_shared(train):
        return f"train.trainable={train.trainable} trains the head"
    if resolve_teacher(train) == "moments":
        return "train.teacher=moments takes the whole head"
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        return "offload_param keeps the head on a disk"
    if zero.get("zero_quantized_nontrainable_weights"):
        return "zero_quantized_nontrainable_weights keeps the head in 8 bits"
    return None


def gathered_bytes(vocab: int, hidden: int, item: int, ranks: int) -> float:
    """Received by a rank for a micro-batch where the head is gathered."""
    return item * vocab * hidden * (ranks - 1) / ranks


def sharded_bytes(hidden: int, item: int, ranks: int, kl: float, refusal: float) -> float:
    """Received by a rank for a micro-batch where the head is sharded.

    Args:
        hidden: H; item: b; ranks: p.
        kl, refusal: n and m.
    """
    per_kl = (2 * item + 4) * hidden + 28 * ranks + 4
    per_refusal = (item + 4) * hidden + 16 * ranks + 12
    return (ranks - 1) * (kl * per_kl + refusal * per_refusal)


def _most_tokens(config: Config, longest: int) -> tuple[int, int]:
    """(n, m) of the longest micro-batch that a rank may have."""
    rows = config.train.micro_batch_size
    seen = {"all": longest, "response": config.data.max_response_tokens, "last": 1}
    anchored = config.refusal.tokens + 1 if config.refusal.weight else 0  # and the row watched
    return rows * max(seen[config.kl.positions], 1), rows * anchored


def _embedding_stays(config: Config, model: Any, zero: dict[str, Any]) -> bool:
    """A tied head is still gathered since the embedding of the student's pass."""
    if not getattr(model.get_text_config(), "tie_word_embeddings", False):
        return False
    text = model.get_text_config()
    skeleton = make_skeleton(config.model, model)
    between = sum(p.numel() for p in skeleton.parameters()) - text.vocab_size * text.hidden_size
    return between < zero.get("stage3_max_reuse_distance", _DEFAULT_REUSE)
