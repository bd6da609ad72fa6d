"""From a model's name to a whole run: recipes, prompt files, overrides.

A recipe is a YAML file of `es2fast.config` that holds only what differs from the library's
defaults; `recipes/default.yaml` names public prompt sets too. Later ones win:

    recipe < recipes/quick.yaml (with --quick) < prompt files (--harmful ...) < key=value

Over a recipe of the user's own --quick lays the smaller numbers alone, no prompts and no attacks.

Prompts have five roles. A file takes the place of the recipe's sources of its role, but for
built-in prompts, and keeps their `limit`; where its rows are labelled, those of its role's side are
read. Borderline prompts, which
look harmful and are not, are `data.borderline`, and held out those of `kind: borderline` in
`data.eval_harmless`; one file serves both, every other row each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from es2fast.config import Config, DataSource, load_config, merged, parse_config, read_yaml
from es2fast.data.builtin import PREFIX
from es2fast.errors import UserError
from es2fast.report.model_card import public_name

RECIPES = Path(__file__).parent / "recipes"
BORDERLINE = "borderline"
NONE = "none"  # for --borderline: do without
ROLES = {  # option -> the groups of `data` that it fills
    "harmful": ("harmful",),
    "harmless": ("harmless",),
    BORDERLINE: (BORDERLINE, "eval_harmless"),
    "eval-harmful": ("eval_harmful",),
    "eval-harmless": ("eval_harmless",),
}
_NAMED = {"model": {"name": "model"}}  # a recipe names none
_HALVES = {BORDERLINE: "::2", "eval_harmless": "1::2"}  # rows of a borderline file
_PLACE = re.compile(r"data\.(\w+)\[(\d+)\]")


def resolve(
    model: str,
    out: Path,
    *,
    recipe: Path | None = None,
    quick: bool = False,
    files: Mapping[str, Sequence[str]] | None = None,
    overrides: Sequence[str] = (),
    single: bool = False,
) -> Config:
    """The run that hardens `model` into `out`.

    Args:
        model: folder or Hugging Face id.
        out: the run's folder.
        recipe: in place of `recipes/default.yaml`.
        quick: lay `recipes/quick.yaml` over it, or over `recipe` what makes that less.
        files: prompt files or dataset ids by role, see `ROLES`.
        overrides: `key=value`, applied last.
        single: the model is one run's and not a mean, which the built-in recipe's
            `train.update_scale` is for.

    Raises:
        UserError: an unreadable recipe, an unknown key, a value out of range.
    """
    _check_overrides(overrides, model, out)
    raw = read_yaml(recipe or RECIPES / "default.yaml", "--recipe")
    if quick:
        less = read_yaml(RECIPES / "quick.yaml")
        raw = merged(raw, less if recipe is None else _less(parse_config(raw | _NAMED), less))
    if recipe is None and (quick or single):
        raw["train"].pop("update_scale")
    raw = merged(raw, {"model": {"name": model}, "data": {}, "output_dir": str(out)})
    data = parse_config(raw).data
    chosen = {role: places for role, places in (files or {}).items() if places}
    for group in dict.fromkeys(group for role in chosen for group in ROLES[role]):
        sources = _replaced(group, getattr(data, group), chosen)
        raw["data"][group] = [source.model_dump(exclude_defaults=True) for source in sources]
    return load_config(raw, overrides)


def _check_overrides(overrides: Sequence[str], model: str, out: Path) -> None:
    """What has an argument or option of its own is given by that."""
    for item in overrides:
        key = item.partition("=")[0].strip()
        if key == "model.name":
            raise UserError(f"{item}: the model is {model!r}, the first argument; leave it out")
        if key == "output_dir":
            raise UserError(f"{item}: the folder is {str(out)!r}; give --out in place of it")


def _less(config: Config, quick: Mapping[str, Any]) -> dict[str, Any]:
    """Of the numbers of a section that `quick` has those that are below the configuration's."""
    found: dict[str, Any] = {}
    for section, values in quick.items():
        for key, value in values.items():
            if isinstance(value, int) and value < getattr(getattr(config, section), key):
                found.setdefault(section, {})[key] = value
    return found


def default_out(model: str) -> Path:
    """runs/NAME-hardened."""
    name = re.sub(r"[^\w.-]+", "-", public_name(model).rpartition("/")[2])
    return Path("runs") / f"{name}-hardened"


@contextmanager
def telling_options(config: Config) -> Iterator[None]:
    """Says which options take files when one of the public sets cannot be loaded."""
    try:
        yield
    except UserError as error:
        if not _PLACE.match(str(error)) or "could be loaded" not in str(error):
            raise
        forms = {BORDERLINE: f"--{BORDERLINE} FILE|builtin:borderline|{NONE}",
                 "harmless": "--harmless FILE|builtin:ordinary"}  # fmt: skip
        options = [forms.get(role, f"--{role} FILE") for role in _remote_roles(config)]
        raise UserError(f"{error}; offline, give files: {' '.join(options)}") from None


def role_of(group: str, source: DataSource) -> str:
    """The option that a source of `data.GROUP` belongs to."""
    return BORDERLINE if source.kind == BORDERLINE else group.replace("_", "-")


def _replaced(
    group: str, sources: Sequence[DataSource], chosen: Mapping[str, Sequence[str]]
) -> list[DataSource]:
    """The sources of one group, files in place of those whose role has any."""
    found: list[DataSource] = []
    for role in dict.fromkeys((group.replace("_", "-"), BORDERLINE)):
        own = [source for source in sources if role_of(group, source) == role]
        given = role in chosen and group in ROLES[role]
        found += _files(role, group, own, chosen[role]) if given else own
    return found


def _files(
    role: str, group: str, own: Sequence[DataSource], places: Sequence[str]
) -> list[DataSource]:
    if role == BORDERLINE and NONE in places:
        if len(places) > 1:
            raise UserError(f"--{BORDERLINE}: {NONE!r} stands alone; leave it or the files out")
        return []
    kept: dict[str, Any] = {"limit": own[0].limit} if own else {}
    kept["side"] = "harmful" if role.endswith("harmful") else "harmless"
    if role == BORDERLINE:
        kept |= {"kind": BORDERLINE, "rows": _HALVES[group]}
    stay = [source for source in own if source.source.startswith(PREFIX)]
    told_apart = role == "eval-harmless"
    return [
        *(DataSource(source=place, **kept | ({"kind": _stem(place)} if told_apart else {}))
          for place in places),
        *stay,
    ]  # fmt: skip


def _stem(place: str) -> str:
    """A file's or data set's own name, by which its prompts are told apart in a report."""
    if place.startswith(PREFIX):
        return place.removeprefix(PREFIX)
    return Path(place if Path(place).exists() else place.partition(":")[0]).stem


def _remote_roles(config: Config) -> list[str]:
    """Roles with a source that is no file or folder here, in the order of `ROLES`."""
    remote = {
        role_of(group, source)
        for group in ("harmful", "harmless", BORDERLINE, "eval_harmful", "eval_harmless")
        for source in getattr(config.data, group)
        if not source.source.startswith(PREFIX) and not Path(source.source).expanduser().exists()
    }
    return [role for role in ROLES if role in remote]
