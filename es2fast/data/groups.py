"""The harmful and harmless groups of a run, checked against each other.

Prompts are compared after `normalise_prompt`, over all turns but system messages.
- Duplicates inside a group are removed, the first stays.
- Training prompts that also occur in evaluation are removed from training and counted, and so are
  near duplicates of held-out prompts of their own side (`leakage`). Across the sides a small
  difference is the point: "kill a process" is a contrast to "kill a person", not a leak.
- Near duplicates inside a group are counted and stay.
- A prompt that is both harmful and harmless, in training or evaluation, is an error: the loss would
  push it away from itself, and every rate measured on it would mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

from es2fast.config import DataConfig, DataSource
from es2fast.data.leakage import near_duplicates, repeats
from es2fast.data.prompts import Prompt, read_source
from es2fast.data.sources import one_line
from es2fast.errors import UserError

MOST_COUNTED = 10_000  # prompts; near duplicates inside a larger group are not counted
GROUPS = ("harmful", "harmless", "eval_harmful", "eval_harmless")


@dataclass
class SourceReport:
    """What one source gave; cut: there are more rows than its `limit`."""

    field: str
    source: str
    rows: int
    blank: int
    column: str
    response_column: str | None
    responses: int
    labels: dict[str, int]
    cut: bool = False

    def line(self, shown: Callable[[str], str] = str) -> str:
        """One line; `shown`: how the source is named."""
        rows = f"{self.rows} rows"
        parts = [f"the first {rows} (limit)" if self.cut else rows, f"column {self.column!r}"]
        if self.responses:
            origin = f" in {self.response_column!r}" if self.response_column else ""
            parts.append(f"{self.responses} responses{origin}")
        if self.labels:
            parts.append("labels " + ", ".join(f"{k}: {v}" for k, v in sorted(self.labels.items())))
        if self.blank:
            parts.append(f"{self.blank} blank rows skipped")
        return f"{self.field} {shown(self.source)}: {'; '.join(parts)}"


@dataclass
class DataReport:
    """What was read, kept and removed; counts are per group name."""

    sources: list[SourceReport] = field(default_factory=list)
    kept: dict[str, int] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    leakage: dict[str, int] = field(default_factory=dict)
    near_leakage: dict[str, int] = field(default_factory=dict)
    near_example: dict[str, str] = field(default_factory=dict)  # the most similar pair removed
    near_inside: dict[str, int] = field(default_factory=dict)  # resemble an earlier one; kept
    borderline: int = 0  # of the harmless prompts

    def lines(
        self,
        shown: Callable[[str], str] = str,
        *,
        prompts: bool = True,
        held_out: bool | None = None,
    ) -> list[str]:
        """Text, one line per source and per group that is not empty.

        Args:
            shown: how sources are named.
            prompts: with an example of what was removed.
            held_out: of held-out prompts alone, or of the others; default: of both.
        """

        def wanted(name: str) -> bool:
            return held_out is None or ("eval_" in name) == held_out

        out = [source.line(shown) for source in self.sources if wanted(source.field)]
        for group in filter(wanted, GROUPS):
            removed = []
            if group == "harmless" and self.borderline:
                removed.append(f"{self.borderline} of them borderline")
            if self.duplicates.get(group):
                removed.append(f"{self.duplicates[group]} duplicates removed")
            if self.leakage.get(group):
                removed.append(f"{self.leakage[group]} removed that also occur in evaluation")
            if self.near_leakage.get(group):
                example = f", such as {self.near_example[group]}" if prompts else ""
                removed.append(
                    f"{self.near_leakage[group]} removed that nearly occur in evaluation{example}"
                )
            if self.near_inside.get(group):
                removed.append(f"{self.near_inside[group]} nearly repeat an earlier one, kept")
            if self.kept.get(group) or removed:
                notes = f" ({', '.join(removed)})" if removed else ""
                out.append(f"{group}: {self.kept.get(group, 0)} prompts{notes}")
        return out

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers, for JSON."""
        return asdict(self)


@dataclass
class PromptGroups:
    """Prompts in the order of their sources, held-out ones with every source's share in any
    beginning; duplicates and leaked training rows removed.

    The last `borderline` harmless prompts are those of `data.borderline`.
    """

    harmful: list[Prompt]
    harmless: list[Prompt]
    eval_harmful: list[Prompt]
    eval_harmless: list[Prompt]
    report: DataReport
    borderline: int = 0


def load_groups(config: DataConfig, *, need_train: bool = True) -> PromptGroups:
    """Reads every source and builds the four groups.

    Args:
        config: the `data` section.
        need_train: both training groups must have prompts; otherwise any group may be left out.

    Raises:
        UserError: an unreadable source (see `read_source`), no harmful or harmless prompts, or a
            prompt that is in both.
    """
    report = DataReport()
    found: dict[str, list[list[Prompt]]] = {name: [] for name in GROUPS}  # by source
    for name in GROUPS:
        for number, source in enumerate(getattr(config, name)):
            # of held-out harmless prompts the kinds are told apart
            side = None if name == "eval_harmless" else name.removeprefix("eval_")
            found[name].append(_read(source, f"data.{name}[{number}]", report, side=side)[0])
    borderline: set[str] = set()
    for number, source in enumerate(config.borderline):
        prompts = _read(source, f"data.borderline[{number}]", report, side="harmless")[0]
        found["harmless"].append(prompts)
        borderline |= {prompt.key for prompt in prompts}
    for prefix in ("", "eval_"):
        for number, source in enumerate(getattr(config, f"{prefix}labelled")):
            path = f"data.{prefix}labelled[{number}]"
            prompts, harmful = _read(source, path, report, labelled=True)
            for side, wanted in (("harmful", True), ("harmless", False)):
                own = [prompt for prompt, one in zip(prompts, harmful) if one == wanted]
                found[prefix + side].append(own)
    groups = {
        name: _mixed(lists) if name.startswith("eval_") else list(chain(*lists))
        for name, lists in found.items()
    }
    if need_train:
        _check_present(groups)
    for name in GROUPS:
        groups[name] = _without_duplicates(groups[name], name, report)
    _check_overlap(groups)
    _remove_leakage(groups, report)
    if config.near_duplicates is not None:
        _remove_near_leakage(groups, config.near_duplicates, report)
        _count_inside(groups, config.near_duplicates, report)
    report.kept = {name: len(groups[name]) for name in GROUPS}
    groups["harmless"].sort(key=lambda prompt: prompt.key in borderline)
    report.borderline = sum(prompt.key in borderline for prompt in groups["harmless"])
    return PromptGroups(**groups, report=report, borderline=report.borderline)


