"""What all judges share that ask a model: gibberish is settled by the rules before, and an output
that nobody understands leaves the answer to the rules.

Judge models are not trained on broken text and answer anything about it. References are not looked
at: such a judge reads the prompt and the answer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from es2fast.judges.base import Item, Judge, Verdict
from es2fast.judges.gibberish import looks_like_gibberish
from es2fast.judges.rules import judge


class AskedJudge(Judge):
    """A judge with opinions of its own on readable answers."""

    slow = True

    def __init__(self) -> None:
        self.unclear: set[Item] = set()

    @abstractmethod
    def opinions(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict | None]:
        """Per prompt and answer its verdict; None: its output made no sense."""

    def verdicts(self, items: Sequence[Item]) -> list[Verdict]:
        found = [judge(answer) for _, answer, _ in items]
        open_ = [i for i, (_, answer, _) in enumerate(items) if not looks_like_gibberish(answer)]
        for i, opinion in zip(open_, self.opinions([items[i][:2] for i in open_])):
            if opinion is None:
                self.unclear.add(items[i])
            else:
                found[i] = opinion
        return found
