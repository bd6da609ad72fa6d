"""Which rows a rank gets in which optimizer step."""

from __future__ import annotations

from torch import nn

from es2fast.data import MicroBatch, Prompt, collate
from es2fast.data.sources import one_line
from es2fast.distributed.runtime import Runtime
from es2fast.training.plan import Plan
from es2fast.training.refusals import AnchorTexts, RefusalAnchor
from es2fast.training.responses import first_weights, trained_rows
from es2fast.training.teacher_cache import TeacherCache
from es2fast.training.update_filter import filter_rows, filter_update


class Feed:
    """One rank's micro-batches of every optimizer step.

    Args:
        plan: the run, with its harmful prompts.
        harmless: all harmless training prompts, with their responses.
        rank: whose.
        texts: the refusal anchor's, if there is one.
        teacher: what was kept of the base model, if it does not run during the training.
    """

    def __init__(
        self,
        plan: Plan,
        harmless: list[Prompt],
        rank: int,
        texts: AnchorTexts | None = None,
        teacher: TeacherCache | None = None,
    ):
        self._plan, self._texts, self._teacher = plan, texts, teacher
        self._formatter, self._positions = plan.formatter, plan.config.kl.positions
        self._first_tokens = plan.config.kl.first_tokens
        self._first_weights = first_weights(plan.config, harmless)
        self._harmful, self._harmless = plan.groups.harmful, harmless
        self._rows = trained_rows(plan.config, harmless)
        by_length = plan.config.train.length_window > 1
        lengths = plan.row_lengths([harmless[i] for i in self._rows]) if by_length else None
        self._sampler = plan.sampler(rank, lengths, self._rows)
        self._anchor: RefusalAnchor | None = None
        if texts is not None:
            self._anchor = RefusalAnchor(
                plan.config, plan.formatter, self._harmful, texts, harmless
            )

    @property
    def left_out_line(self) -> str:
        """What `data.refused` leaves out, in words; empty: nothing."""
        count = len(self._harmless) - len(self._rows)
        if not count:
            return ""
        return (
            f"left out of training: {count} of {len(self._harmless)} harmless prompts, which the "
            "base model refuses (data.refused: drop)"
        )

    def __call__(self, step: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step `step`, from 0."""
        batches = []
        for (a, b), places in zip(self._sampler.indices(step), self._sampler.places()):
            batch = self._batch(step, a, [self._rows[i] for i in b])
            batch.places = places
            batches.append(batch)
        return batches

    def filter(self, student: nn.Module, runtime: Runtime) -> None:
        """Filters the trained LoRA update on the rows of the run (`train.update_filter`)."""
        rows = filter_rows(self._plan, self._harmless, self._texts)
        strength = self._plan.config.train.update_filter
        filter_update(student, self._formatter, *rows, strength, runtime)

    def names(self, step: int) -> list[list[str]]:
        """Per micro-batch of a step its rows, harmful ones first: where they are from."""
        return [
            [
                *(f"harmful prompt {i + 1} {one_line(self._harmful[i].text, 40)!r}" for i in a),
                *(
                    f"harmless prompt {self._rows[i] + 1} "
                    f"{one_line(self._harmless[self._rows[i]].text, 40)!r}"
                    for i in b
                ),
            ]
            for a, b in self._sampler.indices(step)
        ]

    def _batch(self, step: int, harmful: list[int], harmless: list[int]) -> MicroBatch:
        anchor = self._anchor
        batch = collate(
            self._formatter,
            [self._harmful[i] for i in harmful],
            [self._harmless[i] for i in harmless],
            self._positions,
            None if anchor is None else [anchor.row(step, i) for i in harmful],
            1.0 if anchor is None else anchor.decay,
            ([self._first_weights[i] for i in harmless], self._first_tokens),
        )
        if self._teacher is not None:
            batch.teacher = self._teacher.tokens(harmless)
        return batch
