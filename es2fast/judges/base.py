"""What a judge is: it says how a harmful prompt ended, from the prompt and the answer alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, get_args

Verdict = Literal["refused", "useful", "gibberish"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
Item = tuple[str, str, str | None]  # prompt, answer, and the answer that counts as success, if any


class Judge(ABC):
    """One judge; `name` is how reports and files call it."""

    name: str

    @abstractmethod
    def verdicts(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict per item, in order."""
