"""One model's part of an evaluation: its answers, from the log or from the model, and its geometry.

The model is loaded when something of it is missing, and not at all when everything is known.
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from es2fast.attacks.base import Answer, Attack, Recorder, Target
from es2fast.attacks.direct import Direct
from es2fast.attacks.registry import make_attacks
from es2fast.config import EvaluateConfig
from es2fast.data import Formatter, Prompt
from es2fast.errors import UserError
from es2fast.evaluation import measure
from es2fast.evaluation.answers import HARMFUL, HARMLESS, TRIAL, AnswerLog, Scope
from es2fast.evaluation.estimate import Missing
from es2fast.evaluation.lm_tasks import PLAIN, SavedScores, Scores, task_scores
from es2fast.evaluation.measure import Measured
from es2fast.evaluation.teacher import SavedTeacher, TokenBatch, token_batches, token_stats
from es2fast.judges.base import Judge
from es2fast.modeling.batch_size import starting_rows
from es2fast.report.schema import BASE
from es2fast.run.files import write_text
from es2fast.run.folder import RunFolder

TOKEN_ROWS = 8  # per pass over harmless tokens when the batch size is found automatically
TEACHER = "teacher"  # folder of what the base model leaves for the KL


@dataclass
class Subject:
    """A model to evaluate: `name` in the report, `load` puts it on its device, `fingerprint` tells
    its weights from others'; a model named `base` is what the others are compared with."""

    name: str
    load: Callable[[], nn.Module]
    formatter: Formatter
    fingerprint: str

    @classmethod
    def of(cls, name: str, model: nn.Module, formatter: Formatter) -> Subject:
        """A model that is in memory; its fingerprint is a hash over all its tensors."""
        digest = hashlib.sha256()
        for key, value in model.state_dict().items():
            raw = value.detach().cpu().contiguous().view(torch.uint8).flatten()
            digest.update(key.encode() + raw.numpy().tobytes())
        return cls(name, lambda: model, formatter, digest.hexdigest())

    @property
    def key(self) -> str:
        """What its answers depend on apart from the prompts."""
        return hash_of(self.fingerprint, self.formatter.template_hash)


