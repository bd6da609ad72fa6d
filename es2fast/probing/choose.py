"""`es2fast layers`: how separable the two groups are at every block, and which blocks follow.

Memory: states come a few blocks at a time (`modeling.states`); fitting a probe takes about four
times one block's states beside them (10 000 + 10 000 states of width 4096: 1.15 GB and 9 s on one
core).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from es2fast.config import Config, load_config
from es2fast.data import Formatter, Prompt, load_groups
from es2fast.distributed.runtime import Runtime, resolve_device, resolve_dtype
from es2fast.errors import UserError
from es2fast.modeling.load import load_causal_lm, load_tokenizer
from es2fast.modeling.states import states_by_block
from es2fast.modeling.taps import blocks, check_layers
from es2fast.probing.probes import LayerProbe, choose_layers, probe_table

FEWEST = 4  # prompts per group: three to fit a probe and one to test it
PLOT_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass
class LayerChoice:
    """The table of every block, the chosen blocks and the reason; prompts used per group."""

    table: list[LayerProbe]
    layers: list[int]
    reason: str
    prompts: tuple[int, int] = (0, 0)  # harmful, harmless

    def save(self, path: Path) -> None:
        """Writes table, layers and reason as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def probing_config(
    model: str,
    overrides: Sequence[str] = (),
    harmful: Sequence[str] | None = None,
    harmless: Sequence[str] | None = None,
) -> Config:
    """The configuration behind the command line.

    Args:
        model: a run's YAML file (an existing file, or any name ending in .yaml or .yml), else a
            model folder or Hugging Face id.
        overrides: `key=value`, applied last.
        harmful, harmless: sources of prompts, in place of the configuration's.

    Raises:
        UserError: a bad configuration; a model without prompts to probe it with.
    """
    groups = (("harmful", harmful), ("harmless", harmless))
    named = [f"data.{name}={json.dumps(list(files))}" for name, files in groups if files]
    if Path(model).is_file() or model.endswith((".yaml", ".yml")):
        return load_config(model, [*named, *overrides])
    config = load_config(None, [f"model.name={json.dumps(model)}", *named, *overrides])
    for name, _ in groups:
        if not (getattr(config.data, name) or config.data.labelled):
            raise UserError(f"data.{name}: no prompts; give --{name} FILE")
    return config


def check_targets(plot: Path, table: Path | None) -> None:
    """UserError when a file to be written cannot be: found out before the work, not after it."""
    if plot.suffix.lower() not in PLOT_SUFFIXES:
        raise UserError(f"--plot: {str(plot)!r} must end in one of {', '.join(PLOT_SUFFIXES)}")
    for option, path in (("--plot", plot), ("--json", table)):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{option}: folder {str(path.parent)!r} does not exist")


def probe_layers(config: Config, *, progress: bool = False) -> LayerChoice:
    """Loads the model on this machine and probes every block.

    Args:
        config: model, data, `layers`, `layer_choice`; `layer_choice.prompts` bounds each group.
        progress: show progress bars.

    Raises:
        UserError: any mistake in model or data; a group of fewer than four prompts.
    """
    device = torch.device(resolve_device(config.train.device))
    groups = load_groups(config.data)
    count = config.layer_choice.prompts
    harmful, harmless = groups.harmful[:count], groups.harmless[:count]
    _check_counts(harmful, harmless)
    formatter = Formatter(load_tokenizer(config.model), config.data)
    alone = Runtime(0, 1, device, resolve_dtype(config.model.dtype, device.type))
    model = load_causal_lm(config.model, alone.dtype).to(device).eval()
    if config.layers != "auto":
        check_layers(config.layers, len(blocks(model)))
    table: list[LayerProbe] = []
    prompts = [*harmful, *harmless]
    for states in states_by_block(model, formatter, prompts, alone, progress=progress):
        table += table_of(config, states, len(harmful), progress=progress)
    return pick(config, table, (len(harmful), len(harmless)))


def table_of(
    config: Config, states: dict[int, Tensor], harmful: int, *, progress: bool = False
) -> list[LayerProbe]:
    """The rows of some blocks: states layer -> (n + m, H), the first n = `harmful` rows harmful."""
    a = {layer: rows[:harmful] for layer, rows in states.items()}
    b = {layer: rows[harmful:] for layer, rows in states.items()}
    return probe_table(a, b, progress=progress)


def _check_counts(harmful: Sequence[Prompt], harmless: Sequence[Prompt]) -> None:
    for name, prompts in (("harmful", harmful), ("harmless", harmless)):
        if len(prompts) < FEWEST:
            raise UserError(
                f"data.{name}: {len(prompts)} prompts; a probe needs at least {FEWEST}, and from "
                "20 on its held-out accuracy means something"
            )


def pick(config: Config, table: list[LayerProbe], prompts: tuple[int, int]) -> LayerChoice:
    """Applies `layers` and `layer_choice` to a table of every block."""
    if config.layers != "auto":
        return LayerChoice(table, sorted(config.layers), "given by the configuration", prompts)
    choice = config.layer_choice
    layers, reason = choose_layers(table, accuracy=choice.accuracy, depth=choice.depth)
    return LayerChoice(table, sorted(layers), reason, prompts)


def print_layer_table(choice: LayerChoice) -> None:
    """One line per block; the chosen ones are marked; what the columns mean below."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    names = ("block", "accuracy", "margin", "fisher", "silhouette", "norm", "push", "chosen")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right")
    for row in choice.table:
        table.add_row(
            str(row.layer),
            f"{row.accuracy:.3f}",
            f"{row.margin:.3g}",
            f"{row.fisher:.3g}",
            f"{row.silhouette:.3f}",
            f"{row.norm:.4g}",
            f"{row.relative_push:.3f}",
            "yes" if row.layer in choice.layers else "",
        )
    Console().print(table)
    print(f"layers: {choice.layers} ({choice.reason})")
    print("{} harmful and {} harmless prompts, 30 % of them held out".format(*choice.prompts))
    print(
        "accuracy, margin: of a linear probe, held out; fisher: between over within variance;\n"
        "push: |eps|/|h| that SCAV needs at that block alone; margin, norm: units of the states"
    )
    if min(choice.prompts) < 20:
        print(f"note: only {min(choice.prompts)} prompts in a group; accuracies are coarse")
