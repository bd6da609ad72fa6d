"""Which prompts rates are measured on, and which are the attacker's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from es2fast.config import Config, DataConfig, EvaluateConfig
from es2fast.data import Prompt, PromptGroups, load_groups
from es2fast.data.groups import without_near
from es2fast.errors import UserError
from es2fast.evaluation.answering import EvaluationPrompts
from es2fast.probing.choose import FEWEST


def split_prompts(
    groups: PromptGroups, settings: EvaluateConfig, near_duplicates: float | None
) -> tuple[EvaluationPrompts, list[str]]:
    """What rates are measured on and what is the attacker's, and what to tell about it.

    Held-out rows come first in their files. Without training prompts what is left of them, or else
    half, is the attacker's, but for rows that nearly repeat a held-out one of the same file: an
    attack fitted on these would have seen its test.

    Args:
        near_duplicates: similarity from which on rows nearly repeat, see `data.leakage`; None: only
            equal ones count, which `load_groups` has removed.

    Raises:
        UserError: too few prompts of a group.
    """
    found: dict[str, Sequence[Prompt]] = {}
    notes: list[str] = []
    for name in ("harmful", "harmless"):
        held_out, fit = getattr(groups, f"eval_{name}"), getattr(groups, name)
        removed = ""
        if not fit:
            count = min(settings.limit, max(len(held_out) - settings.fit_limit, len(held_out) // 2))
            held_out, fit = held_out[:count], held_out[count:]
            if near_duplicates is not None:
                kept = without_near(fit, held_out, near_duplicates)
                if kept.removed:
                    removed = (
                        f"{kept.removed} of the {len(fit)} further rows nearly repeat a held-out "
                        f"one, such as {kept.example}, and are kept from the attacker"
                    )
                    notes.append(f"{name}: {removed}")
                fit = kept.kept
        if len(held_out) < 2 or len(fit) < FEWEST:
            raise UserError(
                f"--{name}: {len(held_out)} prompts to measure and {len(fit)} for the attacker; "
                f"at least 2 and {FEWEST} are needed: give a longer file, or --fit-{name} FILE"
                + (f" ({removed})" if removed else "")
            )
        found[name] = held_out[: settings.limit]
        found[f"fit_{name}"] = fit[: settings.fit_limit]
    return EvaluationPrompts(**found), notes


def attackers_prompts(config: Config, harmful: Sequence[Prompt]) -> list[Prompt]:
    """Of a run's harmful training prompts those that attacks are fitted on. Where the run's
    responses are refusals (`refusal.source: column`) these are left out: no attacker wants them."""
    chosen = harmful[: config.evaluate.fit_limit]
    if config.refusal.source == "column":
        return [replace(prompt, response=None) for prompt in chosen]
    return list(chosen)


def replacing(files: Mapping[str, Sequence[str]]) -> list[str]:
    """Overrides that put files in place of all that a run's configuration names for the same
    prompts. Of a file with labels the rows of its side are read.

    Args:
        files: by `data.harmful`, `data.harmless`, `data.eval_harmful` and `data.eval_harmless`.
    """
    found = []
    for key, places in files.items():
        side = "harmful" if key.endswith("harmful") else "harmless"
        found.append(f"{key}={json.dumps([{'source': one, 'side': side} for one in places])}")
    for prefix in ("data.", "data.eval_"):
        if {f"{prefix}harmful", f"{prefix}harmless"} <= files.keys():
            found.append(f"{prefix}labelled=[]")
    if "data.harmless" in files:
        found.append("data.borderline=[]")
    return found


def check_replaced(data: DataConfig, overrides: Sequence[str]) -> None:
    """UserError where an override replaces the prompts of one side and a source of both kinds adds
    the run's own to them."""
    keys = {item.partition("=")[0].strip() for item in overrides}
    for prefix in ("", "eval_"):
        sides = {f"data.{prefix}{side}" for side in ("harmful", "harmless")}
        one = sides & keys
        if getattr(data, f"{prefix}labelled") and one and f"data.{prefix}labelled" not in keys:
            raise UserError(
                f"{sorted(one)[0]}: replaced, but data.{prefix}labelled of the run has prompts of "
                f"this side too; replace both sides, or set data.{prefix}labelled=[]"
            )


def without_learnt(
    groups: PromptGroups, config: Config, saved: Config
) -> tuple[PromptGroups | None, list[str]]:
    """What a run was trained on, and what to tell about it; see `leave_out_learnt`.

    Args:
        groups: of the evaluation; what was learnt is taken out of the held-out prompts.
        config, saved: of the evaluation and of the run.

    Returns:
        the run's own groups; None where its files can no longer be read, which is told.
    """
    if config.data == saved.data:
        return groups, []
    try:
        learnt = load_groups(saved.data)
    except UserError as error:
        return None, [f"whether the run was trained on held-out prompts is not known: {error}"]
    return learnt, leave_out_learnt(groups, learnt, config, saved)


def leave_out_learnt(
    groups: PromptGroups, learnt: PromptGroups, config: Config, saved: Config
) -> list[str]:
    """Takes prompts that a run was trained on, and near duplicates of these, out of the held-out
    ones, in place; says how many.

    Args:
        groups: of the evaluation, whose sources are others than the run's.
        learnt: the run's own.
        config, saved: of the evaluation and of the run.

    Raises:
        UserError: nothing is left.
    """
    notes = []
    for name in ("harmful", "harmless"):
        held_out, known = getattr(groups, f"eval_{name}"), getattr(learnt, name)
        keys = {prompt.key for prompt in (*learnt.harmful, *learnt.harmless)}
        kept = [prompt for prompt in held_out if prompt.key not in keys]
        if (threshold := config.data.near_duplicates) is not None:
            kept = without_near(kept, known, threshold).kept
        if not kept:
            raise UserError(
                f"data.eval_{name}: the run was trained on all {len(held_out)} prompts, or nearly; "
                f"give --{name} FILE with others"
            )
        if len(kept) < len(held_out):
            notes.append(
                f"data.eval_{name}: {len(held_out) - len(kept)} of {len(held_out)} prompts are "
                "left out, since the run was trained on them, or on near duplicates"
            )
        setattr(groups, f"eval_{name}", kept)
        if getattr(config.data, name) == getattr(saved.data, name):
            setattr(groups, name, known)  # what `load_groups` took out was learnt all the same
    return notes
