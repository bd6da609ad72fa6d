"""Tasks of lm-evaluation-harness on the live model: what a defence costs beside its KL.

lm-eval gets the very model that is evaluated (`HFLM` takes a loaded one), so tasks can also run
with an attack's hooks or weights in place (`Attack.applied`): whether a push that gets an answer
out of a model leaves it anything to answer with.

Two things to know. Multiple-choice tasks read log-probabilities in one pass: a push at the last
position of a pass touches the last token of each choice alone there, and acts in full where a task
generates; pushes at all positions, ablation and changed weights act everywhere, and a repetition
penalty that the attacker chose is not applied. And lm-eval pads rows on the right without telling
the model, so tasks under an attack run one row at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from es2fast.attacks.base import Attack, Target
from es2fast.config import LmEvalConfig
from es2fast.errors import UserError
from es2fast.run.files import write_text

PLAIN = "plain"  # no attack
YAML = (".yaml", ".yml")
Scores = dict[str, dict[str, dict[str, float | int | None]]]  # task -> metric -> value, stderr, n


def check(settings: LmEvalConfig, attacks: Sequence[Attack]) -> None:
    """What can be known before a model is loaded.

    Raises:
        UserError: lm-eval is not installed; no such folder or task; an attack that is not in the
            list, or cannot be in place while something else uses the model.
    """
    if not settings.tasks:
        for name in ("attacks", "tasks_dir"):
            if value := getattr(settings, name):
                raise UserError(
                    f"evaluate.lm_eval.{name}: {value!r} is for tasks, and there are none; name "
                    "some in evaluate.lm_eval.tasks (--lm-eval)"
                )
        return
    if find_spec("lm_eval") is None:
        raise UserError(
            "evaluate.lm_eval: lm_eval is not installed; pip install 'es2fast[lm-eval]'"
        )
    if settings.tasks_dir is not None and not Path(settings.tasks_dir).is_dir():
        raise UserError(f"evaluate.lm_eval.tasks_dir: there is no folder {settings.tasks_dir!r}")
    made = {attack.label: attack for attack in attacks}
    for name in settings.attacks:
        if name not in made:
            raise UserError(
                f"evaluate.lm_eval.attacks: {name!r} is not in evaluate.attacks; there are "
                + ", ".join(made)
            )
        if type(made[name]).applied is Attack.applied:
            raise UserError(
                f"evaluate.lm_eval.attacks: {name!r} changes what is asked, not the model, so "
                "tasks cannot run under it; name an attack on states or weights"
            )
    _manager(settings)


def task_files(settings: LmEvalConfig) -> list[str]:
    """Digests of the task files that are named: in `tasks_dir`, by path or by FOLDER/NAME."""
    found = {path for path in map(Path, settings.tasks) if path.suffix in YAML}
    folders = [path.parent for path in map(Path, settings.tasks) if path.parent != Path(".")]
    for folder in [*folders, *([Path(settings.tasks_dir)] if settings.tasks_dir else [])]:
        found |= {path for path in folder.rglob("*") if path.suffix in (*YAML, ".py")}
    return sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in found if path.is_file())


def task_scores(
    target: Target,
    settings: LmEvalConfig,
    under: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Scores:
    """The scores of all tasks, with `under` in place where given.

    Raises:
        UserError: an unknown task, or one whose data cannot be loaded.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    names, manager = _manager(settings)

    def run() -> Any:
        batch = 1 if under else target.batch_size
        lm = HFLM(target.model, tokenizer=target.formatter.tokenizer, batch_size=batch)  # type: ignore[arg-type]
        with torch.random.fork_rng(), (under or nullcontext)():
            return simple_evaluate(
                lm,
                tasks=names,
                task_manager=manager,
                limit=settings.limit,
                num_fewshot=settings.num_fewshot,
                apply_chat_template=settings.chat_template,
                log_samples=False,
                bootstrap_iters=100,
            )

    try:
        return _scores(target.fitted(run))
    except (KeyError, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"evaluate.lm_eval: {', '.join(names)}: {lines[0][:200]}") from None


class SavedScores:
    """Scores of one model on disk, each under a key of what it depends on.

    Args:
        path: the file.
        key: of the model and the tasks' settings.
    """

    def __init__(self, path: Path, key: str):
        self._path, self._key = path, key
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            saved = {}
        self._saved: dict[str, Any] = saved if saved.get("key") == key else {"key": key}

    def get(self, name: str, settings: str) -> Scores | None:
        """What `put` saved with the same attack settings."""
        found = self._saved.get(name, {})
        return found["scores"] if found.get("settings") == settings else None

    def put(self, name: str, settings: str, scores: Scores) -> None:
        self._saved[name] = {"settings": settings, "scores": scores}
        write_text(self._path, json.dumps(self._saved, indent=1) + "\n")


def _manager(settings: LmEvalConfig) -> tuple[list[str], Any]:
    """Task names without folders, and what finds them; lm-eval's own thousands of tasks are only
    indexed when one of them is named, for it takes half a minute."""
    from lm_eval.tasks import TaskManager

    folders = [settings.tasks_dir] if settings.tasks_dir else []
    names = []
    for given in settings.tasks:
        path = Path(given)
        if path.suffix in YAML:
            names.append(_name_in(path))
        else:
            names.append(path.name)
        if path.parent != Path(".") or path.suffix in YAML:
            folders.append(str(path.parent))
    if folders:
        own = TaskManager(include_path=list(folders), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return names, own
    every = TaskManager(include_path=list(folders) or None)
    unknown = [name for name in names if name not in every.all_tasks]
    if unknown:
        raise UserError(
            f"evaluate.lm_eval.tasks: lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` lists "
            "them, and evaluate.lm_eval.tasks_dir (--lm-eval-tasks-dir) names a folder of your own"
        )
    return names, every


def _name_in(path: Path) -> str:
    """The task that a YAML file defines."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        return str(found["task"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        raise UserError(
            f"evaluate.lm_eval.tasks: {str(path)!r} is no YAML file with a `task`"
        ) from None


def _scores(results: Mapping[str, Any]) -> Scores:
    """lm-eval's "acc,none": x, "acc_stderr,none": y as acc: {value, stderr, n}."""
    found: Scores = {}
    for task, row in results["results"].items():
        count = results.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in row.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            spread = row.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric} ({kind})"
            found.setdefault(task, {})[name] = {
                "value": float(value),
                "stderr": float(spread) if isinstance(spread, int | float) else None,
                "n": count,
            }
    return found
