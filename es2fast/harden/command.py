"""The command `es2fast harden`: what it is given on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_FILES = "a file, folder or dataset id; may be repeated"


def harden(
    model: Annotated[
        str, typer.Argument(help="chat model: a folder or a Hugging Face id", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, for example train.steps=300", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="the run's folder; default: runs/MODEL-hardened")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="fewer steps, prompts, attacks and tokens: for a try")
    ] = False,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="YAML file in place of the built-in recipe")
    ] = None,
    harmful: Annotated[
        list[str] | None, typer.Option("--harmful", help=f"prompts to refuse: {_FILES}")
    ] = None,
    harmless: Annotated[
        list[str] | None, typer.Option("--harmless", help="prompts to go on answering; likewise")
    ] = None,
    borderline: Annotated[
        list[str] | None,
        typer.Option("--borderline", help="harmless ones that look harmful; 'none': without"),
    ] = None,
    eval_harmful: Annotated[
        list[str] | None, typer.Option("--eval-harmful", help="held-out prompts to attack with")
    ] = None,
    eval_harmless: Annotated[
        list[str] | None, typer.Option("--eval-harmless", help="held-out harmless prompts")
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option("--ranks", min=1, help="processes; default: one per GPU, 2 on a CPU"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace a run of another configuration")
    ] = False,
) -> None:
    """Harden any chat model, attack it before and after, and say what was gained and lost.

    Prompts come from public sets unless files are given. The same command again goes on where it
    was. A verdict that is negative is said first, and the exit code is 0 all the same.
    """
    from es2fast.harden.recipe import default_out, resolve
    from es2fast.harden.run import run_harden

    files = {
        "harmful": harmful,
        "harmless": harmless,
        "borderline": borderline,
        "eval-harmful": eval_harmful,
        "eval-harmless": eval_harmless,
    }
    config = resolve(
        model,
        out or default_out(model),
        recipe=recipe,
        quick=quick,
        files={role: places or [] for role, places in files.items()},
        overrides=overrides or (),
    )
    run_harden(config, ranks=ranks, overwrite=overwrite)
