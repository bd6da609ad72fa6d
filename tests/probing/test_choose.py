"""The configuration behind `es2fast layers`."""

from __future__ import annotations

from pathlib import Path

from es2fast.probing.choose import probing_config


def test_what_the_argument_is(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("model: {name: some/model}\ndata: {harmful: a.txt, harmless: b.txt}\n")
    config = probing_config(str(run), ["layers=[3]"], harmful=["c.txt", "d.txt"])
    assert config.model.name == "some/model" and config.layers == [3]
    assert [source.source for source in config.data.harmful] == ["c.txt", "d.txt"]
    assert config.data.harmless[0].source == "b.txt"
    config = probing_config("org/other-1", ["data.labelled=x.csv"])
    assert config.model.name == "org/other-1"
