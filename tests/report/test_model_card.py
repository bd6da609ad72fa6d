"""The model card: what it states, with and without results, and what it must not reveal."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from es2fast.config import parse_config
from es2fast.data.groups import DataReport, SourceReport
from es2fast.ops.separation.op import LOSSES, NEED_MARGIN
from es2fast.report.model_card import merged_card, public_name, public_source, write_model_card
from es2fast.report.schema import Report
from es2fast.report.table import table_markdown

BLOCK = {
    "harmless": {"refusal_rate": 0.0, "intact_rate": 1.0, "kl_to_base": 0.0, "n": 50},
    "attacks": {
        "scav": {"refused": 0.9, "useful": 0.1, "gibberish": 0.0, "n": 50, "relative_push": 0.7}
    },
    "separation": {
        "3": {
            "distance": 8.0,
            "distance_over_base": 1.0,
            "probe_accuracy": 1.0,
            "norm_ratio": 1.0,
        }
    },
}
REPORT = Report.parse({"base": BLOCK, "tuned": BLOCK})


def card(folder, *, raw=None, **changes):
    arguments = {
        "config": parse_config({"model": {"name": "org/model"}, **(raw or {})}),
        "report": REPORT,
        "base_model": "org/model",
        "layers": [3, 5],
        "d0": {3: 8.25, 5: 12.5},
        "data_summary": ["harmful: advbench.csv, 520 prompts", "harmless: a|b <script>"],
        "train": {"steps": 150, "seconds": 61.5, "kl": 0.0119, "lambda": 12.0, "layers": [3, 5]},
    }
    write_model_card(folder, **{**arguments, **changes})
    return (folder / "README.md").read_text(encoding="utf-8")


def test_card_states_everything(tmp_path):
    text = card(tmp_path)
    assert "- harmful: advbench.csv, 520 prompts" in text
    assert "- block 3, d0 = 8.25" in text and "- block 5, d0 = 12.5" in text
    assert "relu(margin · d0 − d) / d0" in text
    assert "| layers | 3, 5 (chosen by probes) |" in text
    assert "| separation loss | hinge, margin 4 × d0 |" in text
    assert "| learning rate | 5e-05, cosine, warm-up 0.05 |" in text
    assert "| last KL, nats/token | 0.0119 |" in text
    assert table_markdown(REPORT) in text
    assert "A defence is not a proof" in text and "## Limitations" in text
    assert "not a replication" in text and "2603.20206" in text


def test_card_says_how_the_rates_arose(tmp_path):
    report = REPORT.model_copy(update={"judge": "hf:org/judge", "max_new_tokens": 64})
    text = " ".join(card(tmp_path, report=report).split())
    assert "answers to harmful prompts: hf:org/judge. Answers of at most 64 tokens." in text
    assert "Not run, see the report for the reason: direct," in text  # of the default attacks
    assert "Refusals of harmless prompts are recognised by phrases" in text
    assert "harmless prompts and of harmful ones are recognised" in " ".join(card(tmp_path).split())


def test_metadata_parses(tmp_path):
    card(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "org/model" and data.base_model_relation == "finetune"
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert {"es2fast", "safety", "arxiv:2603.20206"} <= set(data.tags) and "lora" not in data.tags


def test_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    text = card(tmp_path, raw={"train": {"trainable": "lora"}})
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model_relation == "adapter" and "lora" in data.tags
    assert "holds an adapter" in text and "lora, r = 16, alpha = 32" in text


def test_without_report_nothing_is_claimed(tmp_path):
    text = card(tmp_path, report=None, train={}, data_summary=[], d0={})
    assert "No evaluation was run" in text
    assert "Wilson" not in text and "## Training" not in text
    assert "Not recorded." in text and "- block 3\n" in text
    assert "A defence is not a proof" in text


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_is_described(tmp_path, loss):
    text = card(tmp_path, raw={"separation": {"loss": loss}})
    assert f"Separation: {loss}, " in text
    assert ("unbounded" in text.lower()) == (loss not in NEED_MARGIN)
    assert ("margin 4 × d0" in text) == (loss in ("hinge", "softplus"))


@pytest.mark.parametrize("loss", ["squared", "centroid", "fisher"])
def test_a_margin_bounds_the_losses_that_can_do_without(tmp_path, loss):
    text = card(tmp_path, raw={"separation": {"loss": loss, "margin": 3.0}})
    assert "it stops at the margin" in text and "unbounded" not in text.lower()
    assert f"| separation loss | {loss}, margin 3 × d0 |" in text


def test_settings_beyond_the_loss_are_listed(tmp_path):
    raw = {"space": "normed", "norm_band": [0.5, 2], "bank": 32, "robust": {"probability": 0.25}}
    text = card(tmp_path, raw={"separation": raw})
    assert (
        "| separation loss | hinge, margin 4 × d0, normed states, norm band 0.5 to 2 of the base, "
        "bank of 32, mean_difference simulated in 0.25 of the steps |"
    ) in text


def test_the_refusal_anchor_is_a_row(tmp_path):
    assert "| refusal anchor | none |" in card(tmp_path)
    deep = {"weight": 0.5, "tokens": 12, "prefill": {"probability": 0.3}}
    text = card(tmp_path, raw={"refusal": deep, "separation": {"weight": 0.0}})
    assert (
        "| refusal anchor | weight 0.5, 12 tokens with decay 0.9, own refusals, 0.3 of the rows "
        "after up to 8 tokens of an opening |"
    ) in text
    assert "| separation loss | hinge, margin 4 × d0, weight 0 |" in text
    assert "λ · KL on harmless tokens + 0.5 · CE of refusals" in text
    assert "CE of refusals" not in card(tmp_path)


def test_user_text_stays_text(tmp_path):
    text = card(tmp_path, data_summary=["a|b <script>\n# heading {{ 1 + 1 }}"])
    assert "- a\\|b &lt;script&gt; # heading {{ 1 + 1 }}\n" in text
    assert "<script>" not in text and "\n# heading" not in text


def test_local_paths_are_not_published(tmp_path):
    base = tmp_path / "secret-user" / "toy"
    base.mkdir(parents=True)
    text = card(tmp_path / "out", base_model=str(base))
    assert "# toy, hardened" in text and "secret-user" not in text
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model is None


def test_sources_are_named_without_their_places_and_prompts() -> None:
    found = [
        SourceReport(f"data.harmful[{i}]", name, 9, 0, "prompt", None, 0, {})
        for i, name in enumerate(("/home/me/secret/harm.csv", "org/set:part", "builtin:ordinary"))
    ]
    report = DataReport(found, kept={"harmful": 9}, near_leakage={"harmful": 1},
                        near_example={"harmful": "how to 'x'"})  # fmt: skip
    lines = report.lines(public_source, prompts=False)
    assert [line.split(":")[0] for line in lines[:3]] == [
        "data.harmful[0] harm.csv", "data.harmful[1] org/set", "data.harmful[2] builtin"
    ]  # fmt: skip
    assert "org/set:part: 9 rows" in lines[1] and "builtin:ordinary: 9 rows" in lines[2]
    assert "1 removed that nearly occur in evaluation)" in lines[3]
    assert "how to" in report.lines()[3] and "/home/me" in report.lines()[0]
    held_out = SourceReport("data.eval_harmful[0]", "x.csv", 4, 0, "prompt", None, 0, {})
    report.sources.append(held_out)
    report.kept["eval_harmful"] = 4
    asked, learnt = (report.lines(held_out=which) for which in (True, False))
    assert [line.split(":")[0] for line in asked] == ["data.eval_harmful[0] x.csv", "eval_harmful"]
    assert sorted(asked + learnt) == sorted(report.lines())


def test_a_merged_model_is_no_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    text = card(tmp_path, base_model="org/model")
    assert "peft" in text and "- lora" in text and "base_model_relation: adapter" in text
    merged = merged_card(text)
    assert "peft" not in merged and "- lora" not in merged and "adapter" not in merged
    assert "base_model_relation: finetune" in merged and "base_model: org/model" in merged
    assert merged.count("\n## ") == text.count("\n## ")


def test_public_names(tmp_path, monkeypatch):
    assert public_name("org/model") == "org/model"
    assert public_name("runs/demo/base/") == "base"
    assert public_name("C:\\Users\\me\\base") == "base"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert public_name("org/model") == "model"  # a folder of that name is what was loaded
