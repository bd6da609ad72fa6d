"""One optimizer step of the real engine, 2 CPU ranks under ZeRO-3, against fp64 plain torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny, tokenizer, write_prompts

from es2fast.config import DataConfig, parse_config
from es2fast.data import Formatter, PairedSampler, load_groups
from es2fast.launch import free_port
from es2fast.modeling.teacher import set_trainable
from launcher.plain_es2 import es2_loss
from launcher.worker import STEPS

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
LAYERS = [1, 2]
TESTS = Path(__file__).parents[1]


def case(model: Path, data: dict[str, str], **train: Any) -> dict[str, Any]:
    stage = train.pop("stage", 3)
    settings = {"micro_batch_size": 1, "lr": 3e-3, "warmup_ratio": 0.0, "schedule": "constant"}
    return {
        "config": {
            "model": {"name": str(model), "dtype": "fp32"},
            "data": data,
            "layers": LAYERS,
            "separation": train.pop("separation", {}),
            "kl": {"weight": 3.0, "direction": train.pop("direction", "forward")},
            "train": settings | {"device": "cpu", "max_grad_norm": 1e9} | train,
            "deepspeed": {"zero_optimization": {"stage": stage}},
        }
    }


def execute(folder: Path, name: str, cases: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Runs worker.py on `ranks` ranks, by the launcher when there is more than one."""
    (folder / f"{name}.json").write_text(json.dumps(cases))
    out = folder / f"{name}.pt"
    worker = [str(TESTS / "launcher/worker.py"), "--out", str(out)]
    worker += ["--cases", str(folder / f"{name}.json")]
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    launcher += ["--master_port", str(free_port()), "--log_level", "warning"]
    command = [sys.executable, *(launcher if ranks > 1 else []), *worker]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("exact")
    untied = save_tiny(folder / "untied", "llama", tie_word_embeddings=False)
    tied = save_tiny(folder / "tied", "qwen3", tie_word_embeddings=True)
    data = write_prompts(folder / "data")
    two = {
        "twin": case(untied, data),
        "twin_checkpointed": case(untied, data, gradient_checkpointing=True),
        "lora": case(untied, data, trainable="lora", lora={"r": 4}),
        "lora_checkpointed": case(
            untied, data, trainable="lora", lora={"r": 4}, gradient_checkpointing=True
        ),
        "all": case(untied, data, trainable="all"),
        "all_tied": case(tied, data, trainable="all", direction="reverse"),
        "accumulated": case(untied, data, gradient_accumulation=2),
        "zero2": case(untied, data, stage=2),
        "normed": case(untied, data, separation={"space": "normed", "margin": 2.0}),
        "normed_checkpointed": case(
            untied, data, separation={"space": "normed", "margin": 2.0}, gradient_checkpointing=True
        ),
        "norm_band": case(untied, data, separation={"norm_band": [0.9, 1.1]}),
    }
    one = {
        "twin": case(untied, data, micro_batch_size=2),
        "accumulated": case(untied, data, micro_batch_size=2, gradient_accumulation=2),
    }
    return {
        "two": execute(folder, "two", two, 2),
        "one": execute(folder, "one", one, 1),
        "cases": two,
    }


CASES = ["twin", "twin_checkpointed", "lora", "lora_checkpointed", "all", "all_tied",
         "accumulated", "zero2", "normed", "normed_checkpointed", "norm_band"]  # fmt: skip


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def plain_step(spec: dict[str, Any], found: dict[str, Any]) -> tuple[float, float, dict]:
    """Separation, KL and gradients of the last step, from the state the engine had before it."""
    from transformers import AutoModelForCausalLM

    config = parse_config(spec["config"])
    teacher = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float64)
    student: Any = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float64)
    student = set_trainable(student, config.train, LAYERS[-1]).double().eval()
    missing = student.load_state_dict(
        {k: v.double() for k, v in found["state"].items()}, strict=False
    )
    assert not missing.unexpected_keys
    groups = load_groups(config.data)
    formatter = Formatter(tokenizer(), DataConfig())
    sampler = PairedSampler(
        len(groups.harmful), len(groups.harmless), seed=0, micro_batch_size=2,
        gradient_accumulation=config.train.gradient_accumulation, rank=0, world_size=1,
    )  # fmt: skip
    batches = sampler.indices(STEPS - 1)
    counts = []
    parts = []
    for a, b in batches:
        harmless = [
            formatter.conversation_ids(groups.harmless[i], groups.harmless[i].response or "")
            for i in b
        ]
        counts.append(sum(len(p) + len(r) for p, r in harmless))
        parts.append(
            es2_loss(
                student,
                teacher,
                [formatter.prompt_ids(groups.harmful[i]) for i in a],
                harmless,
                layers=LAYERS,
                d0=5.0,
                margin=config.separation.margin,
                kl_weight=config.kl.weight,
                direction=config.kl.direction,
                space=config.separation.space,
                norm0=10.0,
                band=config.separation.norm_band,
                band_weight=config.separation.norm_band_weight,
            )
        )
    separation = sum(part[0] for part in parts) / len(parts)
    kl = sum(part[1] * count for part, count in zip(parts, counts)) / sum(counts)
    rest = sum(part[2] - part[0] - config.kl.weight * part[1] for part in parts) / len(parts)
    (separation + config.kl.weight * kl + rest).backward()
    grads = {n: p.grad for n, p in student.named_parameters() if p.requires_grad}
    return separation.item(), kl.item(), grads


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_plain_fp64(runs: dict[str, Any], name: str) -> None:
    found = runs["two"][name]
    separation, kl, grads = plain_step(runs["cases"][name], found)
    assert kl > 1e-4  # the step compared is not the trivial one at KL = 0
    assert found["losses"][-1] == pytest.approx(separation, rel=1e-5)
    assert found["kl"][-1] == pytest.approx(kl, rel=1e-3)
    assert found["grads"].keys() == grads.keys()
    everything = torch.cat([grads[k].flatten() for k in grads])
    ours = torch.cat([found["grads"][k].flatten() for k in grads])
    assert relative(ours, everything) <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_ranks_end_with_equal_parameters(runs: dict[str, Any], name: str) -> None:
    digests = runs["two"][name]["digests"]
    assert len(digests) == 2 and len(set(digests)) == 1


@pytest.mark.parametrize("name", [c for c in CASES if c != "zero2"])
def test_trace_is_never_invalidated(runs: dict[str, Any], name: str) -> None:
    """Recorded in the first step, complete and in use from then on."""
    assert runs["two"][name]["trace"][1:] == [True] * (STEPS - 1)


@pytest.mark.parametrize("name", ["twin", "accumulated"])
def test_one_rank_of_two_rows_equals_two_ranks_of_one(runs: dict[str, Any], name: str) -> None:
    one, two = runs["one"][name], runs["two"][name]
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-5)
    assert one["kl"][1:] == pytest.approx(two["kl"][1:], rel=1e-4)
    for key, grad in one["grads"].items():
        assert relative(two["grads"][key], grad.double()) <= 1e-4, key


def test_checkpointing_changes_nothing(runs: dict[str, Any]) -> None:
    for name in ("twin", "lora"):
        plain, recomputed = runs["two"][name], runs["two"][f"{name}_checkpointed"]
        assert plain["losses"] == pytest.approx(recomputed["losses"], rel=1e-6)
