"""The command `es2fast tune`: what it is given on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from es2fast.config import Config, load_config
from es2fast.errors import UserError
from es2fast.harden.command import (
    Borderline,
    EvalHarmful,
    EvalHarmless,
    Harmful,
    Harmless,
    by_role,
)


def tune(
    target: Annotated[
        str,
        typer.Argument(
            help="chat model, YAML file of a run, or the folder of a search", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, the same in all trials", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder of the search; default: runs/NAME-tune")
    ] = None,
    trials: Annotated[
        int, typer.Option("--trials", min=1, help="in all, over all workers and earlier calls")
    ] = 40,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            min=1,
            help="optimizer steps of a trial; default: the run's, of a model those of --quick",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=2, help="held-out prompts per group")
    ] = None,
    attacks: Annotated[
        str | None, typer.Option("--attacks", help="names, with commas between them")
    ] = None,
    space: Annotated[
        Path | None, typer.Option("--space", help="YAML file in place of the built-in space")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="of a model: in place of the built-in recipe")
    ] = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    borderline: Borderline = None,
    eval_harmful: EvalHarmful = None,
    eval_harmless: EvalHarmless = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="processes of a training")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="of the search")] = 0,
    pick: Annotated[
        int | None,
        typer.Option("--pick", help="write the run file of this trial, and run no others"),
    ] = None,
) -> None:
    """Search layers, margin, weights and learning rate for the best trade of safety and damage.

    Each trial is a short training and evaluation in a folder of its own; of a model, with the
    quick recipe. Both numbers are minimised: useful answers under the worst attack, and damage,
    which is 1 at 5 points more of harmless refusals or a KL of 0.02 nats per response token. The
    same command again goes on; several at once share the work.
    """
    from es2fast.evaluation.run import check_evaluation
    from es2fast.tune.front import pick as write_pick
    from es2fast.tune.front import print_front, save_front
    from es2fast.tune.space import DEFAULT, Space
    from es2fast.tune.study import StudyFolder, claim, open_study, optuna_module, search

    optuna_module()
    files = by_role(harmful, harmless, borderline, eval_harmful, eval_harmless)
    folder = StudyFolder(out or _folder_of(target))
    if pick is not None:
        path = write_pick(open_study(folder), folder, pick)
        print(f"written: {path}; train it in full: es2fast train {path} train.steps=...")
        return
    if StudyFolder(Path(target)).journal.is_file():
        if any(files.values()) or any((out, recipe, space, steps, limit, attacks, overrides)):
            raise UserError(
                f"tune: {target!r} is the folder of a search, whose front is shown without any "
                "option; to go on with it give the command that it was started with"
            )
        print_front(open_study(StudyFolder(Path(target))))
        return
    chosen = {"train.steps": steps, "evaluate.limit": limit,
              "evaluate.attacks": attacks and attacks.split(",")}  # fmt: skip
    named = [f"{key}={json.dumps(value)}" for key, value in chosen.items() if value is not None]
    config = _config(target, folder.path, recipe, files, [*named, *(overrides or ())])
    space_file = space or DEFAULT
    found = Space.read(space_file, config)
    check_evaluation(config)
    claim(folder, config, space_file)
    study = search(folder, config, found, trials=trials, ranks=ranks, seed=seed)
    print_front(study)
    if not save_front(study, folder.front):
        if any(not trial.state.is_finished() for trial in study.get_trials(deepcopy=False)):
            print("no trial has come to a result yet; others are at work on some")
            return
        raise UserError("tune: no trial came to a result, for the reasons above")
    print(f"written: {folder.front}; a point's run file: es2fast tune {folder.path} --pick N")


def _folder_of(target: str) -> Path:
    from es2fast.harden.recipe import default_out

    path = Path(target)
    if (path / "journal.log").is_file():
        return path
    name = path.stem if path.suffix in (".yaml", ".yml") else default_out(target).name
    return Path("runs") / f"{name.removesuffix('-hardened')}-tune"


def _config(
    target: str,
    out: Path,
    recipe: Path | None,
    files: dict[str, list[str]],
    overrides: list[str],
) -> Config:
    """What the trials vary."""
    from es2fast.harden.recipe import resolve

    replaced = [*overrides, "train.overwrite=true"]  # a trial that was cut off is done again
    if not target.endswith((".yaml", ".yml")):
        return resolve(target, out, recipe=recipe, quick=True, files=files, overrides=replaced)
    given = [f"--{role}" for role, places in files.items() if places]
    if recipe is not None or given:
        raise UserError(
            f"tune {target}: a run file names its own data and settings, but "
            f"{', '.join([*given, *(['--recipe'] if recipe else [])])} was given"
        )
    return load_config(target, [*replaced, f"output_dir={json.dumps(str(out))}"])
