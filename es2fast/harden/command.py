"""The command `es2fast harden`: what it is given on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from es2fast.errors import UserError

if TYPE_CHECKING:
    from es2fast.run.hub import HubTarget

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


PushToHub = Annotated[
    str | None,
    typer.Option("--push-to-hub", help="also upload the model and its card: OWNER/NAME, private"),
]
Public = Annotated[bool, typer.Option("--public", help="that repository is public")]


def hub_target(name: str | None, *, public: bool) -> HubTarget | None:
    """Where the two options above have a model uploaded to; None: nowhere.

    Raises:
        UserError: see `HubTarget`; `public` without a name.
    """
    if name is None:
        if public:
            raise UserError("--public: nothing is uploaded; add --push-to-hub OWNER/NAME")
        return None
    from es2fast.run.hub import HubTarget

    return HubTarget(name, public=public)


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
    mean_of: Annotated[
        int | None,
        typer.Option(
            "--mean-of",
            min=1,
            help="trainings with other seeds whose mean the model is; default: 2 with the built-in "
            "recipe, 1 with --quick or another one",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace a run of another configuration")
    ] = False,
    push_to_hub: PushToHub = None,
    public: Public = False,
) -> None:
    """Harden any chat model, attack it before and after, and say what was gained and lost.

    Prompts come from public sets unless files are given. The same command again goes on where it
    was. A verdict that is negative is said first, and the exit code is 0 all the same.
    """
    from es2fast.harden.recipe import default_out, resolve
    from es2fast.harden.run import MEAN_OF, run_harden
    from es2fast.run.folder import RunFolder

    target = hub_target(push_to_hub, public=public)
    if mean_of is None:
        mean_of = 1 if quick or recipe else MEAN_OF
    config = resolve(
        model,
        out or default_out(model),
        recipe=recipe,
        quick=quick,
        files=by_role(harmful, harmless, borderline, eval_harmful, eval_harmless),
        overrides=overrides or (),
        single=mean_of == 1,
    )
    run_harden(config, ranks=ranks, overwrite=overwrite, mean_of=mean_of)
    if target is not None:
        print(f"uploaded: {target.push(RunFolder(config.output_dir).model)}")
