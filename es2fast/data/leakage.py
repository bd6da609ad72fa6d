"""Near duplicates between prompts: what exact comparison after normalisation does not find.

Two prompts are near duplicates when the weighted Jaccard similarity of their sets of words is at
least a threshold:

    sim(a, b) = Σ_{w in both} idf(w) / Σ_{w in either} idf(w),    idf(w) = log(1 + N / n(w))

with N prompts in all and n(w) of them holding w. Weighted, because prompts made from a template
share most of their words and yet ask different things: what many prompts share says little. Word
order does not count. Scripts without spaces are compared by their characters.

Measured with the threshold 0.8 on JailbreakBench's 100 harmful prompts against AdvBench's 520:
JailbreakBench marks 18 as taken from there; 11 are equal, 14 reach 0.8 by unweighted words, 12 by
word 3-grams, 13 here (0.7: 15, 0.6: all 18), and none with another mark at any of these. Of the
demo's 800 templated training prompts ("what is the best way to steal a bike?" beside "... restore
a bike?") unweighted words take 187 for near duplicates and word 3-grams none; neither does this
(highest similarity 0.76 over eight seeds). Character 5-grams take "a car" and "a camera" for one.

5 000 prompts against 1 000 take 0.7 s on one core, 50 000 against 1 000 6 s.

All pairs above the threshold are found without comparing all pairs. Words are ordered from the
rarest to the most frequent; two prompts that are similar enough share one within the first part of
their words, up to where the rest weighs less than threshold · total (Bayardo, Ma and Srikant,
"Scaling up all pairs similarity search", WWW 2007). Only those parts are indexed and looked up.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# runs of letters and digits; one by one those of Thai, Lao, Khmer, Japanese and Chinese
_SINGLE = r"\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_SINGLE}]|[^\W_{_SINGLE}]+")
SLACK = 1e-9  # of sums of weights, so that a similarity of exactly the threshold is not lost


@dataclass(frozen=True)
class NearDuplicate:
    """A prompt's most similar other prompt: its place in the sequence, and the similarity."""

    place: int
    similarity: float


def near_duplicates(
    rows: Sequence[str], others: Sequence[str], threshold: float
) -> list[NearDuplicate | None]:
    """For every row, the most similar of `others`; None where none reaches the threshold.

    Args:
        rows, others: normalised texts (`Prompt.key`).
        threshold: in (0, 1].
    """
    index = _Index((rows, others), threshold)
    for text in others:
        index.add(text)
    return [index.nearest(text) for text in rows]


def repeats(rows: Sequence[str], threshold: float) -> list[NearDuplicate | None]:
    """For every row, the most similar earlier row; None where none reaches the threshold."""
    index = _Index((rows,), threshold)
    found = []
    for text in rows:
        found.append(index.nearest(text))
        index.add(text)
    return found


def words_of(text: str) -> frozenset[str]:
    """The words of a normalised text; one without any is its own word."""
    return frozenset(_WORD.findall(text)) or frozenset([text])


class _Index:
    """Texts by their rare words; `corpora` are what frequencies are counted in."""

    def __init__(self, corpora: Iterable[Sequence[str]], threshold: float):
        self._threshold = threshold
        self._count: Counter[str] = Counter()
        total = 0
        for corpus in corpora:
            for text in corpus:
                self._count.update(words_of(text))
            total += len(corpus)
        self._weight = {n: math.log1p(total / n) for n in set(self._count.values())}
        self._texts: list[
            tuple[frozenset[str], float]
        ] = []  # the words and the sum of their weights
        self._places: defaultdict[str, list[int]] = defaultdict(list)

    def add(self, text: str) -> None:
        held = words_of(text)
        rare, total = self._rare(held)
        for word in rare:
            self._places[word].append(len(self._texts))
        self._texts.append((held, total))

    def nearest(self, text: str) -> NearDuplicate | None:
        """The most similar text so far, the first of several; None below the threshold."""
        held = words_of(text)
        rare, total = self._rare(held)
        best: NearDuplicate | None = None
        for place in sorted({place for word in rare for place in self._places.get(word, ())}):
            similarity = self._similarity(held, total, *self._texts[place])
            if similarity >= self._threshold - SLACK and (
                best is None or similarity > best.similarity
            ):
                best = NearDuplicate(place, min(similarity, 1.0))
        return best

    def _rare(self, held: frozenset[str]) -> tuple[list[str], float]:
        """The first part of the words, from the rarest on, and the weight of all of them."""
        order = sorted(held, key=lambda word: (self._count[word], word))
        weights = [self._weight[self._count[word]] for word in order]
        total = rest = math.fsum(weights)
        for place, weight in enumerate(weights):
            if rest < (self._threshold - SLACK) * total:
                return order[:place], total
            rest -= weight
        return order, total

    def _similarity(
        self, a: frozenset[str], total_a: float, b: frozenset[str], total_b: float
    ) -> float:
        smaller, larger = sorted((total_a, total_b))
        if smaller < (self._threshold - SLACK) * larger:
            return 0.0  # the shorter one holds too little to be enough
        shared = sum(self._weight[self._count[word]] for word in a & b)
        return shared / (total_a + total_b - shared)
