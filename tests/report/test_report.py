"""The report: its schema, its table, its page, and the statistics behind them."""

from __future__ import annotations

import copy
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from es2fast.cli import app
from es2fast.config import parse_config
from es2fast.errors import UserError
from es2fast.report import html, plots, table
from es2fast.report.bars import bar_groups
from es2fast.report.compare import combined
from es2fast.report.curve_plot import attack_curves
from es2fast.report.projection import projection
from es2fast.report.schema import Report, read_report
from es2fast.report.stats import rate_interval, wilson
from es2fast.report.suite import base_of
from es2fast.run.folder import RunFolder
from es2fast.run.metrics import read_metrics


def attack(refused, useful, gibberish, push, n=100):
    return {
        "refused": refused,
        "useful": useful,
        "gibberish": gibberish,
        "n": n,
        "relative_push": push,
    }


def block(useful, distance, kl):
    return {
        "harmless": {"refusal_rate": 0.01, "intact_rate": 0.99, "kl_to_base": kl, "n": 200},
        "attacks": {
            "direct": attack(1.0, 0.0, 0.0, None),
            "scav": attack(round(0.9 - useful, 2), useful, 0.1, 2.345),
        },
        "separation": {
            str(layer): {
                "distance": 12.0 * distance,
                "distance_over_base": distance,
                "probe_accuracy": 0.987,
                "norm_ratio": 1.61,
            }
            for layer in (3, 5)
        },
    }


@pytest.fixture
def full():
    return {
        "version": 2,
        "models": [
            {"name": "base", **block(0.62, 1.0, 0.0)},
            {"name": "tuned", **block(0.08, 3.97, 0.0123)},
        ],
        "train": {"steps": 150, "seconds": 61.5, "kl": 0.011, "lambda": 12.0},
    }


@pytest.fixture
def states():
    rng = np.random.default_rng(0)
    shift = {"base": {"harmful": 2.0, "harmless": 0}, "tuned": {"harmful": 20.0, "harmless": 0}}
    return {
        model: {group: rng.normal(size=(12, 16)) + value for group, value in groups.items()}
        for model, groups in shift.items()
    }


def write(folder, raw, **options):
    html.write_report(RunFolder(folder), Report.parse(raw), **options)


def page(folder, raw):
    write(folder, raw)
    return (folder / "report.html").read_text()


def axes_of(figures):
    """The one panel of each figure."""
    return [axes for figure in figures for axes in figure.axes]


def models(raw):
    """{name: the model's part} of a report."""
    return {model["name"]: model for model in raw["models"]}


def node_of(raw, path):
    """What holds the last key of a path that starts with a model's name, and that key."""
    *parents, last = path.split(".")
    node = {**raw, **models(raw)}
    for key in parents:
        node = node[key]
    return node, last


def metrics(steps=5):
    keys = ("loss", "kl", "kl_weight", "sep/3", "sep/5", "distance_over_base/3", "norm_ratio/3")
    return [{"step": s, **{key: s + i for i, key in enumerate(keys)}} for s in range(1, steps + 1)]


