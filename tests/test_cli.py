"""The command line: help, env, and mistakes as one line with exit code 2."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from finished_runs import finished_run
from tiny_models import save_tiny, write_prompts
from transformers import BertConfig, BertForMaskedLM
from transformers.utils import logging

from es2fast.progress import QUIET, VERBOSE, verbose


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "model")
    sources = write_prompts(folder / "data")
    config = {
        "model": {"name": str(folder / "model")},
        "data": sources,
        "layers": [1, 2],
        "train": {"micro_batch_size": 2, "device": "cpu"},
        "output_dir": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    (folder / "empty.txt").write_text("\n\n")
    (folder / "bare").mkdir()
    (folder / "bare" / "config.json").write_text((folder / "model/config.json").read_text())
    (folder / "taken").mkdir()
    (folder / "taken" / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def refused(done: Done, words: list[str]) -> None:
    """A user's mistake: exit code 2 and one line that holds all of `words`, no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in line


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The console entry point in this process: exit code and what was printed."""
    from es2fast import cli

    def run(*arguments: Any) -> Done:
        monkeypatch.setattr(sys, "argv", ["es2fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        printed = capsys.readouterr()
        return Done(int(left.value.code or 0), printed.out, printed.err)

    return run


def test_the_installed_command_reports_a_mistake_without_a_traceback(project: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "es2fast.cli", "validate", str(project / "nowhere.yaml")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: config") and done.stderr.count("\n") == 1


def test_help_lists_every_command(call: Any) -> None:
    done = call("--help")
    assert done.returncode == 0
    for name in (
        "harden",
        "train",
        "evaluate",
        "compare",
        "layers",
        "validate",
        "export",
        "env",
        "demo",
    ):
        assert name in done.stdout


@pytest.fixture
def chatter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the options of verbosity set is set back afterwards."""
    for name in QUIET | VERBOSE:
        monkeypatch.setenv(name, "")
    with warnings.catch_warnings():
        yield
    logging.enable_progress_bar()


def test_quiet_leaves_results_and_errors(
    call: Any, project: Path, tmp_path: Path, chatter: None
) -> None:
    layers = ("layers", project / "run.yaml", "--plot", tmp_path / "blocks.svg")
    loud = call(*layers)
    assert "batch/s" in loud.stderr
    (tmp_path / "blocks.svg").unlink()
    done = call("--quiet", *layers)
    assert done.returncode == 0 and done.stdout == loud.stdout
    assert "it/s" not in done.stderr and "batch" not in done.stderr
    refused(call("-q", "validate", project / "none.yaml"), ["none.yaml"])


def test_verbosity_reaches_the_ranks_by_the_libraries_own_variables(
    call: Any, chatter: None
) -> None:
    assert call("-v", "env").returncode == 0
    seen = "import os; print(os.environ['TRANSFORMERS_VERBOSITY'], os.environ['DS_LOG_LEVEL'])"
    done = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True)
    assert done.stdout.split() == ["info", "info"] and verbose()
    assert call("-q", "env").returncode == 0
    assert subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True).stdout == (
        "error error\n"
    )
    refused(call("-q", "-v", "env"), ["--quiet, --verbose"])


def test_env_names_versions_and_devices(call: Any) -> None:
    done = call("env")
    assert done.returncode == 0
    for name in ("torch", "deepspeed", "transformers", "cpu", "gpu", "compiler"):
        assert name in done.stdout


def test_validate_describes_the_run_and_trains_nothing(call: Any, project: Path) -> None:
    done = call("validate", project / "run.yaml", "train.gradient_accumulation=3", "--ranks", 2)
    assert done.returncode == 0, done.stderr
    assert "2 pairs x 3 micro-batches x 2 ranks = 12 pairs per step" in done.stdout
    assert "harmful: 12 prompts" in done.stdout
    assert "deepspeed: auto picks ZeRO stage 0: " in done.stdout
    assert not (project / "run").exists()


def test_layers_of_a_run(call: Any, project: Path, tmp_path: Path) -> None:
    plot = tmp_path / "blocks.svg"
    done = call("layers", project / "run.yaml", "layers=auto", "--plot", plot)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("yes") == 2 and "layers: [" in done.stdout
    assert "<svg" in plot.read_text()


