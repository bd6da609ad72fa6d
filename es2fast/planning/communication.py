"""Bytes that a rank sends in one optimizer step, by ZeRO stage.

Legend: W ranks, s = (W - 1) / W, P parameters (student and twin), Pt trained, b bytes of an
element, G micro-batches, h parameters of a frozen LM head, T what its losses send where it is
sharded.

    0   2 s b Pt                 all-reduce of the gradients, once
    1   s b Pt + s b Pt          reduce-scatter once, all-gather of the updated weights
    2   s b Pt G + s b Pt        the first for every micro-batch
    3   s b Pt G + 3 s b P G     weights are gathered for teacher, student and backward; less where
                                 they stay gathered between the passes. A frozen head once, from the
                                 student's pass to its backward: s b h G instead of 3 s b h G (a
                                 tied one twice more, as the embedding), or T G
"""

from __future__ import annotations


def step_bytes(
    stage: int,
    *,
    total: int,
    trained: int,
    item: int,
    ranks: int,
    micro_batches: int,
    head: int = 0,
    tied: bool = False,
    tokens: float | None = None,
) -> float:
    """Sent per rank and step.

    Args:
        stage: of ZeRO.
        total: parameters of the model; the teacher pass gathers as many again.
        trained: those that train.
        item: bytes of an element.
        ranks: W.
        micro_batches: G, of an optimizer step and rank.
        head: h, part of `total`; 0: it trains.
        tied: the head is the embedding too.
        tokens: T; None: the head is gathered.
    """
    share = (ranks - 1) / ranks * item
    if stage == 0:
        return 2 * share * trained
    if stage == 1:
        return 2 * share * trained
    if stage == 2:
        return share * trained * (micro_batches + 1)
    gathered = 3 * (total - head) + (2 * head if tied else 0)
    for_losses = share * head if tokens is None else tokens
    return micro_batches * (share * (trained + gathered) + for_losses)
