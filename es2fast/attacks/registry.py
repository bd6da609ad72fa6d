"""Attacks by name: the library's own, and those that other packages bring.

A package offers an attack by an entry point in the group `es2fast.attacks` whose name is the
attack's and whose value is a subclass of `Attack`. Modules are imported when they are asked for.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from es2fast.attacks.base import Attack
from es2fast.errors import UserError

GROUP = "es2fast.attacks"
BUILT_IN = {
    "direct": "es2fast.attacks.direct:Direct",
    "scav": "es2fast.attacks.states.scav:Scav",
    "mean_difference": "es2fast.attacks.states.mean_difference:MeanDifference",
    "repe": "es2fast.attacks.states.repe:RepE",
    "replacement": "es2fast.attacks.states.replacement:Replacement",
    "prefill": "es2fast.attacks.prompts.prefill:Prefill",
    "sampling": "es2fast.attacks.prompts.sampling:Sampling",
    "template": "es2fast.attacks.prompts.template:Template",
    "roleplay": "es2fast.attacks.prompts.roleplay:Roleplay",
    "artifacts": "es2fast.attacks.prompts.artifacts:Artifacts",
    "transcript": "es2fast.attacks.prompts.transcript:Transcript",
    "soft_prompt": "es2fast.attacks.prompts.soft_prompt:SoftPrompt",
    "latent_pgd": "es2fast.attacks.states.latent_pgd:LatentPgd",
    "gcg": "es2fast.attacks.prompts.gcg:Gcg",
    "ablation": "es2fast.attacks.states.ablation:Ablation",
    "ablation_weights": "es2fast.attacks.weights.ablation:AblationWeights",
    "finetune": "es2fast.attacks.weights.finetune:Finetune",
    "splice": "es2fast.attacks.weights.splice:Splice",
}


def attack_names() -> list[str]:
    """Every attack that can be named, the library's own first."""
    others = sorted({point.name for point in entry_points(group=GROUP)} - BUILT_IN.keys())
    return [*BUILT_IN, *others]


def attack_class(name: str) -> type[Attack]:
    """The class behind a name.

    Raises:
        UserError: no such attack; a package's entry point that cannot be loaded or is no attack.
    """
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return getattr(import_module(module), attribute)
    for point in entry_points(group=GROUP, name=name):
        try:
            found = point.load()
        except Exception as error:  # whatever another package raises while it is imported
            raise UserError(f"evaluate.attacks: {name!r} ({point.value}): {error}") from None
        if isinstance(found, type) and issubclass(found, Attack):
            return found
        raise UserError(f"evaluate.attacks: {name!r} ({point.value}) is not an es2fast Attack")
    names = attack_names()
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"
    raise UserError(f"evaluate.attacks: no attack {name!r}; {hint}")


def make_attack(entry: str | dict[str, Any], **defaults: Any) -> Attack:
    """A fresh, unprepared attack.

    Args:
        entry: its name, or a mapping of `name` and its settings.
        defaults: settings that are used where the attack has them, takes such a value (`steps` is
            a word for some attacks and a number for others) and the entry does not say otherwise.

    Raises:
        UserError: unknown name; a setting it does not have, or out of range.
    """
    given = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = given.pop("name", None)
    if not isinstance(name, str):
        raise UserError(
            f"evaluate.attacks: {entry!r} has no name; write an attack's name, or a mapping such "
            "as {name: scav, p0: 0.001}"
        )
    chosen = attack_class(name)
    known = chosen.Settings.model_fields
    usable = {key: value for key, value in defaults.items() if _takes(known.get(key), value)}
    try:
        return chosen(chosen.Settings.model_validate(usable | given))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, (name, *first["loc"])))
        hint = f"; known: {', '.join(known)}" if first["type"] == "extra_forbidden" else ""
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(
            f"evaluate.attacks: {key}: {message}, found {first['input']!r}{hint}"
        ) from None


def _takes(field: FieldInfo | None, value: Any) -> bool:
    """Whether a setting exists and `value` is of its kind."""
    if field is None or field.annotation is None:
        return False
    try:
        TypeAdapter(field.annotation).validate_python(value)
    except ValidationError:
        return False
    return True


def make_attacks(entries: Sequence[str | dict[str, Any]], **defaults: Any) -> list[Attack]:
    """All attacks of a list; see `make_attack`.

    Raises:
        UserError: as `make_attack`; two entries with the same label.
    """
    made = [make_attack(entry, **defaults) for entry in entries]
    labels = [attack.label for attack in made]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(
                f"evaluate.attacks: {label!r} is listed twice; give each a `label` of its own"
            )
    return made


def describe(name: str) -> tuple[str, list[tuple[str, str, str]]]:
    """What an attack does, in one line, and its settings: (name, default, meaning).

    Raises:
        UserError: no such attack.
    """
    found = attack_class(name)
    text = sys.modules[found.__module__].__doc__ or found.__doc__ or ""
    settings = [
        (key, "required" if field.is_required() else repr(field.default), field.description or "")
        for key, field in found.Settings.model_fields.items()
    ]
    return text.strip().splitlines()[0], settings
