"""The command `es2fast harden`: what it is given on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Harmful = Annotated[
    list[str] | None,
    typer.Option("--harmful", help="prompts to refuse: a file, folder or dataset id; repeatable"),
]
Harmless = Annotated[
    list[str] | None, typer.Option("--harmless", help="prompts to go on answering; likewise")
]
Borderline = Annotated[
    list[str] | None,
    typer.Option("--borderline", help="harmless ones that look harmful; 'none': without"),
]
EvalHarmful = Annotated[
    list[str] | None, typer.Option("--eval-harmful", help="held-out prompts to attack with")
]
EvalHarmless = Annotated[
    list[str] | None, typer.Option("--eval-harmless", help="held-out harmless prompts")
]


def by_role(*files: list[str] | None) -> dict[str, list[str]]:
    """What the five options above were given, in their order, by the roles of `recipe.ROLES`."""
    from es2fast.harden.recipe import ROLES

    return {role: places or [] for role, places in zip(ROLES, files, strict=True)}


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
    harmful: Harmful = None,
    harmless: Harmless = None,
    borderline: Borderline = None,
    eval_harmful: EvalHarmful = None,
    eval_harmless: EvalHarmless = None,
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

    config = resolve(
        model,
        out or default_out(model),
        recipe=recipe,
        quick=quick,
        files=by_role(harmful, harmless, borderline, eval_harmful, eval_harmless),
        overrides=overrides or (),
    )
    run_harden(config, ranks=ranks, overwrite=overwrite)
