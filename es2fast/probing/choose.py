"""`es2fast layers`: how separable the two groups are at every block, and which blocks follow.

Memory: the states are fp32 on the CPU, 4 (n + m) H bytes per block; 10 000 + 10 000 prompts of an
8B model (H 4096, 32 blocks) would take 10.5 GB. So blocks are taken as many at a time as fit into
`STATE_BYTES`, one pass over the prompts each; fitting a probe takes about four times one block's
states beside them (measured at that size: 1.15 GB and 9 s on one core). Prompts are batched by
length, so hardly anything is spent on padding.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from es2fast.config import Config, load_config
from es2fast.data import Formatter, Prompt, load_groups
from es2fast.distributed.runtime import resolve_device, resolve_dtype
from es2fast.errors import UserError
from es2fast.modeling.load import load_causal_lm, load_tokenizer
from es2fast.modeling.taps import blocks, check_layers, last_token_states
from es2fast.probing.probes import LayerProbe, choose_layers, probe_table

STATE_BYTES = 2 << 30  # of fp32 states held at a time
FEWEST = 4  # prompts per group: three to fit a probe and one to test it
BATCH = 32  # prompts per forward pass
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
    model = load_causal_lm(config.model, resolve_dtype(config.model.dtype, device.type))
    model = model.to(device).eval()
    if config.layers != "auto":
        check_layers(config.layers, len(blocks(model)))
    table: list[LayerProbe] = []
    for states in states_by_block(model, formatter, [*harmful, *harmless], progress=progress):
        a, b = ({i: part[group] for i, part in states.items()}
                for group in (slice(None, len(harmful)), slice(len(harmful), None)))  # fmt: skip
        table += probe_table(a, b, progress=progress)
    return pick(config, table, (len(harmful), len(harmless)))


def _check_counts(harmful: Sequence[Prompt], harmless: Sequence[Prompt]) -> None:
    for name, prompts in (("harmful", harmful), ("harmless", harmless)):
        if len(prompts) < FEWEST:
            raise UserError(
                f"data.{name}: {len(prompts)} prompts; a probe needs at least {FEWEST}, and from "
                "20 on its held-out accuracy means something"
            )


def states_by_block(
    model: nn.Module,
    formatter: Formatter,
    prompts: Sequence[Prompt],
    *,
    memory: int = STATE_BYTES,
    progress: bool = False,
) -> Iterator[dict[int, Tensor]]:
    """Last-prompt-token states of all blocks, as many blocks at a time as `memory` bytes hold.

    Args:
        model: a causal language model in eval mode, on its device.
        formatter: its chat format.
        prompts: n prompts.
        memory: bytes of states per yield; at least one block is taken whatever its size.
        progress: show a bar, one step per batch.

    Yields:
        block -> (n, H) fp32 on the CPU, rows in the order of `prompts`; blocks ascend.
    """
    ids = [formatter.prompt_ids(prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batches = [
        formatter.pad([ids[i] for i in order[start : start + BATCH]])
        for start in range(0, len(order), BATCH)
    ]
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    depth, pending = len(blocks(model)), 0
    width = next(iter(last_token_states(model, batches[:1], [0]).values())).shape[1]
    at_once = max(1, memory // (4 * len(prompts) * width))
    while pending < depth:
        layers = range(pending, min(pending + at_once, depth))
        title = f"states of blocks {layers[0]}..{layers[-1]}"
        bar = tqdm(batches, title, unit="batch", disable=not progress)
        states = last_token_states(model, bar, layers)
        for layer in layers:  # one block at a time is held twice
            states[layer] = states[layer][back]
        yield states
        pending = layers[-1] + 1


def choose(config: Config, harmful: dict[int, Tensor], harmless: dict[int, Tensor]) -> LayerChoice:
    """Probes the states (layer -> (n, H)) and applies `layers` and `layer_choice`."""
    counts = tuple(len(next(iter(group.values()))) for group in (harmful, harmless))
    table = probe_table(harmful, harmless)
    return pick(config, table, (counts[0], counts[1]))


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
