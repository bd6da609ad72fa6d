"""README.md of an exported model: what was done to it, what was measured, what that does not show.

A hardened model travels without its run folder, so the card carries the data, layers, losses,
settings and results with it, says which choices the paper left open, and warns that a defence is
not a proof. Local paths are cut to their last part: cards get published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from es2fast.attacks.registry import make_attacks
from es2fast.config import Config
from es2fast.report.schema import Report
from es2fast.report.settings import config_rows
from es2fast.report.table import markdown_text, table_markdown
from es2fast.run.files import write_text

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.j2"
TAGS = ["es2fast", "embedding-space-separation", "safety", "arxiv:2603.20206"]
ADAPTER_NOTE = (
    "The folder holds an adapter; transformers loads the base model and puts the adapter on it "
    "(`peft`\nmust be installed)."
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def write_model_card(
    folder: str | Path,
    *,
    config: Config,
    report: Report | None,
    base_model: str,
    layers: Sequence[int],
    d0: Mapping[int, float],
    data_summary: Sequence[str],
    train: Mapping[str, Any],
) -> None:
    """Writes folder/README.md.

    Args:
        folder: the exported model; holds `adapter_config.json` when it is an adapter.
        config: the resolved configuration of the run.
        report: what was measured, or None when nothing was.
        base_model: Hugging Face id, or folder, of the model before training.
        layers: the decoder blocks that were separated.
        d0: mean distance between the groups in the base model, per block, in the units of the
            residual stream.
        data_summary: one line of text per data source, named as `public_source` does and without
            prompts.
        train: `steps`, `seconds`, `kl`, `lambda` and whatever else the run wants told; only
            numbers and text are shown.
    """
    folder = Path(folder)
    adapter = (folder / "adapter_config.json").is_file()
    card = ModelCard.from_template(
        _metadata(base_model, adapter),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        base=markdown_text(public_name(base_model)),
        adapter_note=ADAPTER_NOTE if adapter else "",
        data_lines=[markdown_text(line) for line in data_summary],
        layer_lines=[_layer_line(layer, d0) for layer in layers],
        loss=config.separation.loss,
        bound="; it stops at the margin" if config.separation.bounded else "; unbounded",
        settings=[(name, markdown_text(value)) for name, value in config_rows(config, layers)],
        anchor=f" + {config.refusal.weight:g} · CE of refusals" if config.refusal.weight else "",
        results=table_markdown(report) if report else "",
        conditions=_conditions(report) if report else "",
        not_run=_not_run(config, report) if report else "",
        by_phrases=report is None or report.judge.startswith("rules"),
        train_rows=_train_rows(train),
    )
    write_text(folder / "README.md", card.content)


def _conditions(report: Report) -> str:
    """Under which the rates arose."""
    length = f" Answers of at most {report.max_new_tokens} tokens." if report.max_new_tokens else ""
    return f"Judge of the answers to harmful prompts: {markdown_text(report.judge)}.{length}"


def _not_run(config: Config, report: Report) -> str:
    """The attacks that were asked for and could not be made on any model."""
    settings = config.evaluate
    asked = [one.label for one in make_attacks(settings.attacks, steps=settings.attack_steps)]
    return ", ".join(name for name in asked if name not in report.attack_names)


def is_hub_id(name: str) -> bool:
    """Whether a model is named by a Hugging Face id and not by a folder on this machine."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def public_name(name: str) -> str:
    """A Hugging Face id as it is; of a local path, the last part."""
    if is_hub_id(name):
        return name
    flavour = PureWindowsPath if "\\" in name else PurePath
    return flavour(name).name or "local model"


def public_source(name: str) -> str:
    """A source of prompts as a published card may name it; see `public_name`."""
    return name if is_hub_id(name.partition(":")[0]) else public_name(name)


def merged_card(text: str) -> str:
    """The card of an adapter as that of the plain model that it was folded into."""
    card = ModelCard(text.replace(f"\n{ADAPTER_NOTE}\n", ""))
    about: Any = card.data
    about.tags = [tag for tag in about.tags or [] if tag != "lora"]
    if about.get("base_model_relation"):
        about["base_model_relation"] = "finetune"
    return str(card)


def _metadata(base_model: str, adapter: bool) -> ModelCardData:
    origin: dict[str, Any] = {}
    if is_hub_id(base_model):  # the hub refuses a card whose base_model is a path
        relation = "adapter" if adapter else "finetune"
        origin = {"base_model": base_model, "base_model_relation": relation}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS + (["lora"] if adapter else []),
        **origin,
    )


def _layer_line(layer: int, d0: Mapping[int, float]) -> str:
    known = d0.get(layer)
    return f"block {layer}" + ("" if known is None else f", d0 = {known:.4g}")


def _train_rows(train: Mapping[str, Any]) -> list[tuple[str, str]]:
    labels = {
        "steps": "optimizer steps",
        "seconds": "seconds",
        "kl": "last KL, nats/token",
        "lambda": "last λ",
        "mean_of_seeds": "mean of the runs with seeds",
    }
    rows = []
    for key, value in train.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        if isinstance(value, int | str):
            rows.append((markdown_text(labels.get(key, key)), markdown_text(str(value))))
    return rows