@dataclass
class EvaluationPrompts:
    """Held-out prompts, whose `response` is the reference answer, and training prompts."""

    harmful: Sequence[Prompt]
    harmless: Sequence[Prompt]
    fit_harmful: Sequence[Prompt]
    fit_harmless: Sequence[Prompt]


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
    """One model's part of an evaluation."""

    def __init__(
        self,
        subject: Subject,
        prompts: EvaluationPrompts,
        settings: EvaluateConfig,
        folder: RunFolder,
        log: AnswerLog,
        judge: Judge,
        warnings: list[str],
        base_subject: Subject | None = None,
    ):
        self._subject, self._prompts, self._settings = subject, prompts, settings
        self._folder, self._log, self._judge = folder, log, judge
        self._base: ModelAnswers | None = None
        self._base_subject, self._warnings = base_subject, warnings
        self.loaded: Callable[[Target], None] = lambda target: None  # called with the model
        self._target: Target | None = None
        self._prepared: dict[str, Callable[[], None]] = {}  # per attack: prepares it if need be

    def missing(self) -> Missing:
        """What the log lacks of this model."""
        prompts = self._prompts

        def lacking(attack: Attack, group: str, asked: Sequence[Prompt]) -> int:
            scope = self._scope(attack, group)
            return sum(self._log.get(scope.key(prompt)) is None for prompt in asked)

        attacks = [
            (attack, lacking(attack, HARMFUL, prompts.harmful))
            for attack in self._made()
            if not (attack.needs_base and self._subject.name == BASE)
        ]
        every = sum(len(group) for group in vars(prompts).values())
        return Missing(
            attacks,
            lacking(Direct(Direct.Settings()), HARMLESS, prompts.harmless),
            every + 2 * len(prompts.harmless),
        )

    def _made(self) -> list[Attack]:
        return make_attacks(self._settings.attacks, steps=self._settings.attack_steps)

    def run(self, others: Sequence[Subject], base: ModelAnswers | None = None) -> ModelAnswers:
        """Everything of this model; others: the models that will be compared with it; base: the
        model that it is compared with."""
        self._base = base
        with self._unloading():
            direct = Direct(Direct.Settings())
            harmless = [found[0].text for found in self._answers(
                direct, HARMLESS, self._prompts.harmless, lambda: None)]  # fmt: skip
            measured = self._measured(harmless, others)
            attacks = {}
            made = self._made()
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
        key = hash_of(self._subject.key, wanted.model_dump(exclude={"attacks"}))
        saved = SavedScores(self._folder.measured / f"{self._subject.name}.lm_eval.json", key)
        found: dict[str, Scores] = {}
        under = {attack.label: attack for attack in attacks if attack.label in wanted.attacks}
        for name, attack in ({PLAIN: None} | under).items():
            settings = "" if attack is None else self._scope(attack, HARMFUL).settings
            scores = saved.get(name, settings)
            if scores is None:
                if attack is None:
                    scores = task_scores(self.target, wanted)
                else:
                    self._prepared[name]()
                    model = self.target.model
                    scores = task_scores(self.target, wanted, partial(_in_place, attack, model))
                saved.put(name, settings, scores)
            found[name] = scores
        return found

    @property
    def target(self) -> Target:
        """The model, loaded when it is first asked for."""
        if self._target is None:
            settings = self._settings
            model, formatter = self._subject.load(), self._subject.formatter
            size, tokens = settings.batch_size, formatter.data.max_length + settings.max_new_tokens
            self._target = Target(
                model,
                formatter,
                self._prompts.fit_harmful,
                self._prompts.fit_harmless,
                self._judge,
                max_new_tokens=settings.max_new_tokens,
                batch_size=size if isinstance(size, int) else starting_rows(model, tokens),
                halves=size == "auto",
                seed=settings.seed,
                title=self._subject.name,
                load_base=None if self._base_subject is None else self._base_subject.load,
            )
            self._was_training = self._target.model.training
            self._target.model.eval()
            self.loaded(self._target)
        return self._target

    @contextmanager
    def _unloading(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self._target is not None:
                self._target.model.train(self._was_training)
                self._target = None
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def _attacked(self, attack: Attack) -> AttackAnswers:
        """The answers under one attack, and what it tells about itself."""
        coverage = attack.coverage(self._prompts.harmful)
        settings = self._scope(attack, HARMFUL).settings
        known = self._folder.measured / f"{self._subject.name}.{attack.label}.json"
        record = _saved_record(known, settings)
        prepared = False

        def spend(seconds: float) -> None:
            record["seconds"] = record.get("seconds", 0.0) + seconds
            write_text(known, json.dumps({"settings": settings, **record}, indent=1) + "\n")

        def prepare() -> None:
            nonlocal prepared
            if prepared:
                return
            target = self.target  # loading it is not the attack's cost
            target.recorder = self._recorder(attack)
            started = time.perf_counter()
            target.fitted(lambda: attack.prepare(target))
            prepared, record["summary"] = True, attack.summary()
            spend(time.perf_counter() - started)

        self._prepared[attack.label] = prepare
        if "summary" not in record:
            prepare()
        answers = self._answers(attack, HARMFUL, self._prompts.harmful, prepare, spend)
        told = {**record["summary"], **coverage, "seconds": record["seconds"]}
        return AttackAnswers(answers, told)

    def _answers(
        self,
        attack: Attack,
        group: str,
        prompts: Sequence[Prompt],
        prepare: Callable[[], None],
        spend: Callable[[float], None] = lambda seconds: None,
    ) -> list[list[Answer]]:
        """From the log, and where it lacks any, from the model; `prepare` is called before, `spend`
        after each batch with the seconds it took."""
        scope = self._scope(attack, group)
        keys = [scope.key(prompt) for prompt in prompts]
        found = [self._log.get(key) for key in keys]
        if None not in found:
            return [answers for answers in found if answers is not None]
        prepare()
        # whole batches: what shares one is the same on a resume, unless the batch size is another
        target, size = self.target, self.target.batch_size
        starts = [i for i in range(0, len(prompts), size) if None in found[i : i + size]]
        title = f"{self._subject.name}: {group if group == HARMLESS else attack.label}"
        bar = tqdm(total=len(prompts), desc=title, unit="prompt")
        bar.update(len(prompts) - sum(len(prompts[i : i + size]) for i in starts))
        with bar:
            for start in starts:
                batch, started = prompts[start : start + size], time.perf_counter()
                made = target.fitted(lambda batch=batch: attack.answers(target, batch))  # type: ignore[misc]
                spend(time.perf_counter() - started)
                for place, answers in enumerate(made, start):
                    if found[place] is None:  # the log is what counts
                        self._log.put(scope, keys[place], prompts[place], answers)
                        found[place] = answers
                bar.update(len(batch))
        return [answers for answers in found if answers is not None]

    def _recorder(self, attack: Attack) -> Recorder:
        scope = self._scope(attack, TRIAL)

        def record(
            name: str,
            parameters: Mapping[str, Any],
            prompts: Sequence[Prompt],
            answer: Callable[[], list[Answer]],
        ) -> list[Answer]:
            keys = [scope.key(prompt, parameters) for prompt in prompts]
            known = [self._log.get(key) for key in keys]
            if None not in known:
                return [found[0] for found in known if found]
            made = answer()
            for prompt, key, one in zip(prompts, keys, made):
                shown = Answer(one.text, {**parameters, **one.parameters}, one.sample, one.info)
                self._log.put(scope, key, prompt, [shown])
            return made

        return record

    def _scope(self, attack: Attack, group: str) -> Scope:
        """Settings hold all that an answer depends on beside model and prompt."""
        settings = self._settings
        fitted = [] if group == HARMLESS else [
            prompt.turns for prompt in (*self._prompts.fit_harmful, *self._prompts.fit_harmless)
        ]  # fmt: skip
        chosen = attack.settings.model_dump(mode="json", exclude={"label"})
        base = self._base_subject.key if attack.needs_base and self._base_subject else ""
        more = [base] if base else []
        return Scope(
            model=self._subject.name,
            fingerprint=self._subject.key,
            group=group,
            attack=attack.label,
            settings=hash_of(attack.name, chosen, settings.max_new_tokens, fitted, *more),
            seed=settings.seed,
        )

    def _measured(self, harmless: Sequence[str], others: Sequence[Subject]) -> Measured:
        """Geometry and KL: what was saved, or measured now."""
        base = None if self._base is None else self._base.measured
        references = self._references(harmless)
        key = self._measured_key(self._subject, references, base)
        found = Measured.load(self._path(self._subject), key)
        teacher = SavedTeacher(self._folder.measured / TEACHER, (base or Measured(key)).fingerprint)
        wanted = references if references is not None else harmless
        batches = token_batches(
            self._subject.formatter, self._prompts.harmless, wanted, self._token_rows
        )
        if found is None:
            found = self._measure(key, base, teacher, batches)
            found.save(self._path(self._subject))
        keys = [(self._path(s), self._measured_key(s, references, found)) for s in others]
        missing = any(Measured.load(path, key) is None for path, key in keys)
        if missing and not teacher.complete:
            teacher.write(self.target.model, batches, f"{self._subject.name}: harmless tokens")
        return found

    def _measure(
        self,
        key: str,
        base: Measured | None,
        teacher: SavedTeacher,
        batches: Sequence[TokenBatch],
    ) -> Measured:
        name, model = self._subject.name, self.target.model
        target = self.target
        groups = {"harmful": self._prompts.harmful, "harmless": self._prompts.harmless}
        states = target.fitted(
            lambda: measure.held_out_states(
                model, self._subject.formatter, groups, target.states_batch
            )
        )
        if base is not None and len(base.separation) != self.target.depth:
            self._warnings.append(
                f"{name}: {self.target.depth} blocks where the base model has "
                f"{len(base.separation)}; nothing is given relative to it"
            )
            base = None
        found = Measured(key, measure.geometry(states, self.target.states, base), states=states)
        if name != BASE and base is not None:
            found.tokens = teacher.compare(model, batches, f"{name}: KL to base")
        else:
            found.tokens = token_stats(model, batches, f"{name}: harmless tokens")
            if name == BASE:
                found.tokens.kl = found.tokens.kl_response = 0.0
                found.tokens.top1 = 1.0
        return found

    def _measured_key(
        self, subject: Subject, references: Sequence[str] | None, base: Measured | None
    ) -> str:
        data = [[prompt.turns for prompt in group] for group in vars(self._prompts).values()]
        return hash_of(subject.key, data, references, base.fingerprint if base else None)

    def _path(self, subject: Subject) -> Path:
        return self._folder.measured / subject.name

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


def _in_place(attack: Attack, model: nn.Module) -> AbstractContextManager[Any]:
    applied = attack.applied(model)
    assert applied is not None  # checked before any model was loaded
    return applied


def _saved_record(path: Path, settings: str) -> dict[str, Any]:
    """`summary` and `seconds` of an attack with these settings that was prepared before."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if record.pop("settings", None) != settings:
        return {}
    return record


def hash_of(*parts: Any) -> str:
    """24 hexadecimal digits over plain values."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
