"""`es2fast harden`: one command from a chat model's name to a hardened model and a verdict.

Plan, train (under the launcher, as `es2fast train`; several times with other seeds where the model
is to be the mean of several runs), attack base and tuned model, write report and
model card, say what was gained and lost. The folder is an ordinary run's: `es2fast evaluate`,
`compare` and `export` take it.

The same command again goes on where it was: a finished training stays, an evaluation continues from
answers.jsonl. The folder's config.yaml says what it holds; another configuration is refused by the
names of the fields that differ, or replaces it (`overwrite`), where a training that would come out
the same is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from es2fast.attacks.registry import make_attacks
from es2fast.config import Config, load_config, save_config
from es2fast.distributed.launch import launch_evaluation, launch_to_end, rank_count
from es2fast.distributed.runtime import resolve_device
from es2fast.errors import UserError
from es2fast.evaluation.run import TUNED, asked_of, evaluate_run, run_prompts
from es2fast.harden.progress import Steps, estimated, write
from es2fast.harden.recipe import ROLES, telling_options
from es2fast.report.schema import Report, read_report
from es2fast.report.table import print_table
from es2fast.report.verdict import paragraph
from es2fast.run.average import MEAN, seeds_text, write_mean
from es2fast.run.claim import Lock, is_ours
from es2fast.run.files import remove
from es2fast.run.folder import RunFolder
from es2fast.run.identity import SHARING, differences
from es2fast.training.plan import Plan, make_plan
from es2fast.training.same_run import NAMES, made_of

MEAN_OF = 2  # trainings of a whole run, as the recipe was measured
SEEDS = "seeds"  # in the folder of a mean: the runs that it is of
RECIPE = "harden.yaml"  # in the run's folder: the resolved configuration that training is given


def run_harden(
    config: Config, *, ranks: int | None = None, overwrite: bool = False, mean_of: int = 1
) -> Report:
    """Hardens a model into `config.output_dir` and prints every step.

    Args:
        config: from `recipe.resolve`.
        ranks: processes of the training; default: one per GPU, up to 2 on a CPU.
        overwrite: replace what the folder holds where it comes from another configuration.
        mean_of: trainings, with seeds that follow on `train.seed`, whose mean the model is (see
            `run.average`); they lie in the folder's `seeds`.

    Raises:
        UserError: any mistake in the configuration; the folder holds something else; the training
            failed (its own message is above).
    """
    if mean_of > 1 and config.train.trainable != "lora":
        raise UserError(
            f"--mean-of: {mean_of} runs with train.trainable={config.train.trainable} have no mean "
            "that is written; use train.trainable=lora or --mean-of 1"
        )
    folder, steps = RunFolder(config.output_dir), Steps(3 + mean_of)
    seeds = [config.train.seed + number for number in range(mean_of)]
    overwrite = overwrite or config.train.overwrite
    check_folder(folder, config, overwrite, seeds)
    # the plan may be of a folder that holds the run; what is trained anew, `Trainer` decides
    train = config.train.model_copy(update={"overwrite": True})
    config = config.model_copy(update={"train": train})
    with steps.step("plan") as say, telling_options(config):
        plan = make_plan(config, world_size=rank_count(ranks, config.train.device))
        _check_held_out(plan)
        write("\n".join(f"      {line}" for line in plan.lines()))
        say(_planned(plan))
    _train(Trainer(plan, steps, ranks, overwrite), folder, seeds)
    report = _evaluate(plan, folder, steps)
    steps.skip("written", f"{folder.page}, {folder.answers}, {folder.model} (with model card)")
    write(paragraph(report, TUNED))
    return report


def check_folder(folder: RunFolder, config: Config, overwrite: bool, seeds: Sequence[int]) -> None:
    """Refuses a folder that holds another run, unless it may be overwritten.

    Raises:
        UserError: naming the fields that differ, or what else lies there.
    """
    if (folder.path / SEEDS).exists() and not is_ours(folder):
        raise UserError(
            f"--out: {str(folder.path / SEEDS)!r} is there, which no run of es2fast wrote; choose "
            "another folder"
        )
    if overwrite or not folder.occupied:
        return
    where = f"--out: {str(folder.path)!r}"
    saved = _saved(folder)
    if saved is None:
        raise UserError(f"{where} holds another run; choose another folder or give --overwrite")
    shared = () if folder.finished else SHARING  # a training says itself whether it goes on
    names = [name for name in differences(saved, config) if not name.startswith(shared)]
    if names:
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        raise UserError(
            f"{where} holds a run with another {shown}; choose another folder or give --overwrite"
        )
    if not _of_seeds(folder, seeds):
        raise UserError(
            f"{where} holds a model of another --mean-of; choose another folder or give --overwrite"
        )
    if folder.finished and _weights_changed(folder, config):
        raise UserError(
            f"{where}: the weights of model.name have changed since they were hardened there; "
            "choose another folder or give --overwrite"
        )


def _saved(folder: RunFolder) -> Config | None:
    """The configuration of the run in a folder; None where none can be read."""
    if not folder.config.is_file():
        return None
    try:
        return load_config(folder.config)
    except UserError:  # of another version
        return None


def _weights_changed(folder: RunFolder, config: Config) -> bool:
    """A model folder's weights are newer than the training that started from them."""
    weights = Path(config.model.name).expanduser().glob("*.safetensors")
    trained = folder.summary.stat().st_mtime
    return any(path.stat().st_mtime > trained for path in weights)


