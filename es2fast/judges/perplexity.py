"""Gibberish by perplexity: the mean negative log-likelihood of an answer under a language model.

    NLL(x_1..x_n) = -1/n Σ_i log p(x_i | x_<i), nats per token, without the prompt

Word salad does not repeat itself, so no rule on the text alone finds it. The limit, 4.5 nats, is
the one our trial on Qwen2.5-0.5B used; other models and languages may need another. A model sees
its own loops as probable, so this check comes beside the rules and not in their place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from es2fast.judges.model import JudgeModel

LIMIT = 4.5  # nats per token
FEWEST = 4  # tokens; the mean over fewer says nothing


class PerplexityCheck:
    """Finds improbable answers; the model is loaded when it is first asked.

    Args:
        model: folder or Hugging Face id of a causal language model, best a base model.
        limit: nats per token above which an answer is improbable.
        batch_size: answers per forward pass; all their logits are held at once.
    """

    def __init__(self, model: str, limit: float = LIMIT, batch_size: int = 4):
        self.model, self.limit = model, limit
        self._loaded = JudgeModel(model, batch_size=batch_size)

    @property
    def identity(self) -> str:
        return f"{self._loaded.fingerprint} {self.limit:g}"

    def nll(self, texts: Sequence[str]) -> list[float]:
        """Mean nats per token of each text, at most its first 512 tokens; NaN below 4 tokens."""
        rows = [self._loaded.encode(text)[: 512 + 1] for text in texts]
        found = [math.nan] * len(rows)
        long = [i for i, row in enumerate(rows) if len(row) > FEWEST]
        for place, value in zip(long, self._loaded.mean_nll([rows[i] for i in long])):
            found[place] = value
        return found

    def improbable(self, texts: Sequence[str]) -> list[bool]:
        """True where the mean is above the limit."""
        return [value > self.limit for value in self.nll(texts)]

    def close(self) -> None:
        self._loaded.close()
