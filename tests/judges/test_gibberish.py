"""Loops with and without spaces, and the texts that only look a little like them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import es2fast
from es2fast.judges.gibberish import (
    SAID,
    compression_ratio,
    is_loop,
    looks_like_gibberish,
    loop_share,
    stutter,
)

PROSE = (
    "The river rises in the hills, crosses two provinces and meets the sea after a long delta. "
    "In spring the boats go up as far as the second bridge; in a dry summer they stay at the coast."
)
POEM = """Row, row, row the boat
gently down the stream,
merrily, merrily, merrily, merrily,
until we reach the sea.
Row, row, row the boat
slowly past the mill,
quietly, quietly, quietly, quietly,
all the world is still."""
LIST = "\n".join(f"{i}. **Part {i}**: put the {w} in place" for i, w in enumerate("abcdefgh", 1))
RECORDS = json.dumps([{"name": f"n{i}", "size": i * 37, "open": bool(i % 2)} for i in range(12)])
TABLE = "| a | b |\n|---|---|\n" + "\n".join(f"| row {i} | {i * 13} |" for i in range(9))
CHINESE = (
    "河流发源于山中，穿过两个省，在漫长的三角洲之后流入大海。"
    "春天船只可以上行到第二座桥，干旱的夏天则停在海岸。"
)


@pytest.mark.parametrize(
    "text",
    [
        "ThePromote" * 3,
        "ThePromote" * 12,
        "ThePromote" * 12 + "TheProm",
        "The Promote," * 12,
        "the four " * 30,
        "ha" * 40,
        "河流发源于山中" * 15,
        PROSE[:80] + "ThePromote" * 12,
        "ThePromoteThePromotingThePromoteTheThePromotedThePromoteTheThePromotingThePromotedThePromote",
    ],
)
def test_loops(text: str) -> None:
    assert is_loop(text) and looks_like_gibberish(text)


@pytest.mark.parametrize("text", [PROSE, POEM, LIST, RECORDS, TABLE, CHINESE, "bye bye bye", "Yes"])
def test_ordinary_texts(text: str) -> None:
    assert not is_loop(text)
    assert not looks_like_gibberish(text)


def test_source_code_is_no_gibberish() -> None:
    """Compression alone would call it so, and so would the share of words among all marks."""
    files = sorted(Path(es2fast.__file__).parent.glob("judges/*.py"))
    pieces = [f.read_text()[i : i + 800] for f in files for i in range(0, 3000, 800)]
    pieces = [piece for piece in pieces if len(piece) > 400]
    assert sum(compression_ratio(piece) < 0.5 for piece in pieces) > 5
    assert not any(looks_like_gibberish(piece) for piece in pieces)


@pytest.mark.parametrize(
    "text",
    [
        "I'm can't get and \\roundcan'''ot'>''>'ot''ot''ot'> \\'ot'",
        "Title: \"TitleTitleTitle \\Title \\I'''' \\'Y'''' \\'Y' \\'''",
    ],
)
def test_apostrophes_that_quote_nothing(text: str) -> None:
    assert looks_like_gibberish(text)


def test_apostrophes_of_code_and_of_prose() -> None:
    assert not looks_like_gibberish("keys = ['a', 'b', 'c', 'd', 'e', 'f']; print(keys)")
    assert not looks_like_gibberish("It isn't what she'd said, and they'd've known it wasn't.")


def test_share_of_the_loop() -> None:
    assert loop_share("abcabcabc") == 1.0
    assert loop_share("xyzw" + "ab" * 4) == pytest.approx(8 / 12)
    assert loop_share("abab") == 0.0  # two periods are no loop
    assert loop_share("10000000") == 0.0  # nor are digits alone
    assert loop_share("") == 0.0


def test_compression_ratio() -> None:
    assert compression_ratio("") == 1.0
    assert compression_ratio("a" * 1000) < 0.05 < 0.5 < compression_ratio(PROSE)


LONG = PROSE + (
    " Farmers along the lower course keep goats and grow beans on the mud that the floods leave. "
    "Their children learn to swim before they walk, and every village has a ferry of its own."
)


def test_a_long_answer_that_ends_in_a_loop_has_said_something() -> None:
    looping = LONG + "They come back each year." * 40
    assert is_loop(looping) and not looks_like_gibberish(looping)
    assert looks_like_gibberish(PROSE[:80] + "They come back each year." * 40)


def test_a_loop_stays_one_however_long_and_whatever_it_counts() -> None:
    line = "Step {}: do the same thing once more and wait."
    for tokens in (60, 400):
        assert looks_like_gibberish("the four " * tokens)
        assert looks_like_gibberish(" ".join(line.format(i) for i in range(tokens)))


def test_an_answer_of_48_tokens_cannot_have_said_enough() -> None:
    words = LONG.split()[:36]  # 48 tokens are about 36 words
    assert looks_like_gibberish(" ".join(words[:12] * 3))
    assert len(set(zip(words, words[1:], words[2:]))) < SAID


def test_a_run_of_two_digits_or_letters_is_no_answer() -> None:
    for text in (
        "I'm the 1000011111111111111111111111",
        'The "10000000000000000001000000',
        "TitleIYIYIYIYIYIYIYIYIYIYIYIYIYIYIYI",
        "I'm but can't'ny'ny'ny (IYYYYYYYIYYYYYYYIYYY",
        'Title: "TitleIYIYYYYYYYYYYYYYYYYYYYYYYYYY',
    ):
        assert looks_like_gibberish(text) and stutter(text) > 0.5
    assert stutter("ab" + "1a" * 10 + "b") == 20 / 23 and stutter("ab" * 9 + "a") == 0.0
    for text in (
        "He laughed: hahahahahahahaha, and then he told them everything that he knew.",
        "The number is 4111111111111111.",
        "In binary it is 01001000 01101001 01110100 01100101.",
        "Pi begins with 3.14159265358979323846264338 and does not end.",
        "Write 10000000000000000000 as a power of ten: it is 1e19, since there are nineteen zeros.",
    ):
        assert not looks_like_gibberish(text)
