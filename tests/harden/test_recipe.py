"""What a run is made of: recipes, files in place of public sets, overrides."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from tiny_models import save_tiny, write_prompts

from es2fast.attacks.registry import make_attacks
from es2fast.config import Config, parse_config
from es2fast.data import load_groups
from es2fast.errors import UserError
from es2fast.harden.recipe import BORDERLINE, RECIPES, default_out, resolve, telling_options
from es2fast.harden.run import check_folder
from es2fast.run.folder import RunFolder
from es2fast.run.identity import differences

GROUPS = ("harmful", "harmless", BORDERLINE, "eval_harmful", "eval_harmless")


def sources(config: Config) -> dict[str, list[str]]:
    return {group: [s.source for s in getattr(config.data, group)] for group in GROUPS}


def leaves(value: dict, path: str = "") -> dict:
    found = {}
    for key, child in value.items():
        inner = isinstance(child, dict) and child
        found |= leaves(child, f"{path}{key}.") if inner else {f"{path}{key}": child}
    return found


@pytest.mark.parametrize("quick", [False, True])
def test_built_in_recipes_are_valid_and_parts_of_a_set_share_nothing(
    tmp_path: Path, quick: bool
) -> None:
    config = resolve("org/model", tmp_path / "out", quick=quick)
    make_attacks(config.evaluate.attacks, steps=config.evaluate.attack_steps)
    parts: dict[tuple[str, ...], set[int]] = {}
    for group in GROUPS:
        for source in getattr(config.data, group):
            numbers = [int(part) if part else None for part in (source.rows or ":").split(":")]
            rows = set(list(range(450))[slice(*numbers)][: source.limit])
            part = (source.source, source.split, str(source.where.get("label")))
            seen = parts.setdefault(part, set())
            assert not seen & rows, f"{group}: {source.source} is used twice"
            seen |= rows
    assert len(config.data.borderline) == 1
    assert [source.kind for source in config.data.eval_harmless].count(BORDERLINE) == 1


def test_recipes_hold_only_what_differs() -> None:
    plain = leaves(parse_config({"model": {"name": "m"}}).model_dump(mode="json"))
    low = leaves(yaml.safe_load((RECIPES / "default.yaml").read_text()))
    high = leaves(yaml.safe_load((RECIPES / "quick.yaml").read_text()))
    assert not [key for key, value in low.items() if plain[key] == value]
    assert not [key for key, value in high.items() if (plain | low)[key] == value]


def test_quick_is_less_of_everything(tmp_path: Path) -> None:
    full, quick = (resolve("m", tmp_path, quick=fast) for fast in (False, True))
    assert quick.train.steps < full.train.steps
    assert len(quick.evaluate.attacks) < len(full.evaluate.attacks)
    assert quick.evaluate.max_new_tokens < full.evaluate.max_new_tokens
    assert quick.evaluate.limit < full.evaluate.limit
    assert (full.train.update_scale, quick.train.update_scale) == (0.8, 1)  # of a mean, of one run
    assert resolve("m", tmp_path, single=True).train.update_scale == 1
    assert quick.train.lr == full.train.lr and quick.refusal == full.refusal


def test_files_take_the_place_of_their_role_and_overrides_win(tmp_path: Path) -> None:
    files = {"harmful": ["a.csv", "b.csv"], "harmless": ["c.csv"], BORDERLINE: ["d.csv"]}
    config = resolve("m", tmp_path, files=files, overrides=["train.steps=7", "kl.weight=3"])
    default = resolve("m", tmp_path)
    found, before = sources(config), sources(default)
    assert found["harmful"] == ["a.csv", "b.csv"]
    assert found["harmless"] == ["c.csv", "builtin:topical"] and found["borderline"] == ["d.csv"]
    assert found["eval_harmful"] == before["eval_harmful"]
    assert found["eval_harmless"] == [before["eval_harmless"][0], "d.csv"]
    assert [s.limit for s in config.data.harmful] == [default.data.harmful[0].limit] * 2
    halves = [config.data.borderline[0], config.data.eval_harmless[1]]
    assert [half.rows for half in halves] == ["::2", "1::2"]
    assert {half.kind for half in halves} == {BORDERLINE}
    assert (config.train.steps, config.kl.weight, config.train.overwrite) == (7, 3, False)
    sides = [config.data.harmful[0].side, config.data.harmless[0].side, halves[0].side]
    assert sides == ["harmful", "harmless", "harmless"] and halves[1].side == "harmless"
    mine = ["mine.txt", "org/set:part", "builtin:ordinary"]
    both = {"eval-harmless": mine, BORDERLINE: ["builtin:borderline"]}
    kinds = [(s.kind, s.limit) for s in resolve("m", tmp_path, files=both).data.eval_harmless]
    assert kinds == [("mine", 100), ("set", 100), ("ordinary", 100), (BORDERLINE, 125)]
    none = resolve("m", tmp_path, files={BORDERLINE: ["none"]})
    assert not none.data.borderline and len(none.data.eval_harmless) == 1


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("kl: {weight: 2}\ndata: {harmful: [x.csv]}\n")
    config = resolve("m", tmp_path, recipe=own)
    assert config.kl.weight == 2 and config.refusal.weight == 0
    assert sources(config) == {"harmful": ["x.csv"]} | {group: [] for group in GROUPS[1:]}
    own.write_text(
        "data: {harmful: [x.csv], eval_harmful: [y.csv]}\n"
        "evaluate: {attacks: [template], limit: 30, max_new_tokens: 128}\n"
    )
    quick = yaml.safe_load((RECIPES / "quick.yaml").read_text())
    config = resolve("m", tmp_path, recipe=own, quick=True)  # less, but nobody else's
    assert config.evaluate.attacks == ["template"] and config.evaluate.limit == 30
    assert config.evaluate.max_new_tokens == quick["evaluate"]["max_new_tokens"]
    assert config.data.max_response_tokens == quick["data"]["max_response_tokens"]
    assert sources(config)["harmful"] == ["x.csv"] and sources(config)["harmless"] == []
    assert sources(config)["eval_harmful"] == ["y.csv"]
    assert config.train.steps == min(
        quick["train"]["steps"], resolve("m", tmp_path, recipe=own).train.steps
    )
    with pytest.raises(UserError, match=r"--recipe .*nowhere\.yaml: cannot be read"):
        resolve("m", tmp_path, recipe=tmp_path / "nowhere.yaml")
    own.write_text("kl: {wight: 2}\n")
    with pytest.raises(UserError, match=r"kl\.wight: unknown key; did you mean 'weight'"):
        resolve("m", tmp_path, recipe=own)


def test_without_a_network_the_options_that_take_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    written = write_prompts(tmp_path / "data")
    config = resolve("m", tmp_path, files={"harmful": [written["harmful"]]})
    with pytest.raises(UserError) as caught, telling_options(config):
        load_groups(config.data)
    text = str(caught.value)
    assert "\n" not in text and text.startswith("data.harmless[0]: 'databricks")
    options = re.findall(r"--[a-z-]+ \S+", text.partition("offline, give files")[2])
    assert options == ["--harmless FILE|builtin:ordinary",
                       "--borderline FILE|builtin:borderline|none", "--eval-harmful FILE",
                       "--eval-harmless FILE"]  # fmt: skip
    config = resolve("m", tmp_path, files={"harmful": [str(tmp_path / "absent.csv")]})
    with pytest.raises(UserError, match=r"absent\.csv") as caught, telling_options(config):
        load_groups(config.data)
    assert "offline" not in str(caught.value)  # a wrong path is no lack of a network


def test_borderline_prompts_are_counted_apart(tmp_path: Path) -> None:
    written = write_prompts(tmp_path / "data")
    edge = tmp_path / "edge.txt"
    edge.write_text("".join(f"how do I kill process {i}\n" for i in range(6)))
    held_out = {}
    for name in ("harmful", "harmless"):
        held_out[name] = tmp_path / f"held_out_{name}.txt"
        held_out[name].write_text("".join(f"{name} question number {i}\n" for i in range(4)))
    config = resolve(
        "m",
        tmp_path,
        files={"harmful": [written["harmful"]], "harmless": [written["harmless"]],
               BORDERLINE: [str(edge)], "eval-harmful": [str(held_out["harmful"])],
               "eval-harmless": [str(held_out["harmless"])]},
        overrides=["data.near_duplicates=null"],
    )  # fmt: skip
    groups = load_groups(config.data)
    edges = [p.text[-1] for p in groups.harmless if ("kind", BORDERLINE) in p.kinds]
    held = [p.text[-1] for p in groups.eval_harmless if ("kind", BORDERLINE) in p.kinds]
    assert (edges, held) == (["0", "2", "4"], ["1", "3", "5"])
    assert len(groups.eval_harmless) == 7


def test_the_folder_is_named_after_the_model(tmp_path: Path) -> None:
    assert default_out("org/some-Model.1") == Path("runs/some-Model.1-hardened")
    assert default_out(str(save_tiny(tmp_path / "my model"))) == Path("runs/my-model-hardened")


# What lies in a folder


def saved(folder: Path, config: Config) -> RunFolder:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return RunFolder(folder)


def test_another_configuration_is_refused_by_its_fields(tmp_path: Path) -> None:
    config = resolve("m", tmp_path / "out", overrides=["train.lr=2e-4", "layers=auto"])
    folder = saved(tmp_path / "out", config)
    check_folder(folder, config, overwrite=False, seeds=[0])
    other = resolve("m", tmp_path / "out", overrides=["train.lr=1e-3", "layers=[1, 2]"])
    with pytest.raises(UserError) as caught:
        check_folder(folder, other, overwrite=False, seeds=[0])
    text = str(caught.value)
    assert "layers (auto there, [1, 2] now), train.lr (0.0002 there, 0.001 now);" in text
    assert "--overwrite" in text and "\n" not in text
    check_folder(folder, other, overwrite=True, seeds=[0])
    moved = resolve("m", tmp_path / "elsewhere")
    assert list(differences(config, moved)) == []


def test_a_foreign_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    config = resolve("m", tmp_path)
    with pytest.raises(UserError, match="holds another run"):
        check_folder(RunFolder(tmp_path), config, overwrite=False, seeds=[0])
    (tmp_path / "config.yaml").write_text(json.dumps({"of": "another version"}))
    with pytest.raises(UserError, match="holds another run"):
        check_folder(RunFolder(tmp_path), config, overwrite=False, seeds=[0])