def write_metrics(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def cells(markdown):
    """{row label: cells} of a Markdown table, each label prefixed with its heading."""
    found, heading = {}, ""
    for line in markdown.strip().splitlines()[2:]:
        label, *rest = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
        if label.startswith("**"):
            heading = label.strip("*")
            found[heading] = rest
        else:
            found[f"{heading}: {label}"] = rest
    return found


# Wilson interval


@pytest.mark.parametrize("n", [1, 10, 100])
def test_wilson_at_the_ends_has_a_closed_form(n):
    z2 = 1.959963984540054**2
    assert wilson(0, n) == (0.0, pytest.approx(z2 / (n + z2), rel=1e-12))
    assert wilson(n, n) == (pytest.approx(n / (n + z2), rel=1e-12), 1.0)


def test_wilson_solves_the_score_equation():
    """Both ends are where |p̂ − p| = z √(p(1−p)/n); checked without the solved formula."""
    for successes, n in [(1, 7), (8, 100), (50, 100), (999, 1000)]:
        for p in wilson(successes, n):
            score = abs(successes / n - p) / math.sqrt(p * (1 - p) / n)
            assert score == pytest.approx(1.959963984540054, rel=1e-9)


def test_wilson_published_value_and_symmetry():
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, method 3
    low, high = wilson(30, 100)
    assert wilson(70, 100) == pytest.approx((1 - high, 1 - low))


def test_wilson_of_nothing_and_of_nonsense():
    assert wilson(0, 0) == (0.0, 1.0)
    for successes, n in [(-1, 5), (6, 5), (0, -1)]:
        with pytest.raises(ValueError):
            wilson(successes, n)


def test_rate_interval_undoes_the_division():
    assert rate_interval(29 / 100, 100) == wilson(29, 100)  # 0.29 * 100 is 28.999...


# Schema


def test_json_round_trip_keeps_extra_keys(tmp_path, full):
    models(full)["tuned"]["harmless"]["top1_agreement"] = 0.97
    full["note"] = "ä"
    write(tmp_path, full)
    found = read_report(tmp_path / "report.json")
    assert found == Report.parse(full)
    assert found.note == "ä" and found.model("tuned").harmless.top1_agreement == 0.97
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def test_numpy_numbers_and_integer_layers_become_json(tmp_path, full):
    expected = Report.parse(copy.deepcopy(full))
    base, tuned = models(full).values()
    base["separation"] = {int(k): v for k, v in base["separation"].items()}
    tuned["harmless"]["kl_to_base"] = np.float64(0.0123)
    tuned["harmless"]["n"] = np.int64(200)
    assert Report.parse(full) == expected


def test_version_1_is_read_as_version_2(full):
    old = {**models(full), "train": full["train"]}
    for model in ("base", "tuned"):
        old[model] = {key: value for key, value in old[model].items() if key != "name"}
    assert Report.parse(old) == Report.parse(full)
    assert Report.parse({**old, "tuned": None}).names == ["base"]
    with pytest.raises(UserError, match=r"tuned\.harmless: required"):
        Report.parse({"tuned": {"attacks": {}, "separation": {}}})


REQUIRED = [
    "tuned.harmless",
    "tuned.harmless.kl_to_base",
    "base.attacks.scav.gibberish",
    "tuned.attacks.direct.relative_push",
    "tuned.separation.5.norm_ratio",
    "base.separation",
    "train.lambda",
    "train.kl",
]


@pytest.mark.parametrize("path", REQUIRED)
def test_missing_key_is_named(full, path):
    node, last = node_of(full, path)
    del node[last]
    with pytest.raises(UserError, match=re.escape(f"{path}: required")):
        Report.parse(full)


INVALID = [
    ("tuned.attacks.scav.useful", 8.0, "less than or equal to 1"),
    ("tuned.attacks.scav.useful", -0.1, "greater than or equal to 0"),
    ("tuned.attacks.scav.useful", "0.1", "found '0.1'"),
    ("tuned.attacks.scav.useful", float("nan"), "expected a finite number"),
    ("tuned.attacks.scav.n", 0, "greater than or equal to 1"),
    ("base.harmless.n", 1.5, "found 1.5"),
    ("base.attacks", [], "found []"),
]


@pytest.mark.parametrize("path, value, reason", INVALID)
def test_invalid_value_is_named(full, path, value, reason):
    node, last = node_of(full, path)
    node[last] = value
    with pytest.raises(UserError) as caught:
        Report.parse(full)
    assert path in str(caught.value) and reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_outcomes_must_not_exceed_the_prompts(full):
    models(full)["tuned"]["attacks"]["scav"] = attack(0.9, 0.2, 0.1, 1.0)
    with pytest.raises(UserError, match=r"tuned\.attacks\.scav: refused \+ useful .* 1\.200"):
        Report.parse(full)


def test_partial_refusals_are_part_of_the_refusals_and_shown_when_there_are_any(full):
    labels = [row.label for row in table.table_rows(Report.parse(full))]
    assert "of these partial" not in labels and "useful, corrected" not in labels
    scav = full["models"][0]["attacks"]["scav"]
    assert scav["refused"] == 0.28 and Report.parse(full).models[0].attacks["scav"].partial == 0.0
    scav |= {"partial": 0.2, "corrected": {"useful": 0.5, "interval": [0.4, 0.61]}}
    rows = {row.label: row.cells for row in table.table_rows(Report.parse(full))}
    assert rows["of these partial"][0].startswith("20.0 % [")
    assert rows["useful, corrected"] == ("50.0 % [40.0–61.0]", "–")
    scav["partial"] = 0.3
    with pytest.raises(UserError, match=r"scav: partial is 0\.300, more than refused, 0\.280"):
        Report.parse(full)


def test_layers_are_numbers_and_some_model_is_there_once(full):
    with pytest.raises(UserError, match="'base' occurs twice"):
        Report.parse({**full, "models": [full["models"][0]] * 2})
    for nothing in ({"models": []}, {"train": full["train"], "base": None}):
        with pytest.raises(UserError, match="models"):
            Report.parse(nothing)
    base = models(full)["base"]
    base["separation"]["last"] = base["separation"]["3"]
    with pytest.raises(UserError, match=r"base\.separation\.last"):
        Report.parse(full)


def test_old_report_survives_a_failed_write(tmp_path, full, monkeypatch):
    write(tmp_path, full)
    before = (tmp_path / "report.json").read_text()
    full["train"]["steps"] = 999

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr("es2fast.run.files.os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, full)
    assert (tmp_path / "report.json").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_diverged_kl_is_null_with_a_warning(tmp_path, full):
    models(full)["tuned"]["harmless"]["kl_to_base"] = float("inf")
    write(tmp_path, full)
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["models"][1]["harmless"]["kl_to_base"] is None
    assert saved["warnings"] == ["tuned.harmless.kl_to_base: not finite"]
    assert "tuned.harmless.kl_to_base: not finite" in (tmp_path / "report.html").read_text()


def test_the_page_of_a_mean_names_its_seeds_and_the_kl_that_decides(tmp_path, full):
    full["train"]["mean_of_seeds"] = "0, 2"
    assert "0.0123" in page(tmp_path, full)  # over all tokens, where nothing else was measured
    models(full)["tuned"]["harmless"] |= {"kl_response": 0.0456, "perplexity": 2.0}
    text = " ".join(page(tmp_path, full).split())
    assert "Training, mean of the runs with seeds 0, 2: 150 steps in" in text
    card = text[text.index("<h3>tuned</h3>") :][:1500]
    assert "0.0456" in card and "0.0123" not in card


def test_read_report_errors(tmp_path):
    path = tmp_path / "report.json"
    with pytest.raises(UserError, match="cannot be read"):
        read_report(path)
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_report(path)


def test_reports_side_by_side(tmp_path, full):
    old = {name: {k: v for k, v in model.items() if k != "name"}
           for name, model in models(full).items()}  # fmt: skip
    for name, kl in (("run-a", 0.0123), ("run-b", 0.5)):
        old["tuned"]["harmless"]["kl_to_base"] = kl
        old["base"]["attacks"]["scav"]["seconds"] = kl  # which make it no other base
        old["train"] = full["train"] | {"steps": round(1000 * kl), "layers": [round(10 * kl)]}
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(old))
    both = combined([tmp_path / "run-a", tmp_path / "run-b/report.json"])
    assert both.names == ["base", "run-a", "run-b"]
    assert [model.harmless.kl_to_base for model in both.models] == [0.0, 0.0123, 0.5]
    result = CliRunner().invoke(
        app, ["compare", str(tmp_path / "run-a"), str(tmp_path / "run-b"), "--html",
              str(tmp_path / "both.html")]
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    page = (tmp_path / "both.html").read_text()
    assert page.count('<section class="card">') == 3 and "<h3>run-b</h3>" in page
    assert "Training of run-a: 12 steps" in page and "Training of run-b: 500 steps" in page
    assert both.separated_layers == [0, 5]
    with pytest.raises(UserError, match="two reports lie in folders named 'run-a'"):
        combined([tmp_path / "run-a", tmp_path / "run-a"])
    (tmp_path / "three").mkdir()
    named = {"base": old["base"], "run-a": old["tuned"], "other": old["tuned"]}
    raw = {"models": [{"name": name, **model} for name, model in named.items()]}
    (tmp_path / "three" / "report.json").write_text(json.dumps(raw))
    every = combined([tmp_path / name for name in ("run-a", "run-b", "three")])
    assert every.names == ["base", "run-a", "run-b", "three/run-a", "other"]


def test_reports_that_are_unlike(tmp_path, full):
    """Every model stays beside its own report's base model, and what differs is said."""
    alone = json.loads(json.dumps(full)) | {"max_new_tokens": 256, "judge": "rules"}
    del alone["models"][0]
    other = json.loads(json.dumps(full)) | {"max_new_tokens": 32, "judge": "hf:x, rules"}
    other["models"][0]["attacks"]["direct"]["answers_per_prompt"] = 3
    for number, raw in enumerate((full, other, alone)):
        for model in raw["models"]:
            model["paired_by"] = f"prompts {number}"
    reports = {"a": full | {"max_new_tokens": 32}, "b": other, "c": alone}
    for name, raw in reports.items():
        for model in raw["models"]:
            model["harmless"] = model["harmless"] | {
                "refusal_by": {"kind": {"benign": {"refusal_rate": 0.5, "n": 50 + ord(name)}}}
            }
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(raw))
    both = combined([tmp_path / name for name in reports])
    assert both.names == ["a/base", "a", "b/base", "b", "c"]
    bases = [base_of(both, model) for model in both.models]
    assert [base and base.name for base in bases] == [None, "a/base", None, "b/base", None]
    assert both.max_new_tokens is None and len(both.warnings) == 3  # judge, tokens, prompts
    assert "tokens of an answer at most: a: 32; b: 32; c: 256" in both.warnings[1]
    rows = cells(table.table_markdown(both))
    assert "attack direct, any of 1 to 3 answers" in rows
    assert rows["harmless prompts: refused, kind benign"][0].endswith(f", n = {50 + ord('a')}")
    same = combined([tmp_path / "a"])
    assert same.max_new_tokens == 32 and not same.warnings


# Table


def test_markdown_table_holds_numbers_and_intervals(full):
    rows = cells(table.table_markdown(Report.parse(full)))
    assert rows["attack scav"] == ["n = 100", "n = 100"]
    assert rows["attack scav: useful"] == ["62.0 % [52.2–70.9]", "8.0 % [4.1–15.0]"]
    assert rows["attack scav: refused"][0].startswith("28.0 %")
    assert rows["attack scav: push \\|ε\\|/‖h‖"] == ["2.35", "2.35"]
    assert "attack direct: push \\|ε\\|/‖h‖" not in rows
    assert rows["attack direct: refused"] == ["100.0 % [96.3–100.0]"] * 2
    assert rows["harmless prompts"] == ["n = 200", "n = 200"]
    assert rows["harmless prompts: answer intact"][1].startswith("99.0 % [96.4–")
    assert rows["harmless prompts: KL to base, nats/token"] == ["0.0000", "0.0123"]
    assert rows["layer 5: distance/d0"] == ["1.00", "3.97"]
    assert rows["layer 3: norm ratio ‖h‖/‖h_base‖"] == ["1.61", "1.61"]
    assert rows["layer 3: probe accuracy"] == ["0.987", "0.987"]


def test_markdown_columns_agree(full):
    models(full)["base"]["attacks"]["a|b"] = attack(1.0, 0.0, 0.0, 0.5)
    lines = table.table_markdown(Report.parse(full)).strip().splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}
    assert cells("\n".join(lines))["attack a\\|b"] == ["n = 100", "not run"]


