"""`es2fast layers`: how separable the two groups are at every block, and which blocks follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from es2fast.config import Config
from es2fast.data import Formatter, Prompt, load_groups
from es2fast.modeling.layers import LayerProbe, choose_layers, probe_table
from es2fast.modeling.load import load_causal_lm, load_tokenizer
from es2fast.modeling.taps import blocks, last_token_states
from es2fast.runtime import resolve_device, resolve_dtype


@dataclass
class LayerChoice:
    """The table of every block, the chosen blocks and the reason."""

    table: list[LayerProbe]
    layers: list[int]
    reason: str


def probe_layers(config: Config) -> LayerChoice:
    """Loads the model on this machine and probes every block.

    Raises:
        UserError: any mistake in model or data.
    """
    device = torch.device(resolve_device(config.train.device))
    groups = load_groups(config.data)
    formatter = Formatter(load_tokenizer(config.model), config.data)
    model = load_causal_lm(config.model, resolve_dtype(config.model.dtype, device.type))
    model = model.to(device).eval()
    count = config.layer_choice.prompts

    def states(prompts: list[Prompt]) -> dict[int, Tensor]:
        batches = formatter.prompt_batches(prompts[:count], 16)
        return last_token_states(model, batches, range(len(blocks(model))))

    return choose(config, states(groups.harmful), states(groups.harmless))


def choose(config: Config, harmful: dict[int, Tensor], harmless: dict[int, Tensor]) -> LayerChoice:
    """Probes the states (layer -> (n, H)) and applies `layers` and `layer_choice`."""
    table = probe_table(harmful, harmless)
    if config.layers != "auto":
        return LayerChoice(table, sorted(config.layers), "given by the configuration")
    choice = config.layer_choice
    layers, reason = choose_layers(table, accuracy=choice.accuracy, depth=choice.depth)
    return LayerChoice(table, sorted(layers), reason)


def print_layer_table(choice: LayerChoice) -> None:
    """One line per block; the chosen ones are marked."""
    from rich.console import Console
    from rich.table import Table

    table = Table("block", "accuracy", "margin", "distance", "norm", "chosen")
    for row in choice.table:
        numbers = (f"{row.accuracy:.3f}", f"{row.margin:.3g}", f"{row.distance:.4g}")
        mark = "yes" if row.layer in choice.layers else ""
        table.add_row(str(row.layer), *numbers, f"{row.norm:.4g}", mark)
    Console().print(table)
    print(f"layers: {choice.layers} ({choice.reason})")
    print("accuracy: held-out, of a linear probe; margin, distance, norm: in units of the states")
