"""What every attack is: it prepares itself on the model under attack, then answers prompts.

    attack.prepare(target)                 fit, search, train: on training prompts only
    attack.answers(target, prompts)        what the model says under the attack, prompt by prompt

An attack changes the model only while it is asked something (hooks and weights are put back
whatever happens), takes no decision from held-out prompts, and is deterministic in its settings and
the target's seed. Its settings are a pydantic class of its own, so `evaluate.attacks` is checked
before a model is loaded; a setting that names a file has the file's hash beside it, so that answers
in the log belong to its content. `es2fast.attacks.registry` finds attacks by name, those of other
packages too.

What an attacker tries out before choosing (blocks, strengths) goes through `Target.trial`: the
answers are kept like all others, so a search that was interrupted goes on, and its curve can be
drawn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor, nn

from es2fast.data import Formatter, Prompt
from es2fast.judges.base import Judge, Verdict
from es2fast.modeling.batch_size import halving
from es2fast.modeling.generate import generate_rows
from es2fast.modeling.states import last_token_states
from es2fast.modeling.taps import blocks
from es2fast.progress import tqdm

T = TypeVar("T")
GRADIENT_PASSES = 3  # forward, and about twice that backward
STATES_BATCH = 32  # prompts per pass when states are collected
TRIAL_TOKENS = 64  # answers by which an attacker chooses are no longer


def _as_list(given: Any) -> Any:
    return list(given) if isinstance(given, list | tuple) else [given]


OneOrSeveral = BeforeValidator(_as_list)  # of a list setting: a single value stands for its list


class AttackSettings(BaseModel):
    """What an attack can be told in `evaluate.attacks`, beside its name."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    label: str | None = Field(
        None,
        pattern=r"^[\w.-]+$",
        description="name in the report; needed when an attack is listed twice",
    )


@dataclass(frozen=True)
class Answer:
    """One answer to one prompt.

    text: without special tokens; parameters: which variant of the attack it is; sample: which of
    several tries of that variant; info: numbers that were measured on the way.
    """

    text: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    sample: int = 0
    info: Mapping[str, Any] = field(default_factory=dict)


class Cost(NamedTuple):
    """What an attack asks of a model: answers generated, passes over a prompt beside them (a step
    by gradient counts as `GRADIENT_PASSES`), and answers of trials, of `TRIAL_TOKENS` at most."""

    answers: float
    passes: float = 0.0
    trials: float = 0.0


# (what is tried, its parameters, the training prompts, how to get the answers) -> the answers
Recorder = Callable[
    [str, Mapping[str, Any], Sequence[Prompt], Callable[[], list[Answer]]], list[Answer]
]