def test_table_with_one_model(full):
    del full["models"][1], full["train"]
    markdown = table.table_markdown(Report.parse(full))
    assert markdown.startswith("| | base |\n")
    assert cells(markdown)["attack scav: useful"] == ["62.0 % [52.2–70.9]"]


def test_more_positions_and_intervals_of_probes(tmp_path, full):
    """Shown where they were measured; the base model of this report is an older one's."""
    labels = [row.label for row in table.table_rows(Report.parse(full))]
    assert not any("instruction" in label or "margin" in label for label in labels)
    place = {"distance": 3.0, "distance_over_base": 1.5, "probe_accuracy": 0.9}
    models(full)["tuned"]["separation"]["5"] |= {
        "probe_interval": [0.95, 1.0], "probe_margin": 1.25, "probe_margin_interval": [1.0, 1.5],
        "positions": {"instruction": {**place, "probe_interval": [0.8, 0.96]},
                      "template": {**place, "distance_over_base": None}},
    }  # fmt: skip
    rows = cells(table.table_markdown(Report.parse(full)))
    assert rows["layer 5: probe accuracy"] == ["0.987", "0.987 [0.950–1.000]"]
    assert rows["layer 5: probe margin/d0"] == ["–", "1.25 [1.00–1.50]"]
    assert rows["layer 5: distance/d0, last instruction token"] == ["–", "1.50"]
    assert rows["layer 5: probe accuracy, last instruction token"] == ["–", "0.900 [0.800–0.960]"]
    assert rows["layer 5: distance/d0, template tokens"] == ["–", "–"]
    titles = [axes.get_title() for axes in axes_of(plots.separation_by_layer(Report.parse(full)))]
    assert titles[2:] == ["Distance, last instruction token"]
    write(tmp_path, full)
    assert "distance/d0, last instruction token" in (tmp_path / "report.html").read_text()
    models(full)["tuned"]["separation"]["5"]["positions"]["template"]["probe_interval"] = [0.5]
    with pytest.raises(UserError, match=r"positions\.template\.probe_interval"):
        Report.parse(full)