def _of_seeds(folder: RunFolder, seeds: Sequence[int]) -> bool:
    """The model there is, or will be, the mean of runs with these seeds, or one run's if these are
    one."""
    if not folder.finished:
        return (folder.path / SEEDS).is_dir() == (len(seeds) > 1)
    mean = folder.read_summary().get(MEAN)
    return mean == (seeds_text(seeds) if len(seeds) > 1 else None)


def _changes(folder: RunFolder, config: Config, made: Mapping[str, Any]) -> list[str]:
    """By what the finished training in a folder is another one than that of a configuration,
    however it was evaluated; made: see `made_of`."""
    saved = _saved(folder)
    if saved is None:
        return ["version of es2fast"]  # which wrote its configuration
    if _weights_changed(folder, config):
        return [NAMES["model"]]
    found = [name for name in differences(saved, config) if not name.startswith("evaluate.")]
    told = folder.read_summary().get("made_of") or made
    return found + [words for key, words in NAMES.items() if told.get(key) != made[key]]


@dataclass(frozen=True)
class Trainer:
    """Trains runs of one plan; `ranks` and `overwrite` as `run_harden` has them."""

    plan: Plan
    steps: Steps
    ranks: int | None
    overwrite: bool

    def has(self, folder: RunFolder, config: Config) -> bool:
        """The folder holds this finished training, however it was evaluated.

        Raises:
            UserError: it holds another one, which may not be replaced.
        """
        if not folder.finished:
            return False
        found = _changes(folder, config, made_of(self.plan))
        if found and not self.overwrite:
            raise UserError(
                f"--out: {str(folder.path)!r} holds a finished training with another "
                f"{', '.join(found[:6])}; choose another folder or give --overwrite"
            )
        return not found

    def train(self, config: Config, folder: RunFolder, title: str) -> None:
        """One run, from the folder's checkpoint where one is left: without `overwrite` it does not
        start anew in place of one that cannot go on, as on other ranks, but says why."""
        left = any(folder.checkpoints.glob("*")) and not folder.stopped.is_file()
        train = config.train.model_copy(update={"overwrite": self.overwrite or not left})
        folder.path.mkdir(parents=True, exist_ok=True)
        save_config(config.model_copy(update={"train": train}), folder.path / RECIPE)
        size = self.plan.world_size
        what = f"{train.steps} steps on {size} rank{'s' * (size > 1)}"
        with self.steps.step(title, what), estimated(folder.metrics, train.steps):
            launch_to_end(folder.path / RECIPE, folder, ranks=self.ranks, device=train.device)


def _train(trainer: Trainer, folder: RunFolder, seeds: Sequence[int]) -> None:
    config = trainer.plan.config
    if trainer.has(folder, config) and _of_seeds(folder, seeds):
        if any(differences(load_config(folder.config), config)):  # of how it is evaluated
            save_config(config, folder.config)
        for _ in seeds:
            trainer.steps.skip("train", f"finished before, {folder.model}")
        return
    if len(seeds) == 1:
        remove(folder.path / SEEDS)
        trainer.train(config, folder, "train")
        return
    lock = Lock(folder)  # and the mark that the folder is ours, whenever this ends
    try:
        _train_mean(trainer, folder, seeds)
    finally:
        lock.release()


