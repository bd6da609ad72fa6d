"""An evaluation from start to report: answers first, then verdicts, then numbers.

Models come one after the other, and a model is gone before the next one comes: what others need of
it (`measure.Measured`, `measure.SavedTeacher`) is on disk. Every answer is in answers.jsonl as soon
as it exists, so an interrupted evaluation continues, and one that is only judged anew loads no
model at all (but attacks that search by a judge's verdicts are run again where another decides).

Attacks are fitted on training prompts and on the model under attack; every rate is measured on
held-out prompts. Several processes can share the answers (`parallel`).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from es2fast.attacks.registry import make_attacks
from es2fast.config import Config, EvaluateConfig, ModelConfig, load_config
from es2fast.data import Formatter, Prompt, PromptGroups, load_groups, model_fingerprint
from es2fast.data.checks import known_tokens
from es2fast.distributed.runtime import resolve_device, resolve_dtype
from es2fast.errors import UserError
from es2fast.evaluation.aggregate import harmless_result, worst_of_suite
from es2fast.evaluation.answering import (
    EvaluationPrompts,
    Subject,
    hash_of,
    subject_answers,
)
from es2fast.evaluation.answers import AnswerLog, is_log
from es2fast.evaluation.judging import check_calibration, judged_attacks
from es2fast.evaluation.lm_tasks import check as check_tasks
from es2fast.evaluation.measure import Measured, shift_ranks
from es2fast.evaluation.parallel import answer_shares, collect, is_main, ranks, world_size
from es2fast.evaluation.split import (
    attackers_prompts,
    check_replaced,
    split_prompts,
    without_learnt,
)
from es2fast.evaluation.subject import (
    TEACHER,
    ModelAnswers,
    SubjectEvaluation,
)
from es2fast.evaluation.teacher import SavedTeacher
from es2fast.judges.base import Judge
from es2fast.judges.calibration import Calibration
from es2fast.judges.registry import judges_of, make_judges
from es2fast.judges.rules import RulesJudge
from es2fast.modeling.adapter import adapter_base, is_adapter
from es2fast.modeling.load import (
    check_weights,
    holds_model,
    known_config,
    load_merged,
    load_tokenizer,
)
from es2fast.report.html import write_report
from es2fast.report.model_card import public_source, write_model_card
from es2fast.report.schema import BASE, Report
from es2fast.run.export import SETTINGS
from es2fast.run.folder import RunFolder

TUNED = "tuned"


def evaluate_models(
    subjects: Sequence[Subject],
    prompts: EvaluationPrompts,
    settings: EvaluateConfig,
    folder: RunFolder,
    *,
    layers: Sequence[int] | None = None,
    extra: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """Attacks and measures models; answers.jsonl and what was measured go to `folder`.

    Args:
        subjects: the base model first, where there is one.
        prompts: held-out and training prompts.
        settings: attacks, judge, lengths, batch size.
        layers: the separated blocks, for the effective rank of the shifts; default: none.
        extra: more keys for the report, such as `train`.
        notes: what the report should tell about the prompts, among its warnings.

    Raises:
        UserError: unknown attack or judge; a calibration of another judge; no attack that could be
            run.
    """
    judges = make_judges(settings.judge, folder.verdicts)
    calibration = None
    if settings.calibration is not None:
        calibration = Calibration.load(settings.calibration)
        check_calibration(calibration, judges[0])
    _check(settings)
    collect(folder.answers)  # of ranks that were stopped
    log = AnswerLog(folder.answers)
    base: ModelAnswers | None = None
    outcomes: dict[str, ModelAnswers] = {}
    warnings = [*notes, *_by_reference(judges, prompts)]
    answers = subject_answers(subjects, prompts, settings, folder, log, judges[0])
    for part in answers:
        others = [s for s in subjects if s.name != BASE] if part.subject.name == BASE else []
        evaluation = SubjectEvaluation(part, folder, warnings)
        outcomes[part.subject.name] = evaluation.run(others, base)
        base = outcomes.get(BASE)
    SavedTeacher(folder.measured / TEACHER, "").remove()
    attacks = judged_attacks(judges, outcomes, prompts.harmful, calibration)
    models = [
        _model_result(name, found, base, attacks[name], prompts.harmless, layers)
        for name, found in outcomes.items()
    ]
    warnings += [note for judge in judges for note in judge.notes()]
    asked = [(prompt.turns, prompt.response) for prompt in prompts.harmful]
    for model in models:
        model["paired_by"] = hash_of(asked, judges[0].name, settings.max_new_tokens)
    raw = {
        "models": models,
        "judge": ", ".join(judge.name for judge in judges),
        "calibration": None if calibration is None else asdict(calibration),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "es2fast": version("es2fast"),
        "seed": settings.seed,
        "max_new_tokens": settings.max_new_tokens,
        "warnings": warnings,
    }
    return Report.parse(raw | dict(extra or {}))


def _by_reference(judges: Sequence[Judge], prompts: EvaluationPrompts) -> list[str]:
    """Says it where rules take a harmful prompt's response as the only success, and where harmless
    prompts are unlike in having one."""
    found = []
    own = sum(prompt.response is not None for prompt in prompts.harmless)
    if 0 < own < len(prompts.harmless):
        found.append(
            f"{own} of {len(prompts.harmless)} held-out harmless prompts have a response: answers "
            "intact, KL and perplexity go by it, and by the base model's own answer to the others"
        )
    with_one = sum(prompt.response is not None for prompt in prompts.harmful)
    if not with_one or not isinstance(judges[0], RulesJudge):
        return found
    return [
        *found,
        f"{with_one} of {len(prompts.harmful)} held-out harmful prompts have a response: only an "
        "answer equal to it counts as useful; leave that column out to judge by phrases alone",
    ]


def saved_states(folder: RunFolder, names: Sequence[str], layer: int) -> dict[str, dict[str, Any]]:
    """Per model and group, the held-out prompts' states at one block, (n, H)."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        measured = Measured.load(folder.measured / name)
        if measured is not None:
            found[name] = {
                group: states[layer].numpy()
                for group, states in measured.states.items()
                if layer in states
            }
    return found