def test_only_separated_layers_are_listed(full):
    full["train"]["layers"] = [5]
    labels = [row.label for row in table.table_rows(Report.parse(full))]
    assert "layer 5" in labels and "layer 3" not in labels


def test_printed_table_fits_and_is_not_cut(full):
    out = io.StringIO()
    models(full)["base"]["attacks"]["mean_difference"] = attack(0.0, 1.0, 0.0, 10.25)
    models(full)["base"]["attacks"]["[bold]x"] = attack(0.0, 1.0, 0.0, 10.25)
    table.print_table(Report.parse(full), Console(file=out, width=100, color_system=None))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    useful = [line for line in lines if line.strip().startswith("useful")]
    assert any("62.0 % [52.2–70.9]" in line and "8.0 % [4.1–15.0]" in line for line in useful)
    assert any("attack [bold]x" in line for line in lines)  # no markup from names
    assert "…" not in out.getvalue()


def test_printed_table_on_a_terminal_without_utf8(full):
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    table.print_table(Report.parse(full), Console(file=out, width=100))
    out.flush()
    assert b"push |eps|/||h||" in raw.getvalue()


# Page


def test_page_has_every_figure_and_loads_nothing(tmp_path, full, states):
    write_metrics(tmp_path, metrics())
    rates = {"refused": 0.5, "useful": 0.5, "gibberish": 0.0}
    models(full)["tuned"]["attacks"]["scav"]["variants"] = [
        {"parameters": {"k": k}, "n": 10, **rates} for k in (0, 5)
    ]
    full |= {"created": "2026-11-24T23:04:38+00:00", "es2fast": "0.1.0", "seed": 7,
             "judge": "some-judge", "max_new_tokens": 48}  # fmt: skip
    config = parse_config({"model": {"name": "org/model"}, "kl": {"budget": 0.05}})
    write(tmp_path, full, states=states, config=config)
    page = (tmp_path / "report.html").read_text()
    for title, caption in html.CAPTIONS.values():
        assert f"<h2>{title}</h2>" in page
        assert caption.split(".")[0].split("'")[0] in page
    assert page.count("<svg") == 1 + 2 + 2 + 6
    for panel in ("Total loss", "Distance between the groups", "After (tuned)"):
        assert panel in page
    assert "A defence is not a proof" in page and "budget 0.05 nats/token" in page
    assert "62.0 % [52.2–70.9]" in page
    for fact in ("2026-11-24 23:04:38 UTC", "0.1.0", "some-judge", "training 0, evaluation 7",
                 "at most 48 tokens"):  # fmt: skip
        assert f"<dd>{fact}</dd>" in page
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "://" not in without_namespaces.replace("http://www.w3.org/1999/xlink", "")
    assert not re.search(r"<(script|link|img|iframe|object|embed)\b|@import|url\((?!#)", page)


