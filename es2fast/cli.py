"""The command line: `es2fast harden | tune | train | evaluate | attacks | compare | judges ...`.

Heavy imports happen inside the commands, so `--help` answers at once. A user's mistake is one line
on stderr and exit code 2, or 3 where a safeguard stopped the training.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from es2fast.config import load_config
from es2fast.errors import STOPPED, RunInterrupted, RunStopped, UserError, disk_message
from es2fast.harden.command import Public, PushToHub, harden, hub_target
from es2fast.planning.command import plan
from es2fast.tune.command import tune

app = typer.Typer(
    name="es2fast",
    help="Embedding Space Separation: harden open LLMs, and attack them to see whether it worked.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path, typer.Argument(help="YAML file of the run", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value, for example train.lr=1e-4", show_default=False),
]
Ranks = Annotated[
    int | None,
    typer.Option("--ranks", min=1, max=1024, help="processes; default: one per GPU, 2 on a CPU"),
]


def main() -> None:
    """Console entry point."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        _check_arguments(sys.argv[1:])
        app()
    except UserError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from es2fast.distributed.failures import report

            report(error)
        else:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(STOPPED if isinstance(error, RunStopped) else 2)
    except RunInterrupted as note:
        print(note)
    except OSError as error:
        message = disk_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _check_arguments(given: list[str]) -> None:
    """An empty path is the folder one stands in, which nobody means by it."""
    for before, item in zip(["", *given], given):
        if not item or re.fullmatch(r"--[a-z-]+=", item):
            raise UserError(
                f"{item or before or 'es2fast'}: an empty argument, as of a shell variable that is "
                "not set; give a value or leave it out"
            )


def _print_version(wanted: bool) -> None:
    from es2fast.environment import installed

    if wanted:
        print(f"es2fast {installed('es2fast')}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="print the version and leave"
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="no progress bars, no warnings of libraries")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="also what DeepSpeed and transformers log")
    ] = False,
) -> None:
    """What stands before a command.

    Raises:
        UserError: both less and more.
    """
    from es2fast.progress import say_less, say_more

    if quiet and verbose:
        raise UserError("--quiet, --verbose: give one of them")
    if quiet:
        say_less()
    if verbose:
        say_more()


app.command()(harden)
app.command()(tune)
app.command()(plan)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None, ranks: Ranks = None) -> None:
    """Train on this machine through the deepspeed launcher.

    On a cluster call the launcher itself: deepspeed --module es2fast.train --config run.yaml
    """
    from es2fast.distributed.launch import launch, rank_count
    from es2fast.training.plan import make_plan

    resolved = load_config(config, overrides or ())
    make_plan(resolved, world_size=rank_count(ranks, resolved.train.device))
    launch(config, overrides or (), ranks=ranks, device=resolved.train.device)


@app.command()
def init(
    config: Annotated[Path, typer.Argument(help="file to write", show_default=False)],
) -> None:
    """Write a run file to start from: every key with its meaning and default."""
    from es2fast.reference import template
    from es2fast.run.files import write_text

    if config.exists():
        raise UserError(f"init: {str(config)!r} exists already; choose another name")
    write_text(config, template())
    print(f"written: {config}; fill in model.name and the data, then: es2fast validate {config}")


@app.command("validate")
def validate_command(config: ConfigFile, overrides: Overrides = None, ranks: Ranks = None) -> None:
    """Check configuration, data, model and batch arithmetic without training.

    With --ranks for a run on more GPUs than this machine has.
    """
    from es2fast.distributed.launch import rank_count
    from es2fast.training.plan import make_plan

    resolved = load_config(config, overrides or ())
    checked = make_plan(resolved, world_size=ranks or rank_count(None, resolved.train.device))
    print("\n".join(checked.lines()))


