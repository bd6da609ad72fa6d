"""Judges by name: `evaluate.judge`.

| name                                  | judge                                              |
|---------------------------------------|----------------------------------------------------|
| rules, rules:LIST                     | phrases (`rules`), ours or a published list         |
| rules+ppl:MODEL, rules:LIST+ppl:MODEL | and gibberish by perplexity (`perplexity`)          |
| rules+ppl, rules:LIST+ppl             | the same by the base model (`with_base`)            |
| hf:MODEL, hf:MODEL:PRESET             | a judge model on this machine (`classifier`)        |
| openai:URL#MODEL                      | an OpenAI-compatible server (`endpoint`)            |
| any other                             | an entry point in the group `es2fast.judges`        |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from es2fast.config import Config
from es2fast.errors import UserError
from es2fast.judges.base import Judge
from es2fast.judges.cached import CachedJudge
from es2fast.judges.rules import OWN_LIST, RulesJudge

GROUP = "es2fast.judges"
BY_BASE = re.compile(r"rules(:[^+]*)?\+ppl")  # a judge whose model is the base model
FORMS = ("rules", "rules:LIST", "rules+ppl[:MODEL]", "hf:MODEL[:PRESET]", "openai:URL#MODEL")


def make_judge(name: str) -> Judge:
    """The judge of that name: one of the library's, or one of another package (an entry point in
    the group `es2fast.judges` whose value makes a `Judge` when called).

    Raises:
        UserError: no such judge, list or preset; `rules+ppl` without a model.
    """
    if BY_BASE.fullmatch(name):
        raise UserError(
            f"evaluate.judge: {name}: there is no base model to ask; give one (--base) or name a "
            f"model, {name}:MODEL"
        )
    rules = re.fullmatch(r"rules(?::([^+]*))?(?:\+ppl:(.+))?", name)
    if rules:
        return _rules(rules[1], rules[2])
    kind, _, rest = name.partition(":")
    if kind == "hf" and rest:
        return _classifier(rest)
    if kind == "openai" and rest:
        from es2fast.judges.endpoint import EndpointJudge

        url, _, model = rest.partition("#")
        return EndpointJudge(url, model)
    points = entry_points(group=GROUP)
    for point in points:
        if point.name == name:
            return point.load()()
    names = ", ".join([*FORMS, *sorted(point.name for point in points)])
    raise UserError(f"evaluate.judge: no judge {name!r}; there are {names}")


def with_base(names: str | Sequence[str], base: str | None) -> list[str]:
    """The names of judges, `+ppl` without a model asking the base model, where there is one.

    Args:
        names: one name, several with commas between them, or a list of names.
        base: folder or Hugging Face id.
    """
    if not base:
        return _split(names)
    return [f"{name}:{base}" if BY_BASE.fullmatch(name) else name for name in _split(names)]


def judges_of(config: Config, base: str | None) -> str | list[str]:
    """`evaluate.judge`, with the base model's name where it is asked for.

    Raises:
        UserError: more than the name is needed to load that model.
    """
    named = config.evaluate.judge
    full = with_base(named, base)
    if full == _split(named):
        return named
    given = {
        "model.revision": config.model.revision,
        "model.trust_remote_code": config.model.trust_remote_code,
        "evaluate.device_map": config.evaluate.device_map,
    }
    for field, value in given.items():
        if value:
            raise UserError(
                f"evaluate.judge: +ppl loads the base model by its name alone, and {field} is "
                f"{value!r}; name another model, rules+ppl:MODEL"
            )
    return full


def describe() -> list[str]:
    """What `evaluate.judge` can be, one line each."""
    from es2fast.judges.presets import PRESETS
    from es2fast.judges.rules import phrase_lists

    lists = ", ".join(phrase_lists())
    return [
        f"rules                  phrases and repetition; rules:LIST with LIST one of {lists}",
        "rules+ppl[:MODEL]      and gibberish by its perplexity under a model; default: the base",
        f"hf:MODEL[:PRESET]      a judge model on this machine; PRESET: {', '.join(PRESETS)}",
        "openai:URL#MODEL       an OpenAI-compatible server, such as http://localhost:8000/v1",
        *(point.name for point in entry_points(group=GROUP)),
    ]


def make_judges(names: str | Sequence[str], verdicts: Path | None = None) -> list[Judge]:
    """Several judges; the first decides.

    Args:
        names: one name, several with commas between them, or a list of names.
        verdicts: file in which the verdicts of slow judges are kept; None: they are not.

    Raises:
        UserError: no such judge; none at all; one that is named twice.
    """
    wanted = [name for name in _split(names) if name]
    if not wanted:
        raise UserError("evaluate.judge: none given; rules is the default")
    made = [make_judge(name) for name in wanted]
    for judge in made:
        if [other.name for other in made].count(judge.name) > 1:
            raise UserError(f"evaluate.judge: {judge.name!r} is named twice; name each once")
    if verdicts is None:
        return made
    return [CachedJudge(judge, verdicts) if judge.slow else judge for judge in made]


def _split(names: str | Sequence[str]) -> list[str]:
    parts = names.split(",") if isinstance(names, str) else names
    return [name.strip() for name in parts]


def _rules(phrases: str | None, model: str | None) -> Judge:
    if model is None:
        return RulesJudge(phrases or OWN_LIST)
    from es2fast.judges.perplexity import PerplexityCheck

    return RulesJudge(phrases or OWN_LIST, PerplexityCheck(model))


def _classifier(rest: str) -> Judge:
    """`MODEL` or `MODEL:PRESET`; what follows the last colon is a preset unless it has a slash."""
    from es2fast.judges.classifier import ClassifierJudge

    model, colon, preset = rest.rpartition(":")
    if colon and "/" not in preset and not Path(rest).exists():
        return ClassifierJudge(model, preset)
    return ClassifierJudge(rest)
