"""One model's answers: from the log, and where it lacks any, from the model.

The model is loaded when something of it is missing, and not at all when everything is known.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from es2fast.attacks.base import Answer, Attack, Recorder, Target
from es2fast.attacks.direct import Direct
from es2fast.attacks.registry import make_attacks
from es2fast.config import EvaluateConfig
from es2fast.data import Formatter, Prompt
from es2fast.evaluation.answers import HARMFUL, HARMLESS, TRIAL, AnswerLog, Scope
from es2fast.evaluation.estimate import Missing, announcement
from es2fast.judges.base import Judge
from es2fast.modeling.batch_size import starting_rows
from es2fast.modeling.load import free_memory
from es2fast.modeling.skeleton import check_positions
from es2fast.modeling.states import BATCH, check_padding
from es2fast.progress import tqdm
from es2fast.report.schema import BASE
from es2fast.run.files import write_text
from es2fast.run.folder import RunFolder


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
        formatter, data = self.formatter, self.formatter.data
        lengths = (data.max_length, data.max_response_tokens)
        return hash_of(self.fingerprint, formatter.template_hash, *lengths)


@dataclass
class EvaluationPrompts:
    """Held-out prompts, whose `response` is the reference answer, and training prompts."""

    harmful: Sequence[Prompt]
    harmless: Sequence[Prompt]
    fit_harmful: Sequence[Prompt]
    fit_harmless: Sequence[Prompt]

    @property
    def by_reference(self) -> bool:
        """Held-out harmful prompts say what counts as success; otherwise a training prompt's
        response, such as a harmful answer to learn from, does not say it either."""
        return any(prompt.response is not None for prompt in self.harmful)


class Preparation:
    """One attack on one model: prepared when that is needed; what it told about itself and the
    seconds it took stay in a file.

    Args:
        attack: unprepared.
        key: of what the file's content must have been made with.
        path: the file.
        prepare: prepares the attack on its model and says how many seconds that took.
    """

    def __init__(self, attack: Attack, key: str, path: Path, prepare: Callable[[], float]):
        self.attack, self._key, self._path = attack, key, path
        self._prepare, self._done = prepare, False
        self._record = _saved_record(path, key)

    @property
    def told(self) -> dict[str, Any]:
        """The attack's summary and its seconds, prepared before or now."""
        if "summary" not in self._record:
            self.ensure()
        return {**self._record["summary"], "seconds": self._record["seconds"]}

    def ensure(self) -> None:
        """Prepares the attack unless that was done."""
        if self._done:
            return
        took = self._prepare()
        self._done, self._record["summary"] = True, self.attack.summary()
        self.spend(took)

    def spend(self, seconds: float) -> None:
        """Adds to what the attack took."""
        self._record["seconds"] = self._record.get("seconds", 0.0) + seconds
        plain = {"key": self._key, **self._record}
        write_text(self._path, json.dumps(plain, indent=1) + "\n")