def _mixed(lists: Sequence[Sequence[Prompt]]) -> list[Prompt]:
    """Of several sources the prompts in an order whose every beginning has its share of each, so
    that `evaluate.limit` leaves no source out."""
    places = [
        ((place + 0.5) / len(prompts), number, prompt)
        for number, prompts in enumerate(lists)
        for place, prompt in enumerate(prompts)
    ]
    return [prompt for *_, prompt in sorted(places, key=lambda one: one[:2])]


def _read(
    source: DataSource,
    path: str,
    report: DataReport,
    labelled: bool = False,
    side: str | None = None,
) -> tuple[list[Prompt], list[bool]]:
    found = read_source(source, path, labelled, side)
    report.sources.append(
        SourceReport(
            field=path,
            source=source.source,
            rows=found.rows,
            blank=found.blank,
            column=found.column,
            response_column=found.response_column,
            responses=sum(prompt.response is not None for prompt in found.prompts),
            labels=found.labels,
            cut=found.cut,
        )
    )
    return found.prompts, found.harmful


def _check_present(groups: dict[str, list[Prompt]]) -> None:
    for name in ("harmful", "harmless"):
        if not groups[name]:
            raise UserError(
                f"data.{name}: no {name} prompts; give at least one source in data.{name}, "
                f"or a file with {name} rows in data.labelled"
            )


def _without_duplicates(prompts: list[Prompt], name: str, report: DataReport) -> list[Prompt]:
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.key, prompt)
    report.duplicates[name] = len(prompts) - len(first)
    return list(first.values())


def _check_overlap(groups: dict[str, list[Prompt]]) -> None:
    harmful = {p.key: p for p in (*groups["harmful"], *groups["eval_harmful"])}
    harmless = {p.key for p in (*groups["harmless"], *groups["eval_harmless"])}
    both = [prompt for key, prompt in harmful.items() if key in harmless]
    if both:
        raise UserError(
            f"data: {len(both)} prompt{'s are' if len(both) > 1 else ' is'} both harmful and "
            f"harmless, for example {one_line(both[0].text, 60)!r}; remove "
            f"{'them' if len(both) > 1 else 'it'} from one of the two groups"
        )


def _remove_leakage(groups: dict[str, list[Prompt]], report: DataReport) -> None:
    held_out = {p.key for p in (*groups["eval_harmful"], *groups["eval_harmless"])}
    for name in ("harmful", "harmless"):
        before = groups[name]
        groups[name] = [prompt for prompt in before if prompt.key not in held_out]
        report.leakage[name] = len(before) - len(groups[name])
        if before and not groups[name]:
            raise UserError(
                f"data.{name}: all {len(before)} prompts also occur in evaluation; "
                f"give data.eval_{name} other prompts"
            )


@dataclass(frozen=True)
class NearLeakage:
    """Prompts that nearly repeat a held-out one: those that do not, how many do, the most similar
    pair in words ("" where there is none)."""

    kept: list[Prompt]
    removed: int
    example: str


def without_near(
    prompts: Sequence[Prompt], held_out: Sequence[Prompt], threshold: float
) -> NearLeakage:
    """The prompts that are less similar than `threshold` to every held-out one, in order."""
    found = near_duplicates([p.key for p in prompts], [p.key for p in held_out], threshold)
    pairs = [(prompt, near) for prompt, near in zip(prompts, found) if near is not None]
    kept = [prompt for prompt, near in zip(prompts, found) if near is None]
    if not pairs:
        return NearLeakage(kept, 0, "")
    prompt, near = max(pairs, key=lambda pair: pair[1].similarity)
    other = held_out[near.place]
    example = f"{one_line(prompt.text, 60)!r} beside {one_line(other.text, 60)!r}"
    return NearLeakage(kept, len(pairs), example)


def _remove_near_leakage(
    groups: dict[str, list[Prompt]], threshold: float, report: DataReport
) -> None:
    for name in ("harmful", "harmless"):
        before = groups[name]
        found = without_near(before, groups[f"eval_{name}"], threshold)
        groups[name] = found.kept
        report.near_leakage[name] = found.removed
        if not found.removed:
            continue
        report.near_example[name] = found.example
        if not groups[name]:
            raise UserError(
                f"data.{name}: all {len(before)} prompts nearly occur in evaluation, such as "
                f"{report.near_example[name]}; give data.eval_{name} other prompts, or set "
                f"data.near_duplicates: null (now {threshold:g})"
            )


def _count_inside(groups: dict[str, list[Prompt]], threshold: float, report: DataReport) -> None:
    for name in GROUPS:
        if len(groups[name]) <= MOST_COUNTED:
            found = repeats([prompt.key for prompt in groups[name]], threshold)
            report.near_inside[name] = sum(near is not None for near in found)