@dataclass
class Target:
    """A model under attack, and what its attacker has.

    model: a causal language model in eval mode on its device; formatter: its chat format; harmful,
    harmless: training prompts of the two groups; judge: how the attacker tells success;
    max_new_tokens, batch_size: of every answer, trials' may end before; halves: less memory than a
    batch needs halves batch_size, see `fitted`; seed: of whatever an attack draws; by_reference: a
    training prompt's response is what counts as success, as with the held-out ones; recorder: keeps
    the answers of trials; name: the model's in the report; title: the same on progress bars, None
    for no bars; load_base: loads the base model this one was tuned from, None where there is none.
    """

    model: nn.Module
    formatter: Formatter
    harmful: Sequence[Prompt]
    harmless: Sequence[Prompt]
    judge: Judge
    max_new_tokens: int = 256
    batch_size: int = 32
    halves: bool = False
    seed: int = 0
    by_reference: bool = True
    recorder: Recorder | None = None
    name: str = "model"
    title: str | None = None
    load_base: Callable[[], nn.Module] | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        return len(blocks(self.model))

    @property
    def states_batch(self) -> int:
        """Prompts per pass when states are collected."""
        return min(STATES_BATCH, self.batch_size) if self.halves else STATES_BATCH

    def fitted(self, work: Callable[[], T]) -> T:
        """`work()`; where a GPU's memory does not suffice, again with half the batch size.

        Raises:
            UserError: it does not suffice for one row, or for the number that the user asked for.
        """

        def sized(rows: int) -> T:
            self.batch_size = rows
            return work()

        return halving(sized, self.batch_size, automatic=self.halves)[0]

    @cached_property
    def states(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Block outputs at the last prompt token of the training prompts, harmful and harmless:
        layer -> (n, H) fp32 on the CPU."""
        return self.fitted(lambda: (self._states(self.harmful), self._states(self.harmless)))

    def _states(self, prompts: Sequence[Prompt]) -> dict[int, Tensor]:
        batches = self.formatter.prompt_batches(prompts, self.states_batch)
        bar = self.progress(batches, "states of training prompts")
        return last_token_states(self.model, bar, list(range(self.depth)))

    def progress(self, items: Sequence[Any], what: str, unit: str = "batch") -> Any:
        """`items` behind a progress bar that says which model and what is being done."""
        return tqdm(
            items, f"{self.title}: {what}", unit=unit, disable=self.title is None or not items
        )

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """Greedy answers of the model as it is now, `batch_size` prompts at a time."""
        return self.generate_rows([self.formatter.prompt_ids(prompt) for prompt in prompts])

    def generate_rows(
        self,
        rows: Sequence[Sequence[int]],
        *,
        repetition_penalty: float = 1.0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        shown: Sequence[int] | None = None,
    ) -> list[str]:
        """Continuations of rows of token ids, `batch_size` rows at a time; greedy at temperature 0.

        shown: per row, how many of its last ids are part of the text; default: none. The others as
        in `modeling.generate.generate_rows`.
        """
        found: list[str] = []
        for start in range(0, len(rows), self.batch_size):
            found += generate_rows(
                self.model,
                self.formatter,
                rows[start : start + self.batch_size],
                max_new_tokens=self.max_new_tokens,
                device=self.device,
                repetition_penalty=repetition_penalty,
                temperature=temperature,
                top_p=top_p,
                seed=seed + start,
                shown=None if shown is None else shown[start : start + self.batch_size],
            )
        return found

    def trial(
        self,
        name: str,
        parameters: Mapping[str, Any],
        prompts: Sequence[Prompt],
        answer: Callable[[], list[Answer]],
        *,
        whole: bool = False,
    ) -> Trial:
        """What an attacker gets out of training prompts with one choice of `parameters`.

        Args:
            name: of the attack.
            parameters: the choice.
            prompts: training prompts.
            answer: one answer per prompt, of `TRIAL_TOKENS` at most; not called where the answers
                are known already.
            whole: they are as long as held-out ones, where the attack makes the model say a
                sentence first, behind which it may still refuse.
        """

        def fitting() -> list[Answer]:
            length = self.max_new_tokens
            self.max_new_tokens = length if whole else min(length, TRIAL_TOKENS)
            try:
                return self.fitted(answer)
            finally:
                self.max_new_tokens = length

        found = fitting() if self.recorder is None else self.recorder(
            name, parameters, prompts, fitting
        )  # fmt: skip
        return Trial(dict(parameters), found, self.verdicts(prompts, [a.text for a in found]))

    def verdicts(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Verdict]:
        """The judge's verdict on each answer."""
        wanted = [prompt.response if self.by_reference else None for prompt in prompts]
        return self.judge.verdicts(
            [(prompt.text, text, one) for prompt, text, one in zip(prompts, texts, wanted)]
        )


@dataclass
class Trial:
    """One choice of parameters and how it ended on training prompts."""

    parameters: dict[str, Any]
    answers: list[Answer]
    verdicts: list[Verdict]

    def rate(self, verdict: Verdict) -> float:
        """Share of the answers with this verdict, 0..1."""
        return self.verdicts.count(verdict) / max(len(self.verdicts), 1)

    @property
    def useful(self) -> float:
        """Share of useful answers, 0..1."""
        return self.rate("useful")


class Attack(ABC):
    """One attack. Subclasses have a `name`, a `Settings` class and the two methods below."""

    name: ClassVar[str]
    Settings: ClassVar[type[AttackSettings]] = AttackSettings
    needs_base: ClassVar[bool] = False  # its answers depend on `Target.load_base`'s model, too

    def __init__(self, settings: AttackSettings):
        self.settings = settings

    @property
    def label(self) -> str:
        """What the report calls it."""
        return self.settings.label or self.name

    def coverage(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What the report tells about how the attack fits the held-out prompts; JSON values.

        Asked before `prepare` by whoever knows these prompts; no decision may follow from it.

        Raises:
            UserError: the attack has nothing for any of them.
        """
        return {}

    def cost(self, target: Target, prompts: int) -> Cost:
        """What `prepare` and the answers to `prompts` held-out prompts take at most, roughly: for
        the time that is announced. Asked before `prepare`; default: one answer each."""
        return Cost(prompts)

    def prepare(self, target: Target) -> None:  # noqa: B027, an attack may have nothing to prepare
        """Everything that is done once per model, on training prompts."""

    @abstractmethod
    def answers(self, target: Target, prompts: Sequence[Prompt]) -> list[list[Answer]]:
        """Per prompt, the answers under the attack; one batch of prompts at a time.

        Several answers are variants of the attack or several tries; the report counts a prompt as
        broken when one of them is useful, and says how many there were.
        """

    def applied(self, model: nn.Module) -> AbstractContextManager[Any] | None:
        """The prepared attack in place, while the context lasts, for whoever uses the model; None
        where it consists in what is asked."""
        return None

    def state(self) -> Any:
        """What `prepare` found, for the attack's copies in other processes: plain values, tensors,
        dataclasses. Default: all attributes but the settings."""
        return {name: value for name, value in vars(self).items() if name != "settings"}

    def restore(self, state: Any, target: Target) -> None:
        """Takes over what `state` gave, in place of `prepare`.

        Args:
            state: its tensors are on the CPU, or on `target`'s device.
        """
        vars(self).update(state)

    def summary(self) -> dict[str, Any]:
        """What the report tells about the attack beside its rates; JSON values."""
        return {}
