"""The prompts that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import write_prompts

from es2fast.config import DataSource, parse_config
from es2fast.data import load_groups
from es2fast.data.builtin import BORDERLINE, HARMFUL, HARMLESS, NAMES, PER_FAMILY, builtin_rows
from es2fast.data.builtin_misuse import MISUSE
from es2fast.data.builtin_topical import TOPICAL
from es2fast.data.leakage import near_duplicates
from es2fast.data.sources import read_table
from es2fast.errors import UserError


def test_what_they_are() -> None:
    rows = {name: builtin_rows(name) for name in NAMES}
    prompts = [row["prompt"] for name in NAMES for row in rows[name]]
    assert len(set(prompts)) == len(prompts) == 700 + 644 + 592 + 595
    assert all(text[0].isupper() and "{" not in text for text in prompts)
    assert all(text[-1] in ".?" for text in prompts[:1344])
    assert {row["type"] for row in rows["borderline"]} == set(BORDERLINE)
    assert {row["type"] for row in rows["topical"]} == set(TOPICAL)
    assert {row["type"] for row in rows["misuse"]} == set(MISUSE) == set(TOPICAL)
    assert rows["borderline"] == builtin_rows("borderline")  # whoever asks, and whenever
    repeats = near_duplicates([r["prompt"] for r in rows["ordinary"]],
                              [r["prompt"] for r in rows["borderline"]], 0.8)  # fmt: skip
    assert repeats == [None] * 700


def test_harmful_and_harmless_requests_have_the_same_forms() -> None:
    """A model shall tell them apart by what is asked for, not by how a request begins."""
    begins = {
        name: {row["prompt"].split()[0] for row in builtin_rows(name)}
        for name in ("topical", "misuse")
    }
    assert len(begins["topical"] & begins["misuse"]) >= 0.8 * len(begins["topical"])
    harmful, harmless = (
        [row["prompt"] for row in builtin_rows(name)] for name in ("misuse", "topical")
    )
    assert near_duplicates(harmful, harmless, 0.8) == [None] * len(harmful)


def test_a_part_of_them_mixes_the_families() -> None:
    few = read_table(DataSource(source="builtin:borderline", limit=70), "data.borderline[0]", bool)
    assert len(few.rows) == 70 and len({row["type"] for row in few.rows}) >= 12
    deaths = DataSource(source="builtin:borderline", where={"type": "deaths"})
    rows = read_table(deaths, "data.borderline[0]", bool).rows
    assert len(rows) == PER_FAMILY and all(row["type"] == "deaths" for row in rows)


def test_as_a_source_of_a_run(tmp_path: Path) -> None:
    written = write_prompts(tmp_path)
    data = {
        "harmful": [{"source": written["harmful"], "rows": "::2"}],
        "harmless": ["builtin:ordinary"],
        "borderline": [{"source": "builtin:borderline", "rows": "::2"}],
        "eval_harmless": [{"source": "builtin:borderline", "rows": "1::2", "kind": "borderline"}],
        "eval_harmful": [{"source": written["harmful"], "rows": "1::2"}],
        "near_duplicates": None,
    }
    groups = load_groups(parse_config({"model": {"name": "m"}, "data": data}).data)
    assert len(groups.harmless) == 700 + 322 and groups.borderline == 322
    assert len(groups.eval_harmless) == 322
    assert {dict(prompt.kinds)["kind"] for prompt in groups.eval_harmless} == {"borderline"}


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(UserError) as caught:
        read_table(DataSource(source="builtin:safe"), "data.harmless[0]", bool)
    text = "data.harmless[0]: there is no 'builtin:safe'; built-in prompts are "
    assert str(caught.value) == text + ", ".join(f"builtin:{name}" for name in NAMES)
    for field in ("data.harmful[0]", "data.eval_harmful[1]"):
        with pytest.raises(UserError, match=r"'builtin:ordinary' is harmless; give it as"):
            read_table(DataSource(source="builtin:ordinary"), field, bool)
        rows = read_table(DataSource(source="builtin:misuse"), field, bool).rows
        assert len(rows) == 595
    for field in ("data.harmless[0]", "data.borderline[0]", "data.eval_harmless[0]"):
        with pytest.raises(UserError, match=r"'builtin:misuse' is harmful; give it as harmful"):
            read_table(DataSource(source="builtin:misuse"), field, bool)
    assert HARMLESS + HARMFUL == NAMES
