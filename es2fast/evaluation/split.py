"""Which prompts rates are measured on, and which are the attacker's, when both are in one file."""

from __future__ import annotations

from collections.abc import Sequence

from es2fast.config import EvaluateConfig
from es2fast.data import Prompt, PromptGroups
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