def test_page_starts_with_the_worst_case(tmp_path, full):
    models(full)["tuned"]["attacks"]["direct"]["refused_repetitive"] = 0.95
    write(tmp_path, full)
    page = (tmp_path / "report.html").read_text()
    heads = ["Worst case", "Attack outcomes", "Separation per layer", "All numbers"]
    assert re.findall("<h2>(.*?)</h2>", page) == heads
    card = page[page.index('<section class="card"><h3>tuned') :]
    assert "8 %" in card and "worst of 2 attacks, scav [4–15], n = 100" in card
    assert "95 % under direct (refused: 100 %)" in page
    looping = '<span class="looping" style="width:95.0%"></span>'
    assert f'{looping}<span class="refused" style="width:5.0%">' in page
    assert page.index("<h3>scav") < page.index("<h3>direct")  # the worst attack first


def test_examples_are_folded_away_escaped_and_cut(tmp_path, full):
    models(full)["tuned"]["attacks"]["scav"]["examples"] = [
        {"prompt": "<i>p", "answer": "a" * 5000, "verdict": "useful"}
    ]
    write(tmp_path, full)
    page = (tmp_path / "report.html").read_text()
    example = page[page.index("<details><summary>scav") :]
    assert "&lt;i&gt;p" in example and "<i>p" not in page
    assert "a" * 599 + "…" in example and "a" * 600 not in page


