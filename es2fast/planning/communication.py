"""Bytes that a rank sends in one optimizer step, by ZeRO stage.

Legend: W ranks, s = (W - 1) / W, P parameters (student and twin), Pt trained, b bytes of an
element, G micro-batches.

    0   2 s b Pt                 all-reduce of the gradients, once
    1   s b Pt + s b Pt          reduce-scatter once, all-gather of the updated weights
    2   s b Pt G + s b Pt        the first for every micro-batch
    3   s b Pt G + 3 s b P G     weights are gathered for teacher, student and backward; less where
                                 they stay gathered between the passes
"""

from __future__ import annotations


def step_bytes(
    stage: int, *, total: int, trained: int, item: int, ranks: int, micro_batches: int
) -> float:
    """Sent per rank and step.

    Args:
        stage: of ZeRO.
        total: parameters of the model; the teacher pass gathers as many again.
        trained: those that train.
        item: bytes of an element.
        ranks: W.
        micro_batches: G, of an optimizer step and rank.
    """
    share = (ranks - 1) / ranks * item
    if stage == 0:
        return 2 * share * trained
    if stage == 1:
        return 2 * share * trained
    if stage == 2:
        return share * trained * (micro_batches + 1)
    return share * micro_batches * (trained + 3 * total)
