"""What a forward pass leaves behind for its backward, per token of the student's pass.

    norm of width H   its input (fp32, into which a bf16 state is cast), the normalised state where
                      the norm trains
    linear            its input, once for those that share it, where one of them learns
    attention         queries, keys, values and output, keys and values repeated to all heads;
                      eager attention also two (heads, T) rows of probabilities; of a packed
                      sequence the same of the gathered rows, keys and values not repeated
    gated MLP         gate, its activation and the other half

Of experts the routing and the weighted outputs are not counted: a tiny Mixtral kept a quarter more.

A frozen block below which nothing trains would leave nothing; there is none here, since blocks
train from the first one on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from es2fast.training.shape import Block, Product, Shape


@dataclass(frozen=True)
class Tokens:
    """Of a micro-batch as the student computes it, padded or packed into one sequence.

    lower: tokens that enter the first block; upper: those of the harmless rows, which alone go on
    behind the deepest separated block. Each for lower and upper: pairs, of a query and a key, over
    which attention goes; gathered, places of the rows that a packed sequence is attended in, 0
    where attention takes the tokens as they are. mask: elements of one over the whole sequence.
    """

    lower: int
    upper: int
    pairs: tuple[int, int]
    gathered: tuple[int, int] = (0, 0)
    mask: int = 0

    @classmethod
    def padded(cls, harmful: int, harmless: int, length: int) -> Tokens:
        """Rows of `length` columns."""
        lower, upper = (harmful + harmless) * length, harmless * length
        return cls(lower, upper, (lower * length, upper * length))

    @classmethod
    def packed(
        cls,
        harmful: Sequence[int],
        harmless: Sequence[int],
        shared: int,
        by_rows: bool,
        apart: bool = False,
    ) -> Tokens:
        """One sequence of harmful suffixes, a common prefix and harmless suffixes.

        Args:
            harmful, harmless: tokens of each row, the prefix included.
            shared: tokens of the prefix.
            by_rows: each is attended for itself; otherwise densely, under a mask.
            apart: the harmful rows have no part in the prefix.
        """
        upper = sum(harmless) - shared * (len(harmless) - 1)
        lower = sum(harmful) - (0 if apart else shared * len(harmful)) + upper
        if not by_rows:
            return cls(lower, upper, (lower**2, upper**2), mask=lower**2)
        groups = [(len(rows) * max(rows), max(rows)) for rows in (harmful, harmless)]
        (a, first), (b, second) = groups
        return cls(lower, upper, (a * first + b * second, b * second), (a + b, b))

    @property
    def is_packed(self) -> bool:
        """Its rows are one sequence."""
        return self.mask > 0 or self.gathered[0] > 0

    @property
    def columns(self) -> tuple[float, float]:
        """That a token attends over in the lower and in the upper blocks, on average."""
        return self.pairs[0] / self.lower, self.pairs[1] / self.upper


def block_bytes(block: Block, hidden: int, columns: float, gathered: float, item: int) -> float:
    """Bytes per token that one block keeps until its backward.

    Args:
        block: its shape.
        hidden: H.
        columns: that a token attends over.
        gathered: places per token of the rows that attention gathers, 0 where it does not.
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
            if gathered:
                elements += gathered * (2 * block.attention + 2 * block.keys)
            else:
                elements += 4 * block.attention + 2 * block.eager * block.heads * columns
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
        reached = anchored or index <= shape.deepest
        count = tokens.lower if reached else upper
        columns, gathered = tokens.columns[not reached], tokens.gathered[not reached] / count
        own = count * block_bytes(block, shape.hidden, columns, gathered, item)
        largest = max(largest, own)
        total += count * item * shape.hidden if checkpointed else own
    return total + (largest if checkpointed else 0.0)
