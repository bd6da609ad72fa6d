"""`es2fast layers`: how separable the two groups are at every block, and which blocks follow.

Memory: states come a few blocks at a time (`modeling.states`), fitting a probe takes a few times
one block's states beside them, and what stays of a block is small (`table`). Time: one pass over
the prompts per portion of blocks, `layer_choice.folds` probes per block and, for the effect on the
refusal, a pass over a few dozen prompts per block (`causal`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from es2fast.config import Config, load_config
from es2fast.data import Formatter, Prompt, load_groups
from es2fast.distributed.runtime import Runtime, resolve_device, resolve_dtype
from es2fast.errors import UserError
from es2fast.modeling.load import load_causal_lm, load_tokenizer
from es2fast.modeling.states import states_by_block
from es2fast.modeling.taps import blocks, check_layers
from es2fast.probing.causal import refusal_effects, refusal_starts
from es2fast.probing.choice import choose_layers
from es2fast.probing.crossval import draws, interval
from es2fast.probing.table import LayerProbe, Probed, probe_table
from es2fast.run.claim import check_output
from es2fast.run.files import write_text

FEWEST = 4  # prompts per group: what a probe is worth can hardly be told from fewer
WIDTH = 100  # columns when the output is a file or a pipe
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
        write_text(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")


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


def check_targets(plot: Path, table: Path | None, reads: Sequence[Path] = ()) -> None:
    """UserError when a file to be written cannot be, or is what is read: found out before the work,
    not after it."""
    if plot.suffix.lower() not in PLOT_SUFFIXES:
        raise UserError(f"--plot: {str(plot)!r} must end in one of {', '.join(PLOT_SUFFIXES)}")
    if table is not None and table.resolve() == plot.resolve():
        raise UserError(f"--json: {str(table)!r} is also the file of --plot; choose another")
    for option, path in (("--plot", plot), ("--json", table)):
        check_output(option, path, reads)
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
    found: list[Probed] = []
    prompts = [*harmful, *harmless]
    for states in states_by_block(model, formatter, prompts, alone, progress=progress):
        found += table_of(config, states, len(harmful), progress=progress)
    effects = measure_effects(config, model, formatter, harmful, found, alone, progress=progress)
    return pick(config, found, effects, (len(harmful), len(harmless)))


def table_of(
    config: Config, states: dict[int, Tensor], harmful: int, *, progress: bool = False
) -> list[Probed]:
    """What is known of some blocks: states layer -> (n + m, H), the first n = `harmful` harmful."""
    a = {layer: rows[:harmful] for layer, rows in states.items()}
    b = {layer: rows[harmful:] for layer, rows in states.items()}
    choice = config.layer_choice
    return probe_table(a, b, folds=choice.folds, resamples=choice.resamples, progress=progress)


@dataclass(frozen=True)
class Effects:
    """(blocks, k) fp64 nats per harmful prompt, see `causal`; or None and why, "" if unwanted."""

    values: Tensor | None
    why_not: str = ""


def measure_effects(
    config: Config,
    model: nn.Module,
    formatter: Formatter,
    harmful: Sequence[Prompt],
    probed: Sequence[Probed],
    runtime: Runtime,
    *,
    forward: Callable[..., Tensor] | None = None,
    refusals: Sequence[str] | None = None,
    progress: bool = False,
) -> Effects:
    """`causal.refusal_effects` where the configuration wants it and it can be done.

    Call on every rank; `forward` and `refusals` as there and in `causal.refusal_starts`.
    """
    if not config.layer_choice.causal:
        return Effects(None)
    if config.separation.space != "residual":
        return Effects(
            None, f"separation.space={config.separation.space}, where no push enters the stream"
        )
    starts = refusal_starts(formatter, Prompt.of("..."), refusals)
    if not starts:
        return Effects(None, "the tokenizer knows no word that a refusal starts with")
    gaps = {one.row.layer: one.gap for one in probed}
    some = harmful[: config.layer_choice.causal_prompts]
    return Effects(
        refusal_effects(
            model, formatter, some, gaps, starts, runtime, forward=forward, progress=progress
        )
    )


def _check_counts(harmful: Sequence[Prompt], harmless: Sequence[Prompt]) -> None:
    for name, prompts in (("harmful", harmful), ("harmless", harmless)):
        if len(prompts) < FEWEST:
            raise UserError(
                f"data.{name}: {len(prompts)} prompts; a probe needs at least {FEWEST}, and from "
                "20 on its held-out accuracy means something"
            )


def pick(
    config: Config, probed: Sequence[Probed], effects: Effects, prompts: tuple[int, int]
) -> LayerChoice:
    """Applies `layers` and `layer_choice` to what is known of every block."""
    probed = with_effects(probed, effects.values, config.layer_choice.resamples)
    table = [one.row for one in probed]
    if config.layers != "auto":
        return LayerChoice(table, sorted(config.layers), "given by the configuration", prompts)
    layers, reason = choose_layers(probed, effects.values, config.layer_choice)
    if effects.why_not:
        reason += f"; the effect on the refusal was not measured: {effects.why_not}"
    return LayerChoice(table, layers, reason, prompts)


def with_effects(probed: Sequence[Probed], effects: Tensor | None, resamples: int) -> list[Probed]:
    """The same blocks, their rows with the mean effect and its interval where there is one."""
    if effects is None:
        return list(probed)
    weights = draws((effects.shape[1],), resamples)
    return [
        dataclasses.replace(
            one,
            row=dataclasses.replace(
                one.row, effect=float(own.mean()), effect_interval=interval(own, weights)
            ),
        )
        for one, own in zip(probed, effects)
    ]


def print_layer_table(choice: LayerChoice) -> None:
    """One line per block; the chosen ones are marked; what the columns mean below."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    measured = any(row.effect is not None for row in choice.table)
    names = ["block", "accuracy", "margin", "fisher", "silhouette", "norm", "push", "chosen"]
    names[-1:-1] = ["effect"] if measured else []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in choice.table:
        table.add_row(*_cells(row, measured), "yes" if row.layer in choice.layers else "")
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table)
    print(f"layers: {choice.layers} ({choice.reason})")
    print("{} harmful and {} harmless prompts, each tested once".format(*choice.prompts))
    print(
        "accuracy, margin: of a cross-validated linear probe; [..]: 95 % over resampled prompts;\n"
        "fisher: between over within variance; push: |eps|/|h| that SCAV needs at a block;\n"
        + ("effect: nats of refusal that a push by the groups' gap takes there;\n" * measured)
        + "margin, norm: units of the states"
    )
    if min(choice.prompts) < 20:
        print(f"note: only {min(choice.prompts)} prompts in a group; accuracies are coarse")


def _cells(row: LayerProbe, effects: bool) -> list[str]:
    low, high = row.accuracy_interval
    cells = [
        str(row.layer),
        f"{row.accuracy:.3f} [{low:.3f}, {high:.3f}]",
        f"{row.margin:.3g}",
        f"{row.fisher:.3g}",
        f"{row.silhouette:.3f}",
        f"{row.norm:.4g}",
        f"{row.relative_push:.3f}",
    ]
    return cells + ([f"{row.effect:.2f}"] if effects and row.effect is not None else [])
