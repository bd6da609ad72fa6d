"""One model's part of an evaluation: its answers, from the log or from the model, and its geometry.

The model is loaded when something of it is missing, and not at all when everything is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from es2fast.attacks.base import Answer, Attack, Target
from es2fast.attacks.direct import Direct
from es2fast.errors import UserError
from es2fast.evaluation import measure
from es2fast.evaluation.answering import (
    Preparation,
    Subject,
    SubjectAnswers,
    hash_of,
)
from es2fast.evaluation.answers import HARMFUL, HARMLESS
from es2fast.evaluation.lm_tasks import PLAIN, SavedScores, Scores, task_files, task_scores
from es2fast.evaluation.measure import Measured
from es2fast.evaluation.positions import more_positions
from es2fast.evaluation.teacher import SavedTeacher, TokenBatch, token_batches, token_stats
from es2fast.modeling.batch_size import halving
from es2fast.modeling.head import lm_head_of
from es2fast.progress import tqdm
from es2fast.report.schema import BASE
from es2fast.run.folder import RunFolder

T = TypeVar("T")
MEASURES = 3  # goes up when other things are measured than what a folder may hold
TOKEN_ROWS = 8  # per pass over harmless tokens when the batch size is found automatically
TEACHER = "teacher"  # folder of what the base model leaves for the KL


@dataclass
class AttackAnswers:
    """Per held-out harmful prompt its answers under one attack, and the attack's summary."""

    answers: list[list[Answer]]
    summary: dict[str, Any]


@dataclass
class ModelAnswers:
    """All of one model that the report is made of.

    harmless: its plain answers to the held-out harmless prompts; references: what these should be,
    None where nothing says so.
    """

    measured: Measured
    harmless: list[str]
    references: list[str] | None
    attacks: dict[str, AttackAnswers]
    lm_eval: dict[str, Scores] | None = None


