"""What a forward pass leaves behind for its backward, per token of the student's pass.

    norm of width H   its input (fp32, into which a bf16 state is cast), the normalised state where
                      the norm trains
    linear            its input, once for those that share it, where one of them learns
    attention         queries, keys, values and output, keys and values repeated to all heads;
                      eager attention also two (heads, T) rows of probabilities
    gated MLP         gate, its activation and the other half

Of experts the routing and the weighted outputs are not counted: a tiny Mixtral kept a quarter more.

A frozen block below which nothing trains would leave nothing; there is none here, since blocks
train from the first one on.
"""

from __future__ import annotations

from dataclasses import dataclass

from es2fast.training.shape import Block, Product, Shape


@dataclass(frozen=True)
class Tokens:
    """Of a micro-batch as the student computes it, padded or packed into one sequence.

    lower: tokens that enter the first block; upper: those of the harmless rows, which alone go on
    behind the deepest separated block; length: of a sequence; mask: elements of the mask that a
    packed sequence brings along, 0 for padded rows.
    """

    lower: int
    upper: int
    length: int
    mask: int = 0

    @classmethod
    def padded(cls, harmful: int, harmless: int, length: int) -> Tokens:
        """Rows of `length` columns."""
        return cls((harmful + harmless) * length, harmless * length, length)

    @classmethod
    def packed(cls, harmful: int, shared: int, harmless: int) -> Tokens:
        """One sequence of harmful suffixes, a common prefix and harmless suffixes."""
        whole = harmful + shared + harmless
        return cls(whole, shared + harmless, whole, mask=whole * whole)

    @property
    def columns(self) -> tuple[int, int]:
        """That a token attends over in the lower and in the upper blocks."""
        return (self.lower, self.upper) if self.mask else (self.length, self.length)


def block_bytes(block: Block, hidden: int, length: int, item: int) -> float:
    """Bytes per token that one block keeps until its backward.

    Args:
        block: its shape.
        hidden: H.
        length: T, columns of the batch.
        item: bytes of an element.
    """
    elements = float(block.norms_trained * hidden)
    parents: dict[str, list[Product]] = {}
    for product in block.products:
        parents.setdefault(product.parent, []).append(product)
    for products in parents.values():
        first, last = products[0], products[-1]
        if any(product.learns for product in products[:-1] or products):
            elements += first.share * first.inputs
        if len(products) < 2:  # a router, a gate
            continue
        if (
            last.inputs == block.attention
            and len(products) in (2, 3, 4)
            and first.share == 1
            and ("attn" in last.parent or "attention" in last.parent)
        ):
            elements += 4 * block.attention + 2 * block.eager * block.heads * length
        else:
            inner = last.share * last.inputs
            elements += inner * (3 if _gated(products) else 1)
            elements += inner if last.learns else 0
        elements += sum(product.share * product.rank for product in products)
    return item * elements + 4 * block.norms * hidden


def _gated(products: list[Product]) -> bool:
    """Two halves of an MLP, in two weights or fused in one."""
    return len(products) > 2 or products[0].outputs == 2 * products[-1].inputs


def student_bytes(
    shape: Shape, tokens: Tokens, *, item: int, anchored: bool, checkpointed: bool
) -> float:
    """Bytes that a student's pass keeps.

    Args:
        shape: of the student.
        tokens: of a micro-batch.
        item: bytes of an element.
        anchored: harmful rows run to the end.
        checkpointed: only the blocks' inputs are kept, and one block is made again at a time.
    """
    upper = tokens.lower if anchored else tokens.upper
    total, largest = 4.0 * upper * shape.hidden + item * tokens.mask, 0.0
    for index, block in enumerate(shape.blocks):
        count = tokens.lower if index <= shape.deepest else upper
        own = count * block_bytes(block, shape.hidden, tokens.length, item)
        largest = max(largest, own)
        total += count * item * shape.hidden if checkpointed else own
    return total + (largest if checkpointed else 0.0)
