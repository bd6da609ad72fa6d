"""Text as the judges compare it: case, whitespace, typographic apostrophes and the spaces that
word-level tokenizers put around punctuation do not count. Chinese and Japanese put no spaces
between words: each of their characters is a word here."""

from __future__ import annotations

import re

_CHARACTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han
_MARK = re.compile(rf"[{_CHARACTERS}]|[^\W_{_CHARACTERS}]+|[^\w\s]|_")
_APOSTROPHES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u02bc": "'", "`": "'"})


def marks(text: str) -> list[str]:
    """Lower-cased words and punctuation marks in order."""
    return _MARK.findall(text.translate(_APOSTROPHES).lower())


def normalise(text: str) -> str:
    """Lower-cased words and punctuation marks, each separated by one space."""
    return " ".join(marks(text))


def same_text(answer: str, reference: str) -> bool:
    """True when a harmless prompt's answer equals its reference, up to normalisation."""
    return normalise(answer) == normalise(reference)