@app.command()
def respond(
    config: ConfigFile,
    server: Annotated[
        str,
        typer.Option("--server", help="URL#MODEL: base of its API, and the model's name there"),
    ],
    overrides: Overrides = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, max=4096, help="requests at a time")
    ] = 32,
) -> None:
    """Let an inference server (vLLM, SGLang) write the base model's answers before a training.

    It has to serve the run's base model and to take token ids. The training finds them in
    data.cache_dir and writes none itself. An API key is read from ES2FAST_SERVER_API_KEY.
    """
    from es2fast.training.server_responses import respond as ask

    found, cache = ask(load_config(config, overrides or ()), server, concurrency=concurrency)
    for one in found:
        print(f"answers to {one.kind}: {one.written} written, {one.known} there before")
    print(f"kept in: {cache.path}")


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="a run's folder; or model folders and Hugging Face ids (ORG/NAME@REVISION); then "
            "key=value",
            show_default=False,
        ),
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="model that the others are compared with")
    ] = None,
    attacks: Annotated[
        str | None, typer.Option("--attacks", help="names, with commas between them")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option("--judge", help="who judges the answers; of several, with commas, the first"),
    ] = None,
    harmful: Annotated[
        list[str] | None, typer.Option("--harmful", help="held-out prompts; may be repeated")
    ] = None,
    harmless: Annotated[list[str] | None, typer.Option("--harmless", help="likewise")] = None,
    fit_harmful: Annotated[
        list[str] | None,
        typer.Option("--fit-harmful", help="the attacker's prompts; default: further rows"),
    ] = None,
    fit_harmless: Annotated[list[str] | None, typer.Option("--fit-harmless")] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=2, help="held-out prompts per group")
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option("--lm-eval", help="tasks of lm-eval to run as well, with commas between them"),
    ] = None,
    lm_eval_tasks_dir: Annotated[
        Path | None, typer.Option("--lm-eval-tasks-dir", help="folder with task files of your own")
    ] = None,
    lm_eval_attacks: Annotated[
        str | None,
        typer.Option("--lm-eval-attacks", help="attacks under which the tasks run as well"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder to write; default: runs/evaluation")
    ] = None,
) -> None:
    """Attack models with attacks fitted on each of them; write answers and a report.

    With the folder of a finished run alone, its base and its trained model are attacked and the
    report goes into the run. An evaluation that was interrupted goes on where it was.
    Several processes share the prompts: torchrun --nproc_per_node 2 -m es2fast.cli evaluate ...
    """
    from es2fast.distributed.interrupt import LIFELINE, die_with_launcher
    from es2fast.evaluation.run import check_overrides, evaluate_paths, evaluate_run
    from es2fast.evaluation.split import replacing
    from es2fast.report.table import print_table
    from es2fast.run.folder import RunFolder

    if LIFELINE in os.environ:  # one of several that `harden` started
        die_with_launcher()
    sources = {
        "data.eval_harmful": harmful,
        "data.eval_harmless": harmless,
        "data.harmful": fit_harmful,
        "data.harmless": fit_harmless,
    }
    named = replacing({key: files for key, files in sources.items() if files})
    chosen = {"evaluate.attacks": attacks and attacks.split(","), "evaluate.judge": judge,
              "evaluate.limit": limit,
              "evaluate.lm_eval.tasks": lm_eval and lm_eval.split(","),
              "evaluate.lm_eval.tasks_dir": lm_eval_tasks_dir and str(lm_eval_tasks_dir),
              "evaluate.lm_eval.attacks": lm_eval_attacks and lm_eval_attacks.split(","),
              }  # fmt: skip
    named += [f"{key}={json.dumps(value)}" for key, value in chosen.items() if value is not None]
    named += [item for item in models if "=" in item]
    places = [item for item in models if "=" not in item]
    if not places:
        raise UserError("evaluate: no model given; name a run's folder, a model folder or an id")
    run = RunFolder(places[0])
    if len(places) == 1 and base is None and out is None and (run.occupied or run.finished):
        report, folder = evaluate_run(run.path, named), run
    else:
        check_overrides(named, run=False)
        config = load_config(None, [f"model.name={json.dumps(places[0])}", *named])
        folder = RunFolder(out or Path("runs/evaluation"))
        report = evaluate_paths(places, config, folder, base=base)
    if report is None:  # rank 0 speaks for all
        return
    print_table(report)
    print(f"written: {folder.answers}, {folder.report}, {folder.page}")


@app.command()
def attacks(
    name: Annotated[
        str | None, typer.Argument(help="show this attack's settings", show_default=False)
    ] = None,
) -> None:
    """List the attacks that `evaluate` knows, or the settings of one."""
    from es2fast.attacks.registry import attack_names, describe

    if name is None:
        for found in attack_names():
            print(f"{found:<17}{describe(found)[0].split(': ', 1)[-1]}")
        return
    line, settings = describe(name)
    print(line)
    for key, default, meaning in settings:
        print(f"  {key} = {default}" + (f"\n      {meaning}" if meaning else ""))


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="folders with a report.json", show_default=False)
    ],
    html: Annotated[
        Path | None, typer.Option("--html", help="also write a page to this file")
    ] = None,
) -> None:
    """Print the reports of several runs or evaluations side by side."""
    from es2fast.report.compare import combined
    from es2fast.report.html import write_page
    from es2fast.report.table import print_table
    from es2fast.run.claim import check_output
    from es2fast.run.folder import RunFolder

    own = [path for run in runs for path in RunFolder(run).contents]
    check_output("--html", html, [*own, *(run for run in runs if run.is_file())])
    report = combined(runs)
    print_table(report)
    if html is not None:
        write_page(html, report)
        print(f"page: {html}")