def test_ids_are_unique_and_references_resolve(tmp_path, full, states):
    write_metrics(tmp_path, metrics())
    write(tmp_path, full, states=states)
    page = (tmp_path / "report.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 100
    assert set(re.findall(r"(?:href=\"|url\()#([\w-]+)", page)) <= set(ids)


def test_page_without_metrics_states_or_config(tmp_path, full):
    write(tmp_path, full)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2 and "Curves" not in page
    assert "Training curves" not in page and "Configuration" not in page


def test_page_is_reproducible(tmp_path, full, states):
    pages = []
    for name in "ab":
        write(tmp_path / name, full, states=states)
        pages.append((tmp_path / name / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_names_cannot_inject_markup_or_mathematics(tmp_path, full):
    evil = '<script>alert("1")</script>'
    models(full)["base"]["attacks"]["<b>$x_{$"] = attack(1.0, 0.0, 0.0, 0.5)
    full["warnings"] = [evil]
    write(tmp_path, full, config=parse_config({"model": {"name": evil}}))
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "<b>" not in page
    assert "&lt;script&gt;" in page and "attack &lt;b&gt;$x_{$" in page
    names = {"tuned": "<u>$y_{$"}
    full["models"][1]["name"] = names["tuned"]
    write(tmp_path, full)
    page = (tmp_path / "report.html").read_text()
    assert "<u>" not in page
    assert page.count("&lt;u&gt;$y_{$</text>") >= 2  # legends, through matplotlib


# Metrics and figures


def test_metrics_of_a_resumed_and_killed_run(tmp_path):
    write_metrics(tmp_path, [{"step": 2, "kl": 9}, {"step": 1, "kl": 1}, {"step": 2, "kl": 2}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "kl"')
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["kl"]) for row in rows] == [(1, 1), (2, 2)]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_training_curves_draw_what_was_logged():
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None, "kl": float("nan")}]
    rows.append({"step": 3, "loss": 1.0})
    (axes,) = axes_of(plots.training_curves(rows))
    assert axes.get_title() == "Total loss"
    assert axes.lines[0].get_xydata().tolist() == [[1, 3], [3, 1]]
    assert plots.training_curves([]) == []
    assert plots.training_curves([{"step": 1, "lr": 1e-4}]) == []


def test_a_mean_of_runs_has_a_line_per_seed():
    rows = [
        {"seed": s, "step": i, "refusal": 1.0 / i + s, "sep/3": i} for s in (2, 0) for i in (1, 2)
    ]
    separation, refusal = axes_of(plots.training_curves(rows))
    assert refusal.get_title() == "Refusal of harmful prompts"
    lines = {line.get_label(): line.get_xydata().tolist() for line in refusal.lines}
    assert lines == {"seed 0": [[1, 1], [2, 0.5]], "seed 2": [[1, 3], [2, 2.5]]}
    assert [line.get_label() for line in separation.lines] == ["block 3, seed 0", "block 3, seed 2"]


def test_a_fixed_weight_has_no_panel():
    def titles(weights):
        rows = [{"step": i, "kl": 0.1 * i, "kl_weight": w} for i, w in enumerate(weights)]
        return [axes.get_title() for axes in axes_of(plots.training_curves(rows))]

    assert titles([10.0, 10.0]) == ["KL to base, harmless tokens"]
    assert titles([10.0, 11.0])[1] == "λ, weight of the KL"


def test_training_curves_have_a_line_per_layer_in_numeric_order():
    rows = [{"step": 1, "sep/10": 1.0, "sep/9": 2.0}]
    (axes,) = axes_of(plots.training_curves(rows))
    assert [line.get_label() for line in axes.lines] == ["block 9", "block 10"]


def test_layers_become_lines_with_marks_when_there_are_many(full):
    entry = full["models"][0]["separation"]["3"]
    for model in full["models"]:
        model["separation"] = {str(i): entry for i in range(12)}
    full["train"]["layers"] = [4, 7]
    axes = axes_of(plots.separation_by_layer(Report.parse(full)))[0]
    assert not axes.patches
    marked = [line.get_xdata()[0] for line in axes.lines if line.get_label() == "separated"]
    assert marked == [4]
    assert 7 in [line.get_xdata()[0] for line in axes.lines]


def test_bars_show_the_distances(full):
    axes = axes_of(plots.separation_by_layer(Report.parse(full)))[0]
    assert [bar.get_height() for bar in axes.patches] == [1.0, 1.0, 3.97, 3.97]


def test_projection_has_common_components_and_own_axes(states):
    before, after = axes_of(projection(states))
    (left, right), (low, high) = before.get_xlim(), before.get_ylim()
    width = after.get_xlim()[1] - after.get_xlim()[0]
    factor = float(re.search(r": ([\d.]+) times as wide", after.get_title())[1])
    assert factor == pytest.approx(width / (right - left), rel=0.01) and factor > 2
    (frame,) = after.patches
    assert frame.get_bbox().bounds == pytest.approx((left, low, right - left, high - low))
    points = {
        (axes.get_title().split(":")[0], mark.get_label().split(",")[0]): mark.get_offsets()
        for axes in (before, after)
        for mark in axes.collections
    }
    spread = np.ptp(
        np.concatenate([points["Before (base)", g] for g in ("harmful", "harmless")]), 0
    )
    assert spread[0] > 0.8 * (right - left)  # the first panel is filled
    shift = points["After (tuned)", "harmful"].mean(0) - points["After (tuned)", "harmless"].mean(0)
    expected = states["tuned"]["harmful"].mean(0) - states["tuned"]["harmless"].mean(0)
    assert np.linalg.norm(shift) == pytest.approx(np.linalg.norm(expected), rel=0.01)
    assert shift[0] > 0  # harmful to the right, whatever the sign the solver returned


def test_projection_of_one_model_and_of_broken_states(states):
    only = {"tuned": states["tuned"]}
    assert [axes.get_title() for axes in axes_of(projection(only))] == ["After (tuned)"]
    broken = {
        model: {group: np.full_like(rows, np.nan) for group, rows in groups.items()}
        for model, groups in states.items()
    }
    assert projection(broken) == []


def test_bars_add_up_to_the_rates_and_carry_the_wilson_interval(full):
    models(full)["tuned"]["attacks"]["scav"] |= {"refused_repetitive": 0.8, "repetitive": 0.9}
    models(full)["base"]["attacks"]["scav"]["repetitive"] = 0.25
    del models(full)["base"]["attacks"]["direct"]
    scav, direct = bar_groups(Report.parse(full))
    base, tuned = scav.bars
    assert tuned.segments == [
        ("useful", 8.0), ("gibberish", 10.0), ("looping", 80.0), ("refused", pytest.approx(2.0)),
    ]  # fmt: skip
    low, high = wilson(8, 100)
    assert tuned.interval == pytest.approx((100 * low, 100 * (high - low)), abs=1e-3)
    assert tuned.loops is None and "80 % refused in a loop" in tuned.details
    assert base.loops == 25.0  # verdicts of the looping answers are not known
    assert direct.missing == ["base"] and [bar.model for bar in direct.bars] == ["tuned"]


def test_curves_draw_every_model_with_intervals(full):
    for model, useful in zip(full["models"], ((0.2, 0.9), (0.0, 0.3))):
        model["attacks"]["scav"]["variants"] = [
            {"parameters": {"k": k}, "n": 10, "useful": u, "refused": 0.0, "gibberish": 0.0}
            for k, u in zip((0, 5), useful)
        ]
    (axes,) = axes_of(attack_curves(Report.parse(full)))
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0.2, 0.9], [0.0, 0.3]]
    assert axes.get_xlabel() == "k" and "held-out prompts" in axes.get_title()
    band = axes.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((wilson(2, 10)[0], wilson(9, 10)[1]))


def test_svg_is_well_formed_and_bare(full):
    svg = plots.to_svg(plots.separation_by_layer(Report.parse(full))[0], "x")
    ElementTree.fromstring(svg)
    assert svg.startswith("<svg") and "<metadata" not in svg and "DOCTYPE" not in svg
