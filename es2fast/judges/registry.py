"""Judges by name: `evaluate.judge`."""

from __future__ import annotations

from importlib.metadata import entry_points

from es2fast.errors import UserError
from es2fast.judges.base import Judge
from es2fast.judges.rules import RulesJudge

GROUP = "es2fast.judges"


def make_judge(name: str) -> Judge:
    """The judge of that name: the library's `rules`, or one of another package (an entry point in
    the group `es2fast.judges` whose value makes a `Judge` when called).

    Raises:
        UserError: no such judge.
    """
    if name == "rules":
        return RulesJudge()
    points = entry_points(group=GROUP)
    for point in points:
        if point.name == name:
            return point.load()()
    names = ", ".join(["rules", *sorted(point.name for point in points)])
    raise UserError(f"evaluate.judge: no judge {name!r}; there are {names}")
