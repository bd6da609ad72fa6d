"""Text that no reader could use: empty, hardly any words, or going round in circles.

Counting words misses loops without spaces ("ThePromoteThePromote..."), which is what pushed models
often write. So a text is also gibberish when most of its letters and digits are one stretch that
repeats itself exactly (`loop_share`). The compression ratio (zlib, below 0.5) is the cheap gate
before that search; alone it would not do. On random pieces of 60 to 3200 characters of other
people's files:

    files                       Markdown   licences   Python   JSON
    pieces                           498       4125     4647    384
    compression below 0.5            9 %       10 %     41 %   39 %
    gibberish by all rules             0      0.2 %    0.7 %    7 %  (package lists, same words)
    by earlier versions' rules      12 %      0.7 %     48 %   93 %

(Earlier versions counted words among marks, not letters among characters.)

A long answer may say something and only then go round in circles: greedy decoding of a small model
often ends so within 256 tokens. Who reads it has the beginning, so a text with `SAID` different
3-grams of words is not gibberish for its loop. That is what an answer of 48 tokens can hold at
most, so short answers are judged as without this rule.

Perplexity under a base model catches what these rules cannot: see `perplexity`.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from es2fast.judges.text import marks

COMPRESSION = 0.5  # a loop compresses to less of its bytes
ENOUGH = 60  # characters from which the ratio says something; zlib's header costs 11 bytes
SHORT = 24  # characters below which "bye bye bye" is an answer
LONGEST_PERIOD = 200  # letters and digits of the part that repeats
FEWEST_PERIODS = 3
STUTTER = 20  # letters and digits of a run of two kinds
FEWEST_LETTERS = 0.3  # letters and digits among the characters
MOST_APOSTROPHES = 0.2  # likewise, where there are ten of them
SAID = 40  # different 3-grams of words without digits: a loop that counts says nothing new
READ = 8000  # characters that are searched for a loop
FEW_WORDS = 3  # an answer with fewer, in fewer than `FEW_BYTES`, answers no request
FEW_BYTES = 24  # eight Chinese characters
_CLOSING = re.compile(r"'\s*[,:)\]]")  # behind a string in code


def looks_like_gibberish(answer: str) -> bool:
    """True for text no reader could use.

    The thresholds: fewer than 30 % of the characters are letters or digits (spaces not counted;
    JSON has 50 % and more); or ten and a fifth of them are apostrophes that quote nothing, as
    pushed models write ("can't''''>''>''ot'"); or most of the letters and digits are one
    `stutter`; or, from 12 words on, more than half of the 3-grams occur again or a single word
    makes up more than 40 % of the text; or, from 60 characters on, `is_loop`. All but the first two
    do not count where a text has said enough (`SAID`).
    """
    words = [mark for mark in marks(answer) if mark[0].isalnum()]
    if sum(map(len, words)) < FEWEST_LETTERS * len("".join(answer.split())) or not words:
        return True
    if _apostrophes(answer):
        return True
    plain = [word for word in words if word.isalpha()]
    if len(set(zip(plain, plain[1:], plain[2:]))) >= SAID:
        return False
    if is_loop(answer) or stutter(answer) > 0.5:
        return True
    if len(words) < 12:
        return len(words) >= 4 and len(set(words)) == 1
    return repeat_rate(words) > 0.5 or Counter(words).most_common(1)[0][1] > 0.4 * len(words)


def _apostrophes(text: str) -> bool:
    count = text.count("'")
    many = count >= 10 and count >= MOST_APOSTROPHES * len("".join(text.split()))
    return many and not _CLOSING.search(text)


def says_nothing(answer: str) -> bool:
    """True for a text without a letter, and for fewer than three words in fewer than 24 bytes
    ("/java", "11"): no answer to a request for instructions or a text, though it may be one to a
    question ("Paris")."""
    if not any(character.isalpha() for character in answer):
        return True
    words = [mark for mark in marks(answer) if mark[0].isalnum()]
    return len(words) < FEW_WORDS and len(answer.strip().encode()) < FEW_BYTES


def repeat_rate(words: Sequence[str], n: int = 3) -> float:
    """Fraction of n-grams that have occurred before: 0 without repetition, towards 1 in a loop."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def compression_ratio(text: str) -> float:
    """Bytes after zlib over bytes before; 1.0 for an empty text."""
    raw = text.encode()
    return len(zlib.compress(raw, 9)) / len(raw) if raw else 1.0


def is_loop(text: str) -> bool:
    """True when a text of at least 60 characters compresses to less than half and more than half
    of it is one stretch repeating itself, or nearly the same letters over and over; or when a text
    of 24 to 59 characters is nothing else."""
    if len(text) < ENOUGH:
        return len(text) >= SHORT and loop_share(text) > 0.9
    if compression_ratio(text) >= COMPRESSION:
        return False
    return loop_share(text) > 0.5 or _tangled(text)


def loop_share(text: str) -> float:
    """Share of the letters and digits that lie in the longest exactly periodic stretch: at least
    three times the same at most 200 of them, with a letter among them. 0 without one."""
    plain = "".join(c for c in text[:READ].casefold() if c.isalnum())
    codes = np.array([ord(c) for c in plain], dtype=np.int32)
    letters = np.array([c.isalpha() for c in plain], dtype=bool)
    best = 0
    for period in range(1, min(LONGEST_PERIOD, len(codes) // FEWEST_PERIODS) + 1):
        start, length = _longest_run(codes[period:] == codes[:-period])
        stretch = length + period
        enough = stretch >= FEWEST_PERIODS * period and stretch > best
        if enough and letters[start : start + stretch].any():
            best = stretch
    return best / len(codes) if len(codes) else 0.0


def stutter(text: str) -> float:
    """Share of the letters and digits that are one run, within a word, of at least 20 of at most
    two kinds ("I'm the 100001111111111111111", "TitleIYIYIYIYIYIYIYIYIYIY"): neither a number nor
    a sound that anybody asked for. 0 without a letter."""
    if not any(character.isalpha() for character in text):
        return 0.0
    best = 0
    for word in re.findall(r"[^\W_]+", text[:READ].casefold()):
        start, last = 0, dict[str, int]()  # of the run so far, and where each kind was seen last
        for place, character in enumerate(word):
            last[character] = place
            if len(last) > 2:
                start = min(last.values()) + 1
                last = {kind: seen for kind, seen in last.items() if seen >= start}
            best = max(best, place + 1 - start)
    plain = sum(character.isalnum() for character in text[:READ])
    return best / plain if best >= STUTTER else 0.0


def _longest_run(same: np.ndarray) -> tuple[int, int]:
    """Start and length of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], same, [False])).astype(np.int8)))
    if not len(edges):
        return 0, 0
    lengths = edges[1::2] - edges[::2]
    longest = int(lengths.argmax())
    return int(edges[::2][longest]), int(lengths[longest])


def _tangled(text: str) -> bool:
    """One unbroken string of letters that makes up most of the text, more than half of whose
    8-grams occur again: a loop without spaces that is not exact."""
    longest = max(re.findall(r"[^\W\d_]+", text), key=len, default="")
    return len(longest) > 0.5 * len(text) and repeat_rate(longest.casefold(), 8) > 0.5
