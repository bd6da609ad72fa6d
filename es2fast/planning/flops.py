"""Floating-point operations of one micro-batch on one rank, by part.

Legend: n harmful and m harmless rows of T columns (padding is computed too), H width, V vocabulary,
N tokens of the KL. A product of N rows with an (out, in) weight takes 2 N in out; attention takes
4 T A per token (all T columns; a fused kernel's second pass over the scores is not counted).

    teacher    m rows through all blocks
    student    n + m rows through the blocks that harmful rows reach, m through the rest
    head       2 N H V for either logits and for dX, once more for dW where the head trains
    backward   the same products for dX; dW for what trains; twice the attention
"""

from __future__ import annotations

from dataclasses import dataclass

from es2fast.training.shape import Block, Shape


@dataclass(frozen=True)
class Work:
    """A micro-batch: rows, columns, tokens of the KL and of the refusals; ranks whose embeddings
    are compared; layers that are separated."""

    harmful: int
    harmless: int
    length: float
    kl_tokens: float
    refusal_tokens: float = 0.0
    anchored: bool = False
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
    columns, everyone = work.length, work.harmful + work.harmless
    teacher = student = backward = 0.0
    for index, block in enumerate(shape.blocks):
        reached = work.anchored or index <= shape.deepest
        tokens = columns * (everyone if reached else work.harmless)
        attention = 4.0 * columns * block.attention
        teacher += columns * work.harmless * (block.flop + attention)
        student += tokens * (block.flop + block.adapter_flop + attention)
        backward += tokens * (_backward(block, index == 0) + 2 * attention)
    logits = 2.0 * shape.hidden * shape.vocabulary
    gradients = 2 if shape.head_trained else 1
    head = logits * ((2 + gradients) * work.kl_tokens + (1 + gradients) * work.refusal_tokens)
    pairs = work.layers * 2.0 * work.harmful * work.harmless * work.ranks
    return Flops(
        teacher=teacher,
        student=student,
        head=head,
        separation=6.0 * shape.hidden * pairs,
        backward=backward,
        recomputation=student if checkpointed else 0.0,
    )


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
