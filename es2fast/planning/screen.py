"""The estimates on the screen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from es2fast.training.memory import GB, PARTS

_FLOP = ("teacher", "student", "head", "separation", "backward", "recomputation")


def show(found: dict[str, Any], console: Console | None = None) -> None:
    """Prints what `estimate.describe` returned."""
    console = console or Console()
    machine, model, counts = found["machine"], found["model"], found["ranks"]
    console.print("[bold]All numbers are estimates; nothing was run.[/bold]")
    console.print(
        f"model: {model['parameters'] / 1e6:.4g} M parameters, {model['trained'] / 1e6:.4g} M "
        f"({model['trained_share']:.2%}) train ({found['trainable']}), teacher {found['teacher']}, "
        f"{found['dtype']}"
    )
    console.print(
        f"machine: {machine['name']}, {machine['peak_flop_per_second'] / 1e12:.4g} TFLOP/s "
        f"({machine['peak_source']}); assumed: {machine['assumed_attainable']:.0%} of it attained, "
        f"{machine['assumed_link'] / GB:.3g} GB/s to ranks of the machine, "
        f"{machine['assumed_network'] / GB:.3g} GB/s beyond, exchanges hidden by computation"
    )
    table = Table("per rank and step", *(f"{c['ranks']} ranks" for c in counts))

    def row(name: str, value: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(name, *(value(count) for count in counts))

    row("ZeRO stage", lambda c: str(c["zero_stage"]))
    for part in PARTS:
        row(f"memory GB: {part}", lambda c, p=part: f"{c['memory_bytes'][p] / GB:.3g}")  # type: ignore[misc]
    row("  total", lambda c: f"{c['memory_bytes']['total'] / GB:.3g}")
    row("  fits in 80 %", lambda c: "yes" if c["fits"] else "NO")
    row(
        "activations GB, plain / checkpointed",
        lambda c: " / ".join(f"{size / GB:.3g}" for size in c["activation_bytes"].values()),
    )
    for part in (*_FLOP, "total"):
        row(f"TFLOP: {part}", lambda c, p=part: f"{c['flop_per_step'][p] / 1e12:.3g}")  # type: ignore[misc]
    row(
        "GB sent at ZeRO 0 / 1 / 2 / 3",
        lambda c: " / ".join(f"{size / GB:.3g}" for size in c["bytes_sent_per_step"].values()),
    )
    row("LM head at ZeRO 3", lambda c: c["zero3_head"])
    row("seconds", lambda c: f"{c['step_seconds']:.3g}")
    row("MFU", lambda c: f"{c['mfu']:.0%}")
    row("padding", lambda c: f"{c['padding_share']:.0%}")
    row("pairs per step, all ranks", lambda c: str(c["pairs_per_step"]))
    for stage in counts[0]["stages"]:
        row(
            f"{stage.replace('_', ' ')}: tokens, hours",
            lambda c, s=stage: (  # type: ignore[misc]
                f"{c['stages'][s]['tokens']:.3g}, {c['stages'][s]['hours']:.3g}"
            ),
        )
    console.print(table)
    for count in counts:
        console.print(f"{count['ranks']} ranks: ZeRO {count['zero_stage']}: {count['zero_reason']}")
        if not count["fits"]:
            change = count["smallest_change"]
            remedy = "nothing tried makes it" if change is None else " ".join(change)
            console.print(f"  does not fit; smallest change: {remedy}")
        if not count["global_batch_size_met"]:
            console.print(f"  train.global_batch_size is not {count['pairs_per_step']}: change it")