@app.command("judges")
def judges_command(
    calibrate: Annotated[
        Path | None,
        typer.Option("--calibrate", help=".csv or .jsonl of prompts, answers and people's labels"),
    ] = None,
    judge: Annotated[
        str, typer.Option("--judge", help="whom to calibrate; several with commas")
    ] = "rules",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write it here, for evaluate.calibration")
    ] = None,
) -> None:
    """Say who can judge answers, or measure how far a judge agrees with people."""
    from es2fast.judges.calibration import calibrate as measure
    from es2fast.judges.calibration import read_labelled
    from es2fast.judges.registry import describe, make_judges
    from es2fast.run.claim import check_output

    if calibrate is None:
        if judge != "rules" or json_file is not None:
            option = "--json" if json_file is not None else "--judge"
            raise UserError(f"{option}: for calibrating a judge; add --calibrate FILE")
        print("\n".join(describe()))
        return
    chosen = make_judges(judge)
    check_output("--json", json_file, [calibrate])
    if json_file is not None and len(chosen) > 1:
        raise UserError(f"--json: one file for {len(chosen)} judges; name one with --judge")
    items, useful = read_labelled(calibrate)
    for one in chosen:
        found = measure(one, items, useful)
        one.close()
        print("\n".join([*found.lines(), *(f"  warning: {note}" for note in one.notes())]))
        if json_file is not None:
            found.save(json_file)
            print(f"written: {json_file}")


@app.command()
def layers(
    model: Annotated[
        str,
        typer.Argument(
            help="model folder or Hugging Face id; or the YAML file of a run", show_default=False
        ),
    ],
    overrides: Overrides = None,
    harmful: Annotated[
        list[str] | None,
        typer.Option("--harmful", help="prompts: a file, folder or dataset id; may be repeated"),
    ] = None,
    harmless: Annotated[list[str] | None, typer.Option("--harmless", help="likewise")] = None,
    plot: Annotated[Path, typer.Option("--plot", help="figure to write (.png, .svg, .pdf)")] = Path(
        "layers.png"
    ),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write the table and the choice here")
    ] = None,
) -> None:
    """Measure every block, choose the layers to separate, say how sure that is, plot it.

    At most layer_choice.prompts prompts per group are used (256; override it, say
    layer_choice.prompts=10000). States are fp32 on the CPU, at most 2 GiB of them at a time: more
    prompts mean more passes over them, a few blocks each.
    """
    from es2fast.probing.choose import (
        check_targets,
        print_layer_table,
        probe_layers,
        probing_config,
    )
    from es2fast.report.layer_plot import save_layer_plot
    from es2fast.run.claim import files_of

    config = probing_config(model, overrides or (), harmful, harmless)
    check_targets(plot, json_file, [Path(model), *files_of(config)])
    choice = probe_layers(config, progress=True)
    print_layer_table(choice)
    save_layer_plot(plot, choice.table, choice.layers)
    if json_file is not None:
        choice.save(json_file)
    print(f"written: {plot}{f', {json_file}' if json_file else ''}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    out: Annotated[Path, typer.Option("--out", help="folder to write; must not exist")],
    merge: Annotated[bool, typer.Option("--merge", help="fold a LoRA adapter in")] = False,
    scale: Annotated[
        float, typer.Option("--scale", help="share of a LoRA adapter's update to keep, 0..1")
    ] = 1.0,
    strength: Annotated[
        float,
        typer.Option(
            "--filter",
            help="0: off; else reads the run's prompts again and takes what acts on the harmless "
            "ones out of a LoRA update, at this strength",
        ),
    ] = 0.0,
    push_to_hub: PushToHub = None,
    public: Public = False,
) -> None:
    """Write the trained model as a plain Hugging Face folder, and upload it if asked to."""
    from es2fast.report.model_card import merged_card
    from es2fast.run.export import export_run
    from es2fast.training.update_filter import filter_adapter

    target = hub_target(push_to_hub, public=public)
    export_run(
        run, out, merge=merge, scale=scale, strength=strength, filter_adapter=filter_adapter,
        merged_card=merged_card,
    )  # fmt: skip
    print(f"written: {out}")
    if target is not None:
        print(f"uploaded: {target.push(out)}")


@app.command()
def average(
    runs: Annotated[
        list[Path],
        typer.Argument(help="folders of finished runs, alike but for seeds", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", help="run folder to write; must hold no run")],
) -> None:
    """Write a run whose model has the mean of several runs' LoRA updates: nearer to the base model
    than each, and on a 0.5B model it refused much as they did (direct, prefill, ablation)."""
    from es2fast.run.average import average_runs

    average_runs(runs, out)
    print(f"written: {out}; es2fast evaluate {out}")


@app.command()
def env() -> None:
    """Print versions, devices and what is missing: what a bug report needs."""
    from es2fast.environment import describe

    for name, value in describe().items():
        print(f"{name:<14}{value}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="folder of the run")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option("--seed", help="of the toy model and the training")] = 0,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="fewer for a try")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda")] = "auto",
) -> None:
    """Build a small aligned chat model, harden it, attack it before and after, print the table."""
    from es2fast.demo.run import run_demo

    run_demo(out, seed=seed, steps=steps, device=device)


if __name__ == "__main__":
    main()