class SubjectEvaluation:
    """One model's part of an evaluation.

    Args:
        answers: the model's.
        folder: what is measured goes there.
        warnings: what the report will warn of; added to.
    """

    def __init__(self, answers: SubjectAnswers, folder: RunFolder, warnings: list[str]):
        self._answers, self._folder, self._warnings = answers, folder, warnings
        self._subject, self._prompts = answers.subject, answers.prompts
        self._settings = answers.settings
        self._base: ModelAnswers | None = None
        self._prepared: dict[str, Preparation] = {}

    def run(self, others: Sequence[Subject], base: ModelAnswers | None = None) -> ModelAnswers:
        """Everything of this model; others: the models that will be compared with it; base: the
        model that it is compared with."""
        self._base = base
        with self._answers.unloading():
            direct = Direct(Direct.Settings())
            harmless = [found[0].text for found in self._answers.answers(
                direct, HARMLESS, self._prompts.harmless, lambda: None)]  # fmt: skip
            measured = self._measured(harmless, others)
            attacks = {}
            made = self._answers.attacks()
            for attack in made:
                try:
                    attacks[attack.label] = self._attacked(attack)
                except UserError as error:
                    itself = attack.needs_base and self._subject.name == BASE
                    if len(made) == 1 and not itself:
                        raise
                    self._warnings.append(f"{self._subject.name}, {attack.label}: {error}")
                    tqdm.write(f"warning: {self._warnings[-1]}")
            scores = self._lm_eval([attack for attack in made if attack.label in attacks])
        return ModelAnswers(measured, harmless, self._references(harmless), attacks, scores)

    def _lm_eval(self, attacks: Sequence[Attack]) -> dict[str, Scores] | None:
        """Scores of the tasks, saved or made now: of the plain model, and under attacks."""
        wanted = self._settings.lm_eval
        if not wanted.tasks:
            return None
        tasks = [wanted.model_dump(exclude={"attacks"}), task_files(wanted)]
        key = hash_of(self._subject.key, self._settings.seed, *tasks)
        saved = SavedScores(self._folder.measured / f"{self._subject.name}.lm_eval.json", key)
        found: dict[str, Scores] = {}
        under = {attack.label: attack for attack in attacks if attack.label in wanted.attacks}
        for name, attack in ({PLAIN: None} | under).items():
            settings = "" if attack is None else self._answers.scope(attack, HARMFUL).settings
            scores = saved.get(name, settings)
            if scores is None:
                if attack is None:
                    scores = task_scores(self._target, wanted)
                else:
                    self._prepared[name].ensure()
                    model = self._target.model
                    scores = task_scores(self._target, wanted, partial(_in_place, attack, model))
                saved.put(name, settings, scores)
            found[name] = scores
        return found

    @property
    def _target(self) -> Target:
        return self._answers.target

    def _attacked(self, attack: Attack) -> AttackAnswers:
        """The answers under one attack, and what it tells about itself."""
        coverage = attack.coverage(self._prompts.harmful)
        ready = self._prepared[attack.label] = self._answers.preparation(attack)
        answers = self._answers.answers(
            attack, HARMFUL, self._prompts.harmful, ready.ensure, ready.spend
        )
        return AttackAnswers(answers, {**ready.told, **coverage})

    def _measured(self, harmless: Sequence[str], others: Sequence[Subject]) -> Measured:
        """Geometry and KL: what was saved, or measured now."""
        base = None if self._base is None else self._base.measured
        references = self._references(harmless)
        wanted = references if references is not None else harmless
        key = self._measured_key(self._subject, wanted, base)
        found = Measured.load(self._path(self._subject), key)
        of = hash_of((base or Measured(key)).fingerprint, self._token_rows)
        teacher = SavedTeacher(self._folder.measured / TEACHER, of)
        batches = token_batches(
            self._subject.formatter, self._prompts.harmless, wanted, self._token_rows
        )
        if found is None:
            found = self._measure(key, base, teacher, batches, wanted)
            found.save(self._path(self._subject))
        self._warnings += found.notes
        keys = [(self._path(s), self._measured_key(s, wanted, found)) for s in others]
        missing = any(Measured.load(path, key) is None for path, key in keys)
        if missing and not teacher.complete:
            model, title = self._target.model, f"{self._subject.name}: harmless tokens"
            self._passing(lambda: teacher.write(model, batches, title))
        return found

    def _measure(
        self,
        key: str,
        base: Measured | None,
        teacher: SavedTeacher,
        batches: Sequence[TokenBatch],
        responses: Sequence[str],
    ) -> Measured:
        name, model = self._subject.name, self._target.model
        target = self._target
        groups = {"harmful": self._prompts.harmful, "harmless": self._prompts.harmless}
        states = target.fitted(
            lambda: measure.held_out_states(
                model, self._subject.formatter, groups, target.states_batch
            )
        )
        notes = []
        if base is not None and len(base.separation) != self._target.depth:
            notes.append(
                f"{name}: {self._target.depth} blocks where the base model has "
                f"{len(base.separation)}; nothing is given relative to it"
            )
            base = None
        found = Measured(
            key, measure.geometry(states, self._target.states, base), states=states, notes=notes
        )
        if name != BASE and base is None:
            _forget_base(found.separation)
        more = target.fitted(
            lambda: more_positions(
                model,
                self._subject.formatter,
                groups,
                (self._prompts.fit_harmful, self._prompts.fit_harmless),
                None if base is None else base.separation,
                batch=target.states_batch,
            )
        )
        for layer, positions in more.items():
            found.separation[layer]["positions"] = positions
            if name != BASE and base is None:
                _forget_base(positions)
        unlike = None if name == BASE or base is None else self._unlike(teacher, responses)
        if unlike is not None:
            found.notes.append(f"{name}: {unlike}; no KL and no agreement with it are given")
        if name != BASE and base is not None and unlike is None:
            title = f"{name}: KL to base"
            found.tokens = self._passing(lambda: teacher.compare(model, batches, title))
        else:
            title = f"{name}: harmless tokens"
            found.tokens = self._passing(lambda: token_stats(model, batches, title))
            if name == BASE:
                found.tokens.kl = found.tokens.kl_response = 0.0
                found.tokens.top1 = 1.0
        return found

    def _unlike(self, teacher: SavedTeacher, responses: Sequence[str]) -> str | None:
        """Why the base model's words on the harmless tokens are none on this model's; None: they
        are."""
        base = self._answers.base_subject
        assert base is not None
        pairs = list(zip(self._prompts.harmless, responses))
        rows = [
            [formatter.conversation_ids(prompt, text) for prompt, text in pairs]
            for formatter in (base.formatter, self._subject.formatter)
        ]
        if rows[0] != rows[1]:
            return "its template or tokenizer makes other tokens of the prompts than the base's"
        size = lm_head_of(self._target.model).weight.shape[0]
        if size != teacher.vocabulary:
            return f"its head has {size} rows, the base model's {teacher.vocabulary}"
        return None

    def _measured_key(
        self, subject: Subject, responses: Sequence[str], base: Measured | None
    ) -> str:
        data = [[prompt.turns for prompt in group] for group in vars(self._prompts).values()]
        return hash_of(MEASURES, subject.key, data, responses, base.fingerprint if base else None)

    def _path(self, subject: Subject) -> Path:
        return self._folder.measured / subject.name

    def _passing(self, work: Callable[[], T]) -> T:
        """`work()` on the harmless tokens, whose batches are fixed: a memory that does not suffice
        is one line."""
        return halving(lambda rows: work(), self._token_rows, automatic=False)[0]

    @property
    def _token_rows(self) -> int:
        """The same for all models, so that the base model's half can be compared row by row."""
        size = self._settings.batch_size
        return size if isinstance(size, int) else TOKEN_ROWS

    def _references(self, own: Sequence[str]) -> list[str] | None:
        """The prompts' own responses; where one is missing, the base model's greedy answer."""
        base = self._base.harmless if self._base is not None else own
        prompts = self._prompts.harmless
        alone = self._base is None and self._subject.name != BASE
        if alone and any(prompt.response is None for prompt in prompts):
            return None
        return [
            text if prompt.response is None else prompt.response
            for prompt, text in zip(prompts, base)
        ]


def _forget_base(rows: Mapping[str, dict[str, Any]]) -> None:
    """Takes what is relative to the base model out of figures per block or position."""
    for row in rows.values():
        for name in ("distance_over_base", "norm_ratio", "probe_margin", "probe_margin_interval"):
            if name in row:
                row[name] = None


def _in_place(attack: Attack, model: nn.Module) -> AbstractContextManager[Any]:
    applied = attack.applied(model)
    assert applied is not None  # checked before any model was loaded
    return applied