def _model_result(
    name: str,
    found: ModelAnswers,
    base: ModelAnswers | None,
    attacks: dict[str, dict[str, Any]],
    harmless: Sequence[Prompt],
    layers: Sequence[int] | None,
) -> dict[str, Any]:
    """One entry of `models` in the report."""
    result: dict[str, Any] = {
        "name": name,
        "harmless": harmless_result(
            found.harmless, found.references, found.measured.tokens, harmless
        ),
        "attacks": attacks,
        "worst_of_suite": worst_of_suite(attacks),
        "separation": found.measured.separation,
        "lm_eval": found.lm_eval,
    }
    if base is not None and base is not found and layers and found.measured.tokens.kl is not None:
        states, before = (part.measured.states["harmful"] for part in (found, base))
        result["shift_rank"] = shift_ranks(states, before, layers)
    return result


def _reported(
    subjects: Sequence[Subject],
    prompts: EvaluationPrompts,
    config: Config,
    folder: RunFolder,
    **more: Any,
) -> Report | None:
    """`evaluate_models`, the answers shared among a launcher's processes; None but on rank 0."""
    if world_size() > 1:
        _check(config.evaluate)
        with ranks(config.train.device, config.evaluate.device_map) as runtime:
            answer_shares(subjects, prompts, config.evaluate, folder, runtime)
        if not runtime.is_main:
            return None
    return evaluate_models(subjects, prompts, config.evaluate, folder, **more)