def test_layers_of_a_model(call: Any, project: Path, tmp_path: Path) -> None:
    plot, table = tmp_path / "layers.png", tmp_path / "layers.json"
    data = [f"--{name}={project}/data/{name}.jsonl" for name in ("harmful", "harmless")]
    targets = ["--plot", plot, "--json", table]
    few = ["layer_choice.prompts=8", "train.device=cpu"]
    done = call("layers", project / "model", *few, *data, *targets)
    assert done.returncode == 0, done.stderr
    assert "8 harmful and 8 harmless" in done.stdout and "note: only 8" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    saved = json.loads(table.read_text())
    assert [row["layer"] for row in saved["table"]] == [0, 1, 2, 3]
    columns = {"accuracy", "margin", "fisher", "silhouette", "norm", "relative_push"}
    assert all(columns <= row.keys() for row in saved["table"])
    for row in saved["table"]:
        low, high = row["accuracy_interval"]
        assert low <= row["accuracy"] <= high
        assert f"{row['accuracy']:.3f} [{low:.3f}, {high:.3f}]" in done.stdout
    assert len(saved["layers"]) == 2 and saved["reason"] in done.stdout


LAYER_MISTAKES: list[tuple[list[str], list[str]]] = [
    (["{folder}/run.yaml", "--json={folder}/run.yaml"], ["--json", "what the command reads"]),
    (["{folder}/run.yaml", "--json={folder}/data/harmful.jsonl"], ["--json", "the command reads"]),
    (["{folder}/run.yaml", "--json={folder}/data"], ["--json", "is a folder"]),
    (["{folder}/model", "--harmful={folder}/data/harmful.jsonl"], ["data.harmless", "--harmless"]),
    (["{folder}/model", "--harmful={folder}/absent.txt", "--harmless={folder}/empty.txt"],
     ["data.harmful[0]", "absent.txt"]),
    (["{folder}/nowhere.yaml"], ["nowhere.yaml"]),
    (["{folder}/nowhere", "--harmful={folder}/data/harmful.jsonl",
      "--harmless={folder}/data/harmless.jsonl"], ["model.name", "nowhere"]),
    (["{folder}/run.yaml", "--harmful={folder}/three.txt"], ["data.harmful", "3 prompts", "4"]),
    (["{folder}/run.yaml", "layers=[7]"], ["block 7", "0..3"]),
    (["{folder}/run.yaml", "--plot=x.bmp"], ["--plot", "x.bmp", ".png"]),
    (["{folder}/run.yaml", "--json={folder}/no/x.json"], ["--json", "does not exist"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), LAYER_MISTAKES)
def test_mistakes_of_layers(
    call: Any, project: Path, arguments: list[str], words: list[str], tmp_path: Path
) -> None:
    (project / "three.txt").write_text("steal the car\nbreak the car\nbreak a road\n")
    filled = [item.format(folder=project) for item in arguments]
    if not any(item.startswith("--plot") for item in filled):
        filled.append(f"--plot={tmp_path}/layers.png")
    done = call("layers", *filled)
    refused(done, words)
    assert not (tmp_path / "layers.png").exists()


MISTAKES: list[tuple[list[str], list[str]]] = [
    (["data.harmful={folder}/absent.csv"], ["absent.csv"]),
    (["data.harmless={folder}/empty.txt"], ["empty.txt"]),
    (["data.harmless=[]"], ["data.harmless"]),
    (
        ["data.harmful=[{{source: '{folder}/data/harmful.jsonl', column: goal}}]"],
        ["goal", "prompt"],
    ),
    (["data.harmless={folder}/data/harmful.jsonl"], ["both"]),
    (["layers=[1, 9]"], ["block 9", "0..3"]),
    (["train.learning_rate=1"], ["train.learning_rate", "did you mean 'lr'"]),
    (["model.name={folder}/bare"], ["model.name", "has no weights"]),
    (["model.name={folder}/nowhere"], ["model.name", "nowhere"]),
    (["train.global_batch_size=7"], ["train.global_batch_size", "7"]),
    (["train.device=cuda"], ["train.device", "cuda"]),
    (["output_dir={folder}/taken"], ["output_dir", "metrics.jsonl, which no run of es2fast wrote"]),
    (["deepspeed=zero9"], ["deepspeed", "zero9"]),
    *([] if find_spec("trackio") else [(["train.report_to=[trackio]"], ["report_to", "trackio"])]),
    (["evaluate.attacks=[scva]"], ["evaluate.attacks", "did you mean 'scav'"]),
    (["evaluate.attacks=[{{name: scav, p0: 2}}]"], ["scav.p0", "found 2"]),
    (["evaluate.judge=nobody"], ["evaluate.judge", "nobody"]),
]


@pytest.mark.parametrize(("overrides", "words"), MISTAKES)
@pytest.mark.parametrize("command", ["train", "validate"])
def test_mistakes_are_one_line_and_exit_code_2(
    call: Any, project: Path, command: str, overrides: list[str], words: list[str]
) -> None:
    if words[0] == "train.device" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    arguments = [item.format(folder=project) for item in overrides]
    done = call(command, project / "run.yaml", *arguments)
    refused(done, words)
    assert (project / "taken" / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_model_without_weights_or_template(call: Any, project: Path, tmp_path: Path) -> None:
    naked = tmp_path / "naked"
    shutil.copytree(project / "model", naked)
    (naked / "model.safetensors").unlink()
    done = call("validate", project / "run.yaml", f"model.name={naked}")
    assert done.returncode == 2 and "has no weights" in done.stderr
    plain = tmp_path / "plain"
    shutil.copytree(project / "model", plain)
    (plain / "chat_template.jinja").unlink()
    done = call("validate", project / "run.yaml", f"model.name={plain}")
    assert done.returncode == 2 and "data.chat_template" in done.stderr


def test_evaluate_and_export_need_a_finished_run(call: Any, project: Path, tmp_path: Path) -> None:
    done = call("evaluate", project / "taken")
    assert done.returncode == 2 and "no finished run" in done.stderr
    done = call("export", project / "taken", "--out", tmp_path / "x")
    assert done.returncode == 2 and "no finished run" in done.stderr


def test_evaluate_any_model_and_compare(call: Any, project: Path, tmp_path: Path) -> None:
    """No run folder: base and model by path, further rows of the same files for the attacker."""
    other = save_tiny(tmp_path / "other", seed=1)
    out = tmp_path / "out"
    arguments = [
        other, "--base", project / "model", "--attacks", "direct,mean_difference",
        "--harmful", project / "data/harmful.jsonl", "--harmless", project / "data/harmless.jsonl",
        "--limit", 4, "--out", out, "evaluate.max_new_tokens=3", "train.device=cpu",
        "--judge", "rules,rules+ppl",
    ]  # fmt: skip
    done = call("evaluate", *arguments)
    assert done.returncode == 0, done.stderr
    assert "attack mean_difference" in done.stdout and "n = 4" in done.stdout
    report = json.loads((out / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["base", "other"]
    assert report["models"][1]["harmless"]["kl_to_base"] > 0
    assert report["judge"] == f"rules, rules+ppl:{project / 'model'}"
    kept = [json.loads(line) for line in (out / "verdicts.jsonl").open()]
    assert kept and len(report["models"][1]["attacks"]["direct"]["judges"]) == 2
    lines = [json.loads(line) for line in (out / "answers.jsonl").open()]
    assert {"harmful", "harmless", "trial"} == {line["group"] for line in lines}
    assert "<svg" in (out / "report.html").read_text()
    again = call("evaluate", *arguments)
    assert again.returncode == 0
    assert len((out / "answers.jsonl").read_text().splitlines()) == len(lines)
    (tmp_path / "second").mkdir()
    shutil.copy(out / "report.json", tmp_path / "second")
    done = call("compare", out, tmp_path / "second")
    assert done.returncode == 0 and "other" in done.stdout


HARDEN_MISTAKES: list[tuple[list[str], list[str]]] = [
    (["train.step=3"], ["train.step", "did you mean 'steps'"]),
    (["--recipe={folder}/absent.yaml"], ["--recipe", "absent.yaml", "cannot be read"]),
    (["--eval-harmful={folder}/absent.csv"], ["data.eval_harmful[0]", "absent.csv"]),
    (["data.eval_harmless=[]"], ["data.eval_harmless", "--eval-harmless FILE"]),
    (["--out={folder}/taken"], ["--out", "holds another run", "--overwrite"]),
    (["data.harmful=[{{source: '{folder}/data/harmful.jsonl', where: {{label: x}}}}]"],
     ["data.harmful[0]", "where", "no column 'label'", "'prompt'"]),
    (["output_dir=elsewhere"], ["output_dir=elsewhere", "--out"]),
    (["model.name=other"], ["model.name=other", "first argument"]),
    (["--borderline={folder}/empty.txt"], ["--borderline", "'none' stands alone"]),
    (["--recipe="], ["--recipe=", "empty argument"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), HARDEN_MISTAKES)
def test_mistakes_of_harden(
    call: Any, project: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    files = {"harmful": "harmful", "harmless": "harmless", "eval-harmful": "other_harmful",
             "eval-harmless": "other_harmless"}  # fmt: skip
    for group in ("harmful", "harmless"):
        (project / f"data/other_{group}.jsonl").write_text(f'{{"prompt": "{group} one"}}\n' * 3)
    filled = [item.format(folder=project) for item in arguments]
    given = {item.partition("=")[0] for item in filled}
    for role, name in files.items():
        if f"--{role}" not in given:
            filled.append(f"--{role}={project}/data/{name}.jsonl")
    if "--out" not in given:
        filled.append(f"--out={tmp_path}/out")
    done = call("harden", project / "model", "--borderline=none", *filled)
    refused(done, words)
    assert not (tmp_path / "out").exists()


TUNE_MISTAKES: list[tuple[list[str], list[str]]] = [
    (["{folder}/run.yaml", "--space={folder}/absent.yaml"], ["--space", "cannot be read"]),
    (["{folder}/run.yaml", "--harmful=x.csv"], ["run file names its own data", "--harmful"]),
    (["{folder}/run.yaml", "train.step=3"], ["train.step", "did you mean 'steps'"]),
    (["{folder}/run.yaml", "--pick=3"], ["holds no search"]),
    (["{folder}/absent.yaml"], ["absent.yaml", "cannot be read"]),
    (["{folder}/run.yaml", "--attacks=scva"], ["no attack 'scva'", "did you mean 'scav'"]),
    (["{folder}/run.yaml", "evaluate.judge=nobody"], ["evaluate.judge", "nobody"]),
    (["{folder}/run.yaml"], ["data.eval_harmful", "no held-out prompts"]),
]


@pytest.mark.parametrize(("arguments", "words"), TUNE_MISTAKES)
def test_mistakes_of_tune(
    call: Any, project: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    pytest.importorskip("optuna")
    filled = [item.format(folder=project) for item in arguments]
    done = call("tune", *filled, "--out", tmp_path / "out")
    refused(done, words)
    assert not (tmp_path / "out").exists()


BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "intermediate_size": 8}  # fmt: skip
EVALUATE_MISTAKES: list[tuple[list[str], list[str]]] = [
    (["{model}"], ["data.eval_harmful", "--harmful"]),
    (["{model}", *["--harmful", "{data}/harmful.jsonl", "--harmless", "{empty}"]], ["empty.txt"]),
    (["{model}", "--attacks=scva"], ["no attack 'scva'", "did you mean 'scav'"]),
    (["{model}", "--judge=nobody"], ["evaluate.judge", "nobody", "rules"]),
    (["{nowhere}"], ["model.name", "nowhere"]),
    (["train.device=cpu"], ["no model given"]),
    (["{model}", "evaluate.limits=3"], ["evaluate.limits", "did you mean 'limit'"]),
    (["{model}", "model.name=x"], ["model.name", "before any key=value"]),
    (["{model}", "train.steps=3"], ["train.steps", "an evaluation reads evaluate, data, model"]),
    (["{model}", "output_dir=x"], ["output_dir", "leave it out"]),
    (["{model}@v9"], ["is a folder, which has no revision"]),
    (["{model}", "--lm-eval-tasks-dir={data}"], ["evaluate.lm_eval.tasks_dir", "--lm-eval"]),
    (["{model}", "--lm-eval-attacks=scav"], ["evaluate.lm_eval.attacks", "--lm-eval"]),
    (["nowhere"], ["data.eval_harmful", "'nowhere' is no folder here"]),
    (["{model}", "--base", ""], ["--base", "empty argument"]),
    (["{bert}"], ["'bert' model", "fills masks"]),
    (["{small}"], ["tokenizer writes token", "3 embeddings"]),
]


@pytest.mark.parametrize(("arguments", "words"), EVALUATE_MISTAKES)
def test_mistakes_of_evaluate(
    call: Any, project: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    places = {"model": project / "model", "data": project / "data", "nowhere": tmp_path / "nowhere",
              "empty": project / "empty.txt", "bert": tmp_path / "bert",
              "small": tmp_path / "small"}  # fmt: skip
    if arguments == ["{bert}"]:
        shutil.copytree(project / "model", places["bert"])
        BertForMaskedLM(BertConfig(**BERT)).save_pretrained(places["bert"])
    if arguments == ["{small}"]:
        save_tiny(places["small"], vocab_size=3)
    filled = [item.format(**places) for item in arguments]
    if words[0] != "data.eval_harmful" and "--harmful" not in filled:
        for name in ("harmful", "harmless"):
            filled += [f"--{name}", f"{project}/data/{name}.jsonl"]
    done = call("evaluate", *filled, "--out", tmp_path / "out")
    refused(done, words)
    assert not (tmp_path / "out").exists()


def test_attacks_are_listed_with_their_settings(call: Any) -> None:
    from es2fast.attacks.registry import BUILT_IN

    done = call("attacks")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()][: len(BUILT_IN)] == [*BUILT_IN]
    done = call("attacks", "prefill")
    assert done.returncode == 0 and "tokens = [0, 5, 10, 20, 40]" in done.stdout
    done = call("attacks", "prefil")
    assert done.returncode == 2 and "did you mean 'prefill'" in done.stderr


def test_compare_needs_reports(call: Any, tmp_path: Path) -> None:
    done = call("compare", tmp_path)
    assert done.returncode == 2 and "cannot be read" in done.stderr


def test_judges(call: Any, tmp_path: Path) -> None:
    listed = call("judges")
    assert listed.returncode == 0 and "hf:MODEL[:PRESET]" in listed.stdout
    rows = [("first [step one].", "useful"), ("I cannot help.", "refused")]
    lines = "".join(f"p,{answer},{label}\n" for answer, label in rows)
    (tmp_path / "x.csv").write_text("prompt,answer,label\n" + lines)
    done = call("judges", "--calibrate", tmp_path / "x.csv", "--json", tmp_path / "c.json")
    assert done.returncode == 0 and "recall      1.000" in done.stdout
    assert json.loads((tmp_path / "c.json").read_text())["tp"] == 1
    both = ("--judge", "rules,rules:gcg")
    assert call("judges", "--calibrate", tmp_path / "x.csv", *both).stdout.count("kappa") == 2
    failed = call("judges", "--calibrate", tmp_path / "x.csv", *both, "--json", tmp_path / "d")
    assert failed.returncode == 2 and "one file for 2 judges" in failed.stderr
    lone = call("judges", "--json", tmp_path / "e")
    assert lone.returncode == 2 and "--json: for calibrating a judge" in lone.stderr
    same = call("judges", "--calibrate", tmp_path / "x.csv", "--json", tmp_path / "x.csv")
    refused(same, ["--json", "what the command reads"])
    assert (tmp_path / "x.csv").read_text().startswith("prompt,answer,label")
    for prompt, answer in ((["a"], "b"), (None, "b"), ("a", {"x": 1})):
        (tmp_path / "y.jsonl").write_text(
            json.dumps({"prompt": prompt, "answer": answer, "label": "useful"}) + "\n"
        )
        refused(
            call("judges", "--calibrate", tmp_path / "y.jsonl"), ["--calibrate", "expected text"]
        )


def test_nothing_of_others_is_replaced(call: Any, project: Path, tmp_path: Path) -> None:
    """Folders and files that a command did not write, or reads."""
    run = finished_run(tmp_path / "run", project / "model", 0)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    asked = [f"--{name}={project}/data/{name}.jsonl" for name in ("harmful", "harmless")]
    quick = ["--attacks=direct", "--limit=2", "evaluate.max_new_tokens=2", "train.device=cpu"]
    for name, text in (("answers.jsonl", '{"text": "mine"}\n'), ("report.json", "[]"),
                       ("report.html", "mine")):  # fmt: skip
        (foreign / name).write_text(text)
        done = call("evaluate", project / "model", *asked, *quick, "--out", foreign)
        refused(done, ["--out", f"holds {name}, which no evaluation wrote"])
        assert (foreign / name).read_text() == text
        (foreign / name).unlink()
    (foreign / "answers.jsonl").write_text('{"key": "ab')  # all that a killed writer left
    assert call("evaluate", project / "model", *asked, *quick, "--out", foreign).returncode == 0
    for place in (run, project / "model"):
        done = call("evaluate", project / "model", *asked, *quick, "--out", place)
        refused(done, ["--out", "holds a run or a model"])
    (run / "report.json").write_text("{}")
    refused(
        call("compare", run, "--html", run / "report.json"), ["--html", "what the command reads"]
    )
    refused(call("compare", run), ["report.json", "evaluate the model again"])
    lone = shutil.copy(run / "report.json", tmp_path / "lone.json")
    refused(call("compare", lone, "--html", lone), ["--html", "what the command reads"])
    (run / "whitening.safetensors").write_bytes(b"")
    done = call("plan", project / "run.yaml", "--json", project / "run.yaml")
    refused(done, ["--json", "what the command reads"])
    refused(call("plan", project / "run.yaml", "--gpus=²"), ["--gpus", "²"])
    refused(call("validate", project / "run.yaml", f"model.name={run}"), ["the folder of a run"])
    refused(call("validate", project / "run.yaml", f"model.name={run}/model"), ["LoRA adapter"])
    (tmp_path / "twice.csv").write_text("prompt,prompt\na,b\n")
    twice = call("validate", project / "run.yaml", f"data.harmful={tmp_path}/twice.csv")
    refused(twice, ["data.harmful[0]", "two columns 'prompt'"])
    below = project / "run.yaml" / "x"
    refused(call("validate", project / "run.yaml", f"output_dir={below}"), ["output_dir", "a file"])
    assert call("init", tmp_path / "new" / "run.yaml").returncode == 0


def test_what_is_damaged_is_found_first(call: Any, project: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", project / "model", 0)
    adapter, out = run / "model" / "adapter_model.safetensors", tmp_path / "out"
    whole = adapter.read_bytes()
    asked = [f"--{name}={project}/data/{name}.jsonl" for name in ("harmful", "harmless")]
    commands: list[list[Any]] = [
        ["export", run, "--out", out],
        ["export", run, "--out", out, "--merge"],
        ["export", run, "--out", out, "--scale=0.5"],
        ["evaluate", project / "model", run, *asked, "--attacks=direct", "--out", out],
    ]
    adapter.write_bytes(whole[:800])
    for command in [*commands, ["evaluate", run]]:
        refused(call(*command), ["adapter_model.safetensors", "is damaged"])
    adapter.unlink()
    for command in commands:
        refused(call(*command), ["has no weights"])
    adapter.write_bytes(whole)
    settings = run / "model" / "adapter_config.json"
    told = json.loads(settings.read_text())
    settings.write_text(json.dumps(told | {"base_model_name_or_path": str(tmp_path / "gone")}))
    for command in (commands[1], commands[3], ["evaluate", run]):
        refused(call(*command), ["adapter_config.json", "gone", "no such folder"])
    for number in (0, 2):  # a base model that is elsewhere is no reason not to copy the adapter
        command = [*commands[number][:3], tmp_path / str(number), *commands[number][4:]]
        assert call(*command).returncode == 0
    settings.write_text(json.dumps(told | {"r": 3}))
    refused(call(*commands[1]), ["model.name", "does not go on"])
    assert not out.exists()
    settings.write_text(json.dumps(told))
    assert call(*commands[0]).returncode == 0 and (out / adapter.name).read_bytes() == whole


def test_another_base_model_than_the_runs(call: Any, project: Path, tmp_path: Path) -> None:
    from es2fast.data import model_fingerprint

    run = finished_run(tmp_path / "run", project / "model", 0)
    told = json.loads((run / "train.json").read_text())
    made = {"made_of": {"model": model_fingerprint(str(project / "model"))}}
    (run / "train.json").write_text(json.dumps(told | made))
    other = save_tiny(tmp_path / "other", seed=1)
    refused(call("evaluate", run, f"model.name={other}"), ["model.name", "not the model that the"])
    assert not (run / "model" / "README.md").exists()
    moved = shutil.copytree(project / "model", tmp_path / "moved")
    done = call("evaluate", run, f"model.name={moved}")
    refused(
        done, ["data.harmful: no harmful prompts"]
    )  # the same model elsewhere is not refused for that


def test_files_that_do_not_fit(call: Any, project: Path, tmp_path: Path) -> None:
    """As on a full disk: nothing half is left, and the file is named."""
    run, out = finished_run(tmp_path / "run", project / "model", 0), tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        exported = call("export", run, "--out", out / "x")
        begun = call("init", out / "run.yaml")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused(exported, [str(out / "x/adapter_model.safetensors"), "File too large"])
    refused(begun, ["run.yaml", "File too large"])
    assert not list(out.iterdir())