def _train_mean(trainer: Trainer, folder: RunFolder, seeds: Sequence[int]) -> None:
    config = trainer.plan.config
    if not folder.finished:
        remove(folder.model)  # of a mean that was not written to its end
    parts = [RunFolder(folder.path / SEEDS / str(seed)) for seed in seeds]
    (folder.path / SEEDS).mkdir(parents=True, exist_ok=True)
    folder.claim()
    save_config(config, folder.config)  # whose run this is, from now on
    layers = config.layers
    for seed, part in zip(seeds, parts):
        train = config.train.model_copy(update={"seed": seed})
        own = config.model_copy(
            update={"train": train, "layers": layers, "output_dir": str(part.path)}
        )
        if trainer.has(part, own):
            _check_batch(part, trainer.plan)
            trainer.steps.skip(f"train, seed {seed}", f"finished before, {part.model}")
        else:
            trainer.train(own, part, f"train, seed {seed}")
        if seed == seeds[0]:  # measured once
            layers = part.read_summary()["layers"]
    write_mean(parts, folder)
    save_config(config, folder.config)
    folder.drop_previous()


def _check_batch(part: RunFolder, plan: Plan) -> None:
    """The other parts will see as many prompts in a step as this one did, or the mean would be of
    unlike runs."""
    before = part.read_summary().get("pairs_per_step")
    now = plan.deepspeed["train_batch_size"]
    if before not in (None, now):
        raise UserError(
            f"--ranks: {str(part.path)!r} was trained with {before} pairs per step and the others "
            f"would have {now}; give --ranks {before * plan.world_size // now} or another --out"
        )


def _evaluate(plan: Plan, folder: RunFolder, steps: Steps) -> Report:
    report = _evaluated(plan, folder)
    if report is not None:
        steps.skip("evaluate", f"finished before, {folder.report}")
        print_table(report)
        return report
    settings, groups = plan.config.evaluate, plan.groups
    attacks = make_attacks(settings.attacks, steps=settings.attack_steps)
    harmful = min(settings.limit, len(groups.eval_harmful))
    harmless = min(settings.limit, len(groups.eval_harmless))
    total = 2 * (harmless + len(attacks) * harmful)
    names = ", ".join(attack.label for attack in attacks)
    what = (
        f"base and tuned model, {harmful} harmful prompts under {names}; {harmless} harmless; "
        f"answers of up to {settings.max_new_tokens} tokens"
    )
    processes = _processes(plan)
    total = math.ceil(total / processes)  # that are written into this file while it lasts
    with steps.step("evaluate", what), estimated(folder.answers, total, _is_answer):
        return attack_both(folder, processes)


def _processes(plan: Plan) -> int:
    """How many share the prompts of the evaluation: on GPUs as many as trained, unless
    `evaluate.device_map` spreads the model over them."""
    config = plan.config
    spread = config.evaluate.device_map is not None
    return 1 if spread or resolve_device(config.train.device) == "cpu" else plan.world_size


def attack_both(folder: RunFolder, processes: int) -> Report:
    """Attacks base and tuned model of a finished run, and prints and returns the report.

    Args:
        folder: the run's.
        processes: that share the prompts.
    """
    if processes > 1:
        launch_evaluation(folder.path, processes)
        return read_report(folder.report)
    report = evaluate_run(folder.path)
    assert report is not None  # this is no rank of several
    print_table(report)
    return report


def _evaluated(plan: Plan, folder: RunFolder) -> Report | None:
    """The report that is there, where it is younger than the model and of these settings and
    prompts; `evaluate` may have put another one in its place."""
    if not folder.report.is_file() or _older(folder.report, folder.summary):
        return None
    try:
        report = read_report(folder.report)
    except UserError:  # of another version
        return None
    wanted = asked_of(plan.config, run_prompts(plan.config, plan.groups))
    return report if report.asked == wanted else None


def _older(path: Path, other: Path) -> bool:
    return path.stat().st_mtime < other.stat().st_mtime


def _is_answer(line: str) -> bool:
    """The first answer to a held-out prompt, not one of an attack's search."""
    return '"part": 0,' in line and '"group": "trial"' not in line


def _check_held_out(plan: Plan) -> None:
    for role in ("eval-harmful", "eval-harmless"):
        (group,) = ROLES[role]
        if not getattr(plan.groups, group):
            raise UserError(f"data.{group}: no held-out prompts; give --{role} FILE")


def _planned(plan: Plan) -> str:
    """What will be done, in one line."""
    groups, train = plan.groups, plan.config.train
    epochs = math.ceil(plan.sampler(0).epochs(train.steps)["harmful"])
    return (
        f"{len(groups.harmful)} harmful and {len(groups.harmless)} harmless prompts, "
        f"{train.steps} steps of {plan.deepspeed['train_batch_size']} pairs, up to {epochs} "
        f"passes; {len(groups.eval_harmful)} and {len(groups.eval_harmless)} prompts are held out"
    )