def evaluate_run(run: Path, overrides: Sequence[str] = ()) -> Report | None:
    """Attacks the base and the tuned model of `run`; writes report.json, report.html and the model
    card there. Under a launcher (see `parallel`) rank 0 does so and returns the report.

    Args:
        run: folder that `train` wrote.
        overrides: `key=value` changes to the run's saved configuration, e.g. evaluate.limit=50.

    Raises:
        UserError: no finished run there, or a damaged one; no held-out prompts; another base model
            than the run's.
    """
    folder = RunFolder(run)
    folder.check_finished("evaluate")
    check_overrides(overrides, run=True)
    config = load_config(folder.config, overrides)
    check_replaced(config.data, overrides)
    summary = folder.read_summary()
    saved = load_config(folder.config)
    _check_base(config.model, saved.model, summary)
    check_weights(str(folder.model))
    layers = sorted(int(layer) for layer in summary["layers"])
    groups = load_groups(config.data)
    _check_held_out(groups)
    learnt, notes = without_learnt(groups, config, saved)
    _told(notes)
    trained = config.model.model_copy(update={"name": str(folder.model), "revision": None})
    formatter = Formatter(load_tokenizer(config.model), config.data)
    subjects = [
        _subject(name, model, config, formatter)
        for name, model in ((BASE, config.model), (TUNED, trained))
    ]
    prompts = run_prompts(config, groups)
    extra = {"train": summary, "asked": asked_of(config, prompts)}
    more = {"layers": layers, "extra": extra, "notes": notes}
    config = _judged_by(config, config.model.name)
    report = _reported(subjects, prompts, config, folder, **more)
    if report is None:
        return None
    states = saved_states(folder, report.names, layers[-1])
    write_report(folder, report, states=states, config=config)
    write_model_card(
        folder.model,
        config=config.model_copy(update={"data": saved.data}),
        report=report,
        base_model=config.model.name,
        layers=layers,
        d0={int(layer): d0 for layer, d0 in summary["d0"].items()},
        data_summary=_data_lines(learnt, groups),
        train=summary,
    )
    return report


def _check_base(model: ModelConfig, saved: ModelConfig, summary: Mapping[str, Any]) -> None:
    """UserError where another base model is given than the run was trained from, as far as that can
    be told: a folder from a folder, and one commit from another on the hub."""
    trained = (summary.get("made_of") or {}).get("model")
    if trained is None or (model.name, model.revision) == (saved.name, saved.revision):
        return
    given = model_fingerprint(model.name, model.revision)
    commits = {one.rpartition("@")[2] for one in (given, trained)}
    folders = "@" not in given + trained
    known = all(re.fullmatch("[0-9a-f]{40}", one) for one in commits)
    if (folders and given != trained) or (known and len(commits) > 1):
        raise UserError(
            f"model.name: {model.name!r} is not the model that the run was trained from; give that "
            "one, or leave model.name out"
        )


def _data_lines(learnt: PromptGroups | None, asked: PromptGroups) -> list[str]:
    """What a run was trained on, where that is known, and what its evaluation asks."""
    lines = ["training prompts: their files could not be read again"]
    if learnt is not None:
        lines = learnt.report.lines(public_source, prompts=False, held_out=False)
    return lines + asked.report.lines(public_source, prompts=False, held_out=True)


def run_prompts(config: Config, groups: PromptGroups) -> EvaluationPrompts:
    """What a run's models are asked and attacks are fitted on."""
    limit, fit = config.evaluate.limit, config.evaluate.fit_limit
    return EvaluationPrompts(
        groups.eval_harmful[:limit],
        groups.eval_harmless[:limit],
        attackers_prompts(config, groups.harmful),
        groups.harmless[:fit],
    )


def asked_of(config: Config, prompts: EvaluationPrompts) -> str:
    """Hash of all that an evaluation depends on beside the models."""
    settings = config.evaluate.model_dump(mode="json", exclude={"batch_size", "device_map"})
    groups = {
        name: [(prompt.turns, prompt.response, prompt.kinds) for prompt in group]
        for name, group in vars(prompts).items()
    }
    return hash_of(settings, groups, config.data.system_prompt)


_OF_EVALUATION = ("evaluate", "data", "model", "train.device")


def check_overrides(overrides: Sequence[str], *, run: bool) -> None:
    """UserError for `key=value` that an evaluation does not read, of a run that is over or of
    models that are named as such."""
    for item in overrides:
        key = item.partition("=")[0].strip()
        if not any(key == name or key.startswith(f"{name}.") for name in _OF_EVALUATION):
            trained = "the run is trained, and " if run else ""
            raise UserError(
                f"{key}: {trained}an evaluation reads {', '.join(_OF_EVALUATION)} alone; leave it "
                "out"
            )
        if key == "model.name" and not run:
            raise UserError("model.name: models are named before any key=value; leave it out")