class SubjectAnswers:
    """One model's answers.

    Args:
        log: where answers are looked for and kept.
        base_subject: the base model, where there is one and this is not it.
        loaded: called with the model whenever it is loaded.
        quiet: no progress bars.
    """

    def __init__(
        self,
        subject: Subject,
        prompts: EvaluationPrompts,
        settings: EvaluateConfig,
        folder: RunFolder,
        log: AnswerLog,
        judge: Judge,
        base_subject: Subject | None = None,
        *,
        loaded: Callable[[Target], None] = lambda target: None,
        quiet: bool = False,
    ):
        self.subject, self.prompts, self.settings = subject, prompts, settings
        self._folder, self._log, self._judge = folder, log, judge
        self._base_subject, self._loaded, self._quiet = base_subject, loaded, quiet
        self._target: Target | None = None

    def missing(self) -> Missing:
        """What the log lacks of this model."""
        prompts = self.prompts

        def lacking(attack: Attack, group: str, asked: Sequence[Prompt]) -> int:
            scope = self.scope(attack, group)
            return sum(self._log.get(scope.key(prompt)) is None for prompt in asked)

        attacks = [
            (attack, lacking(attack, HARMFUL, prompts.harmful))
            for attack in self.attacks()
            if not (attack.needs_base and self.subject.name == BASE)
        ]
        every = sum(len(group) for group in vars(prompts).values())
        return Missing(
            attacks,
            lacking(Direct(Direct.Settings()), HARMLESS, prompts.harmless),
            every + 2 * len(prompts.harmless),
        )

    def attacks(self) -> list[Attack]:
        """Fresh ones, unprepared."""
        return make_attacks(self.settings.attacks, steps=self.settings.attack_steps)

    @property
    def base_subject(self) -> Subject | None:
        """The base model; None: there is none, or this is it."""
        return self._base_subject

    @property
    def target(self) -> Target:
        """The model, loaded when it is first asked for.

        Raises:
            UserError: it does not mask padding.
        """
        if self._target is None:
            settings = self.settings
            model, formatter = self.subject.load(), self.subject.formatter
            size, tokens = settings.batch_size, formatter.data.max_length + settings.max_new_tokens
            self._target = Target(
                model,
                formatter,
                self.prompts.fit_harmful,
                self.prompts.fit_harmless,
                self._judge,
                max_new_tokens=settings.max_new_tokens,
                batch_size=size if isinstance(size, int) else starting_rows(model, tokens),
                halves=size == "auto",
                seed=settings.seed,
                by_reference=self.prompts.by_reference,
                name=self.subject.name,
                title=None if self._quiet else self.subject.name,
                load_base=None if self._base_subject is None else self._base_subject.load,
            )
            self._was_training = self._target.model.training
            self._target.model.eval()
            check_padding(model, formatter, self.prompts.harmful[:BATCH])
            self._check_positions()
            self._loaded(self._target)
        return self._target

    def _check_positions(self) -> None:
        formatter, prompts = self.subject.formatter, self.prompts
        asked = (*prompts.harmful, *prompts.harmless)

        def longest() -> int:
            prompt = max((len(formatter.prompt_ids(one)) for one in asked), default=0)
            return prompt + self.settings.max_new_tokens

        remedy = "set a smaller evaluate.max_new_tokens or data.max_length"
        check_positions(self.target.model, longest, remedy)

    @contextmanager
    def unloading(self) -> Iterator[None]:
        """Lets go of the model in the end."""
        try:
            yield
        finally:
            if self._target is not None:
                self._target.model.train(self._was_training)
                self._target = None
                free_memory()

    def preparation(self, attack: Attack) -> Preparation:
        """How an attack is prepared here."""

        def prepare() -> float:
            target, started = self.target, time.perf_counter()  # loading is not the attack's cost
            target.recorder = self._recorder(attack)
            target.fitted(lambda: attack.prepare(target))
            return time.perf_counter() - started

        path = self._folder.measured / f"{self.subject.name}.{attack.label}.json"
        scope = self.scope(attack, HARMFUL)
        key = hash_of(scope.fingerprint, scope.settings, scope.seed)
        return Preparation(attack, key, path, prepare)

    def answers(
        self,
        attack: Attack,
        group: str,
        prompts: Sequence[Prompt],
        prepare: Callable[[], None],
        spend: Callable[[float], None] = lambda seconds: None,
    ) -> list[list[Answer]]:
        """From the log, and where it lacks any, from the model; `prepare` is called before, `spend`
        after each batch with the seconds it took."""
        scope = self.scope(attack, group)
        keys = [scope.key(prompt) for prompt in prompts]
        found = [self._log.get(key) for key in keys]
        if None not in found:
            return [answers for answers in found if answers is not None]
        prepare()
        # whole batches: what shares one is the same on a resume, unless the batch size is another
        target, size = self.target, self.target.batch_size
        starts = [i for i in range(0, len(prompts), size) if None in found[i : i + size]]
        title = f"{self.subject.name}: {group if group == HARMLESS else attack.label}"
        bar = tqdm(total=len(prompts), desc=title, unit="prompt", disable=self._quiet)
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
        scope = self.scope(attack, TRIAL)

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

    def scope(self, attack: Attack, group: str) -> Scope:
        """Settings hold all that an answer depends on beside model and prompt."""
        settings = self.settings
        fitted = [] if group == HARMLESS else [
            (prompt.turns, prompt.response)
            for prompt in (*self.prompts.fit_harmful, *self.prompts.fit_harmless)
        ]  # fmt: skip
        chosen = attack.settings.model_dump(mode="json", exclude={"label"})
        base = self._base_subject.key if attack.needs_base and self._base_subject else ""
        more = [base] if base else []
        if type(attack).prepare is not Attack.prepare:  # it may search, by the judge's verdicts
            more.append(self._judge.identity)
            if any(prompt.response is not None for prompt in self.prompts.fit_harmful):
                more.append(f"by reference: {self.prompts.by_reference}")
        return Scope(
            model=self.subject.name,
            fingerprint=self.subject.key,
            group=group,
            attack=attack.label,
            settings=hash_of(attack.name, chosen, settings.max_new_tokens, fitted, *more),
            seed=settings.seed,
        )


def subject_answers(
    subjects: Sequence[Subject],
    prompts: EvaluationPrompts,
    settings: EvaluateConfig,
    folder: RunFolder,
    log: AnswerLog,
    judge: Judge,
    *,
    ranks: int = 1,
    quiet: bool = False,
) -> list[SubjectAnswers]:
    """One per model; the first that is loaded says how long all of it will take.

    Args:
        ranks: that share the work.
        quiet: says nothing.
    """
    base = next((subject for subject in subjects if subject.name == BASE), None)

    def loaded(target: Target) -> None:
        if not quiet:
            announce(target)

    found = [
        SubjectAnswers(
            subject, prompts, settings, folder, log, judge, None if subject is base else base,
            loaded=loaded, quiet=quiet,
        )
        for subject in subjects
    ]  # fmt: skip
    missing = [part.missing() for part in found]
    announce = announcement(missing, prompts=len(prompts.harmful), ranks=ranks)
    return found


def _saved_record(path: Path, key: str) -> dict[str, Any]:
    """`summary` and `seconds` of an attack that was prepared before under this key."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if record.pop("key", None) != key:
        return {}
    return record


def hash_of(*parts: Any) -> str:
    """24 hexadecimal digits over plain values."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
