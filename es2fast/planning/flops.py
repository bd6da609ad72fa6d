"""Floating-point operations of one micro-batch on one rank, by part.

Legend: H width, V vocabulary, N tokens of the KL, T columns of a row that is attended, padding
included, S tokens of a packed sequence. A product of N rows with an (out, in) weight takes
2 N in out; attention takes 4 T A per token of a row, under a dense mask 4 S A (all columns; a fused
kernel's second pass over the scores is not counted).

    teacher    the harmless rows through all blocks; nothing where its states or moments are kept
    student    all rows through the blocks that harmful rows reach, harmless ones through the rest
    head       2 N H V for either logits and for dX, once more for dW where the head trains;
               moments stand for the teacher's logits
    backward   the same products for dX; dW for what trains; twice the attention
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from es2fast.training.activations import Tokens
from es2fast.training.shape import Block, Shape
from es2fast.training.update_filter import MOMENT_BYTES

KEPT = ("cache", "moments")  # teachers that have run before the training


@dataclass(frozen=True)
class Work:
    """A micro-batch: its tokens, padded or packed; rows of either group; tokens of the KL and of
    the refusals; whether harmful rows run through all blocks; the kind of teacher, as
    `modeling.teacher.resolve_teacher` names it; ranks whose embeddings are compared; layers that
    are separated."""

    tokens: Tokens
    harmful: int
    harmless: int
    kl_tokens: float
    refusal_tokens: float = 0.0
    anchored: bool = False
    teacher: str = "twin"
    ranks: int = 1
    layers: int = 2


@dataclass(frozen=True)
class Flops:
    """Of a micro-batch; `total` without recomputation, which is no progress."""

    teacher: float
    student: float
    head: float
    separation: float
    backward: float
    recomputation: float

    @property
    def total(self) -> float:
        return self.teacher + self.student + self.head + self.separation + self.backward

    @property
    def executed(self) -> float:
        return self.total + self.recomputation


def flops(shape: Shape, work: Work, *, checkpointed: bool) -> Flops:
    """Of one micro-batch on one rank.

    Args:
        shape: of the student.
        work: the micro-batch.
        checkpointed: blocks are computed again in the backward.
    """
    lower, upper = work.tokens.lower, work.tokens.upper
    lower_columns, upper_columns = work.tokens.columns
    teacher = student = backward = 0.0
    for index, block in enumerate(shape.blocks):
        reached = work.anchored or index <= shape.deepest
        tokens, columns = (lower, lower_columns) if reached else (upper, upper_columns)
        attention = 4.0 * columns * block.attention
        teacher += upper * (block.flop + 4.0 * upper_columns * block.attention)
        student += tokens * (block.flop + block.adapter_flop + attention)
        backward += tokens * (_backward(block, index == 0) + 2 * attention)
    if work.teacher in KEPT:
        teacher = 0.0
    logits = 2.0 * shape.hidden * shape.vocabulary
    gradients = 2 if shape.head_trained else 1
    sides = 1 if work.teacher == "moments" else 2
    head = logits * ((sides + gradients) * work.kl_tokens + (1 + gradients) * work.refusal_tokens)
    pairs = work.layers * 2.0 * work.harmful * work.harmless * work.ranks
    return Flops(
        teacher=teacher,
        student=student,
        head=head,
        separation=6.0 * shape.hidden * pairs,
        backward=backward,
        recomputation=student if checkpointed else 0.0,
    )


def mean_flops(shape: Shape, works: Sequence[tuple[float, Work]], *, checkpointed: bool) -> Flops:
    """Of micro-batches, each with its share of all."""
    counted = [
        (share, astuple(flops(shape, work, checkpointed=checkpointed))) for share, work in works
    ]
    return Flops(
        *(sum(share * part[i] for share, part in counted) for i in range(len(counted[0][1])))
    )


def filter_flop(shape: Shape, tokens: float) -> float:
    """Of the update filter after a training: passes over `tokens`, as many as its moments need to
    fit, and the moments, 2 H^2 per token and distinct input of the layers that are filtered;
    attention is not counted.

    Args:
        shape: of the student.
        tokens: of both groups' rows.
    """
    narrow = [
        [p for p in block.products if p.rank and p.inputs <= shape.hidden] for block in shape.blocks
    ]
    passes, held = 1, 0
    for part in narrow:
        size = 8 * shape.hidden**2 * len(part)
        if held and held + size > MOMENT_BYTES:
            passes, held = passes + 1, 0
        held += size
    distinct = sum(
        len({p.parent for p in part if not p.last}) + sum(p.last for p in part) for part in narrow
    )
    forward = sum(block.flop + block.adapter_flop for block in shape.blocks)
    return tokens * (passes * forward + 2.0 * shape.hidden**2 * distinct)


def _backward(block: Block, first: bool) -> float:
    """Per token. The first block's input needs no gradient: where adapters alone train, the
    products that read it are not multiplied back."""
    total = 0.0
    adapters = not any(product.trained for product in block.products)
    for product in block.products:
        reads_input = product.parent == block.products[0].parent and not product.last
        entry = first and adapters and reads_input
        total += (1 - entry + product.trained) * product.flop + 2 * product.adapter_flop
        total -= entry * 2.0 * product.share * product.rank * product.inputs
    return total