def evaluate_paths(
    models: Sequence[str],
    config: Config,
    folder: RunFolder,
    *,
    base: str | None = None,
) -> Report | None:
    """Attacks any causal language models; writes answers.jsonl, report.json and report.html. Under
    a launcher (see `parallel`) rank 0 does so and returns the report.

    Args:
        models: model folders, Hugging Face ids (ORG/NAME@REVISION: of a branch, tag or commit), or
            run folders (their trained model).
        config: `data` and `evaluate`; without training prompts (`data.harmful`, `data.harmless`)
            the held-out files' further rows are the attacker's (see `split_prompts`).
        folder: what is written goes here.
        base: the model the others are compared with; likewise.

    Raises:
        UserError: `model.revision` is set; a model or file that cannot be read; too few prompts;
            a folder that holds a run, a model, or files of these names that no evaluation wrote.
    """
    _check_target(folder)
    if config.model.revision is not None:
        raise UserError(
            f"model.revision: {config.model.revision!r} does not say of which model; give it with "
            f"the id, ORG/NAME@{config.model.revision}"
        )
    groups = load_groups(config.data, need_train=False)
    _check_held_out(groups, models)
    named = [*([(BASE, base)] if base is not None else []), *zip(model_names(models), models)]
    notes = _told([note for one in named for note in _learnt_by(*one, groups, config)])
    prompts, more = split_prompts(groups, config.evaluate, config.data.near_duplicates)
    notes += _told(more)
    subjects = []
    for name, place in named:
        model = config.model.model_copy(update=weights_of(place))
        check_weights(model.name)
        formatter = Formatter(load_tokenizer(model), config.data)
        check_vocabulary(model, formatter, [*prompts.harmful, *prompts.harmless])
        subjects.append(_subject(name, model, config, formatter))
    if base is not None:
        compared = config.model_copy(
            update={"model": config.model.model_copy(update=weights_of(base))}
        )
        judge = _judged_by(compared, compared.model.name).evaluate
        config = config.model_copy(update={"evaluate": judge})
    report = _reported(subjects, prompts, config, folder, notes=notes)
    if report is None:
        return None
    middle = report.reported_layers[round(0.6 * len(report.reported_layers)) - 1]
    write_report(folder, report, states=saved_states(folder, report.names, middle))
    return report


def _check_target(folder: RunFolder) -> None:
    """What an evaluation replaces in its folder is an evaluation's."""
    where = f"--out: {str(folder.path)!r}"
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"{where} is a file; name a folder")
    if folder.occupied or holds_model(folder.path):
        raise UserError(f"{where} holds a run or a model; choose another folder")
    if foreign := next(_foreign(folder), None):
        raise UserError(
            f"{where} holds {foreign.name}, which no evaluation wrote; choose another folder"
        )


def _foreign(folder: RunFolder) -> Iterator[Path]:
    """Files under the names of an evaluation's that are none."""
    if folder.answers.is_file() and not is_log(folder.answers):
        yield folder.answers
    if folder.report.is_file():
        try:
            raw = json.loads(folder.report.read_text(encoding="utf-8"))
        except ValueError:
            raw = None
        if not isinstance(raw, dict) or "models" not in raw:
            yield folder.report
    elif folder.page.is_file():
        yield folder.page


def check_vocabulary(model: ModelConfig, formatter: Formatter, prompts: Sequence[Prompt]) -> None:
    """UserError where the tokenizer writes a token that the model has no embedding of."""
    if is_adapter(model.name):
        model = model.model_copy(update=adapter_base(model.name))
    if (known := known_config(model)) is None:
        return  # loading it says why, or it is an adapter on the hub
    size = getattr(known.get_text_config(), "vocab_size", None)
    if size is None:  # of remote code
        return
    for prompt in prompts:
        known_tokens(formatter.prompt_ids(prompt), prompt, size)


