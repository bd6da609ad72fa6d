"""What a search found: the Pareto front as a table and a figure, and one point as a run file.

A point of the front is beaten by no other trial on both numbers. They are few prompts' rates on a
short training: the interval stands beside them, and a picked point is to be trained in full and
attacked anew before it is believed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from rich import box
from rich.table import Table

from es2fast.config import load_config, save_config
from es2fast.errors import UserError
from es2fast.report.plots import COLOURS
from es2fast.report.stats import rate_interval
from es2fast.report.table import default_console
from es2fast.tune.study import REASON, REQUEUED, StudyFolder, place
from es2fast.tune.trial import RECIPE, describe


def front(study: Any) -> list[Any]:
    """The Pareto-optimal trials, the safest first."""
    return sorted(study.best_trials, key=lambda trial: tuple(trial.values))


def print_front(study: Any) -> None:
    """The front as a table and its parameters, then how many trials there were and why some have
    no result."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("trial", "worst attack", "useful", "damage", "harmless refused", "KL, response"):
        side: Any = "left" if name == "worst attack" else "right"
        table.add_column(name, justify=side, no_wrap=True)
    best = front(study)
    for trial in best:
        table.add_row(*_cells(trial))
    default_console().print(table)
    for trial in best:
        print(f"trial {trial.number}: {describe(trial.params)}")
    every = study.get_trials(deepcopy=False)
    states = [trial.state.name for trial in every]
    ended = {name: states.count(name) for name in ("COMPLETE", "PRUNED", "FAIL", "RUNNING")}
    print(", ".join(f"{count} {name.lower()}" for name, count in ended.items() if count))
    lost = {trial.user_attrs.get(REQUEUED) for trial in every}
    for trial in every:
        if REASON in trial.user_attrs and trial.number not in lost:
            print(f"trial {trial.number} {trial.state.name.lower()}: {trial.user_attrs[REASON]}")


def _cells(trial: Any) -> list[str]:
    found = trial.user_attrs
    low, high = rate_interval(found["worst"], found["n"])
    kl = found["kl"]
    return [
        str(trial.number),
        found["attack"],
        f"{100 * found['worst']:.0f} % [{100 * low:.0f}–{100 * high:.0f}] of {found['n']}",
        f"{found['damage']:.2f}",
        f"{100 * found['base_refused']:.0f} → {100 * found['refused']:.0f} %",
        "–" if kl is None else f"{kl:.4f}",
    ]


def save_front(study: Any, path: Path) -> bool:
    """Writes the figure; False: there is none, since no trial is complete."""
    done = [trial for trial in study.get_trials(deepcopy=False) if trial.values]
    if done:
        front_figure(done, front(study)).savefig(path, dpi=120)
    return bool(done)


def front_figure(done: list[Any], best: list[Any]) -> Figure:
    """All completed trials, the front with its numbers, the base model, and damage 1."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    worst, price = zip(*(trial.values for trial in done))
    axes.scatter(price, worst, s=18, color="#999999", label="trials")
    axes.plot(
        [trial.values[1] for trial in best],
        [trial.values[0] for trial in best],
        color=COLOURS[0],
        marker="o",
        markersize=5,
        drawstyle="steps-pre",  # the safest first: up to a damage, the point left of it is the best
        label="Pareto front",
    )
    for trial in best:
        axes.annotate(
            str(trial.number), trial.values[::-1], (4, 4), textcoords="offset points", fontsize=8
        )
    base = done[0].user_attrs["base_worst"]
    axes.scatter([0], [base], marker="*", s=70, color=COLOURS[1], label="base model")
    axes.axvline(1, color="#555555", linestyle=":", linewidth=1, label="limit")
    axes.set(
        xlabel="damage: max(refusals, gibberish + / 5 points, KL / 0.02)",
        ylabel="worst attack, useful answers",
        ylim=(-0.03, 1.03),
    )
    axes.set_xscale("symlog", linthresh=1)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlim(-0.05, 1.2 * max(1.0, *price))
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.legend(fontsize=8)
    return figure


def pick(study: Any, folder: StudyFolder, number: int) -> Path:
    """Writes the run file of a trial: its configuration, with an output folder of its own.

    Raises:
        UserError: no such trial, or it has no result.
    """
    done = {trial.number: trial for trial in study.get_trials(deepcopy=False) if trial.values}
    if number not in done:
        known = ", ".join(map(str, done)) or "none"
        raise UserError(f"--pick: trial {number} has no result; those with one: {known}")
    config = load_config(folder.trial(place(done[number])) / RECIPE)
    target = folder.picked(number)
    output = str(folder.path / f"pick-{number}")
    train = config.train.model_copy(update={"overwrite": False})
    save_config(config.model_copy(update={"output_dir": output, "train": train}), target)
    return target