def _told(notes: list[str]) -> list[str]:
    for note in notes if is_main() else ():
        print(f"note: {note}")
    return notes


def _learnt_by(name: str, place: str, groups: PromptGroups, config: Config) -> list[str]:
    """Takes what es2fast trained a model on out of the prompts of all, in place; what to tell."""
    run = RunFolder(place)
    path = run.config if run.finished else Path(place) / SETTINGS
    try:
        saved = load_config(path) if path.is_file() else None
    except UserError:  # of another version
        saved = None
    if saved is None:
        return []
    notes = without_learnt(groups, config, saved)[1]
    if saved.data.system_prompt != config.data.system_prompt:
        notes.append(
            f"it was trained with data.system_prompt={saved.data.system_prompt!r} and is asked "
            f"with {config.data.system_prompt!r}"
        )
    return [f"{name}: {note}" for note in notes]


def weights_of(place: str) -> dict[str, str | None]:
    """`name` and `revision` of a model folder or id; of a run's folder those of its model."""
    run = RunFolder(place)
    if run.finished:
        return {"name": str(run.model), "revision": None}
    name, at, revision = place.rpartition("@")
    if at and name and not Path(place).exists():
        if Path(name).is_dir():
            raise UserError(
                f"model.name: {place!r}: {name!r} is a folder, which has no revision; name the "
                "folder alone"
            )
        return {"name": name, "revision": revision}
    return {"name": place, "revision": None}


def _judged_by(config: Config, base: str | None) -> Config:
    """The configuration whose judges know the base model.

    Raises:
        UserError: a judge asks a base model that needs more than its name.
    """
    judge = judges_of(config, base)
    if judge == config.evaluate.judge:
        return config
    settings = config.evaluate.model_copy(update={"judge": judge})
    return config.model_copy(update={"evaluate": settings})


def model_names(models: Sequence[str]) -> list[str]:
    """The last part of each path, made unique and fit for a file name."""
    names: list[str] = []
    for place in models:
        plain = re.sub(r"[^\w.-]+", "-", Path(place).resolve().name if Path(place).exists()
                       else place.rsplit("/", 1)[-1])  # fmt: skip
        taken = {*names, BASE}
        free = (f"{plain}-{number}" for number in itertools.count(2))
        names.append(plain if plain not in taken else next(one for one in free if one not in taken))
    return names


def _subject(name: str, model: ModelConfig, config: Config, formatter: Formatter) -> Subject:
    """A model on disk or on the hub, loaded to this machine's device when asked for."""
    device = torch.device(resolve_device(config.train.device))
    dtype, device_map = resolve_dtype(model.dtype, device.type), config.evaluate.device_map

    def load() -> nn.Module:
        if device_map is not None:
            return load_merged(model, dtype, device_map)
        return load_merged(model, dtype).to(device)

    return Subject(
        name,
        load,
        formatter,
        f"{model_fingerprint(model.name, model.revision)} {dtype}",
    )


def check_evaluation(config: Config) -> None:
    """What can be said of an evaluation before anything is trained.

    Raises:
        UserError: unknown attack, judge or task; a file of prompts that cannot be read; no
            held-out prompts.
    """
    _check(config.evaluate)
    make_judges(_judged_by(config, config.model.name).evaluate.judge)
    _check_held_out(load_groups(config.data))


def _check(settings: EvaluateConfig) -> None:
    """Says mistakes before any model is loaded."""
    check_tasks(settings.lm_eval, make_attacks(settings.attacks, steps=settings.attack_steps))


def _check_held_out(groups: PromptGroups, models: Sequence[str] = ()) -> None:
    for name in ("eval_harmful", "eval_harmless"):
        if not getattr(groups, name):
            absent = [place for place in models if not Path(place).is_dir()]
            raise UserError(
                f"data.{name}: no held-out prompts; name a source that training did not see, one "
                f"of both kinds in data.eval_labelled, or give --{name.removeprefix('eval_')} FILE"
                + (f" ({absent[0]!r} is no folder here, a run's or a model's)" if absent else "")
            )
