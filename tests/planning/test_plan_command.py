"""`es2fast plan`: what does not fit and what helps; exchanges; the command's own output."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import save_tiny, write_prompts
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from es2fast.cli import app
from es2fast.config import Config, parse_config
from es2fast.data.packing import pack
from es2fast.errors import UserError
from es2fast.planning.batches import largest, rows_of, works_of
from es2fast.planning.command import ranks_of
from es2fast.planning.communication import step_bytes
from es2fast.planning.estimate import Estimator
from es2fast.planning.fit import smallest_change
from es2fast.planning.flops import Flops, flops, mean_flops
from es2fast.planning.machines import GPUS, machine
from es2fast.planning.timing import step_time, writing_seconds
from es2fast.training.feed import Feed
from es2fast.training.memory import model_sizes
from es2fast.training.micro_batch import objective_inputs, packed_form
from es2fast.training.plan import make_plan, without_machine
from es2fast.training.stage import FILLED


def cost(config: Config, ranks: int) -> float:
    """A made-up memory that every change lowers."""
    train = config.train
    size = 1.0 * train.micro_batch_size * (0.5 if train.gradient_checkpointing else 1)
    size += 2 if train.trainable == "lora" else 8
    return size + (8 / ranks if config.deepspeed == "zero3" else 8)


@pytest.mark.parametrize(
    ("limit", "ranks", "expected"),
    [
        (20, 2, []),
        (18, 2, ["train.gradient_checkpointing=true"]),
        (14, 2, ["train.trainable=lora"]),
        (12, 2, ["train.gradient_checkpointing=true", "train.trainable=lora"]),
        (9, 2, ["train.gradient_checkpointing=true", "train.trainable=lora", "deepspeed=zero3"]),
        (2, 2, None),
    ],
)
def test_the_smallest_change_that_helps(
    limit: float, ranks: int, expected: list[str] | None
) -> None:
    config = parse_config({"model": {"name": "m"}})
    assert smallest_change(config, ranks, 2, lambda c, n: cost(c, n) <= limit) == expected


def test_bytes_sent() -> None:
    def sent(stage: int, ranks: int = 4, micro_batches: int = 1) -> float:
        return step_bytes(
            stage, total=100, trained=10, item=2, ranks=ranks, micro_batches=micro_batches
        )

    assert [sent(stage) for stage in (0, 1, 2, 3)] == [30, 30, 30, 1.5 * (10 + 300)]
    assert [sent(stage, micro_batches=3) for stage in (0, 1, 2)] == [30, 30, 60]
    rest = {"total": 100, "trained": 10, "item": 2, "ranks": 4, "micro_batches": 2, "head": 40}
    assert step_bytes(3, **rest) == 2 * 1.5 * (10 + 180 + 40)
    assert step_bytes(3, **rest, tied=True) == 2 * 1.5 * (10 + 180 + 120)
    assert step_bytes(3, **rest, tokens=7.0) == 2 * (1.5 * (10 + 180) + 7)
    assert step_bytes(2, **rest, tokens=7.0) == step_bytes(2, **rest)
    assert [sent(stage, ranks=1) for stage in (0, 1, 2, 3)] == [0, 0, 0, 0]


def test_a_step_is_the_longer_of_computing_and_sending() -> None:
    h100 = GPUS["H100"]
    work = Flops(1e12, 1e12, 1e12, 0.0, 2e12, 1e12)
    found = step_time(
        work, 450e9, trained=10**9, stage=2, ranks=8, micro_batches=2, machine=h100
    )  # fmt: skip
    assert found.compute == pytest.approx(12e12 / (0.5 * 989e12))
    assert found.exchange == pytest.approx(1.0)  # link of a machine
    assert found.seconds == pytest.approx(1.0 + 28 * 1e9 / 8 / 3.35e12)
    assert found.mfu == pytest.approx(10e12 / found.seconds / 989e12)
    far = step_time(work, 450e9, trained=0, stage=2, ranks=16, micro_batches=2, machine=h100)
    assert far.exchange == pytest.approx(9.0)
    seconds = writing_seconds(
        100, 0, 10, active=1e9, item=2, batch=10, ranks=5, gathered=0, machine=h100
    )  # fmt: skip
    assert seconds == pytest.approx(2 * 10 * 2e9 / 3.35e12)  # bound by reading the weights


def test_names_and_numbers_that_are_wrong_are_told() -> None:
    with pytest.raises(UserError, match=r"--gpu: 'V100' is unknown; use A100, H100"):
        machine("V100")
    for text in ("0", "8,x", "2048", ""):
        with pytest.raises(UserError, match=r"--gpus: .* must be numbers from 1 to 1024"):
            ranks_of(text)
    assert ranks_of("8, 1,8") == [1, 8]


def test_the_ranks_of_a_cpu_share_its_memory() -> None:
    assert [machine("cpu", 16_000).memory_of_rank(ranks) for ranks in (1, 8)] == [16_000, 2_000]
    assert [machine("H100").memory_of_rank(ranks) for ranks in (1, 8)] == [80e9, 80e9]
    assert machine("cpu").memory_of_rank(8) is None


def test_the_command_writes_its_estimates(tmp_path: Path) -> None:
    raw = {
        "model": {"name": str(save_tiny(tmp_path / "model"))},
        "data": write_prompts(tmp_path / "data"),
        "layers": [1, 2],
        "train": {"micro_batch_size": 2, "device": "cuda", "global_batch_size": 16},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "es2fast.yaml").write_text("")  # an earlier run is no obstacle
    out = tmp_path / "plan.json"
    (tmp_path / "model" / "model.safetensors").unlink()  # config and tokenizer suffice
    command = ["plan", str(tmp_path / "run.yaml"), "--gpu", "a100", "--gpus", "1,8"]
    done = CliRunner().invoke(app, [*command, "--json", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "All numbers are estimates" in done.output and "assumed: 50%" in done.output
    found = json.loads(out.read_text())
    assert found["kind"] == "estimate" and found["dtype"] == "bf16"
    one, eight = found["ranks"]
    assert [one["global_batch_size_met"], eight["global_batch_size_met"]] == [False, True]
    assert one["fits"] and one["smallest_change"] == [] and one["zero_stage"] == 0
    memory = one["memory_bytes"]
    assert memory["total"] == pytest.approx(sum(memory.values()) - memory["total"])
    assert set(one["stages"]) == {"responses", "teacher_cache", "train", "evaluate"}
    kept = one["activation_bytes"]
    assert kept["checkpointed"] < kept["plain"] == memory["activations"]
    lora = [*command, "train.trainable=lora", "train.update_filter=1", "--json", str(out)]
    assert CliRunner().invoke(app, lora, catch_exceptions=False).exit_code == 0
    one, eight = (ranks["stages"] for ranks in json.loads(out.read_text())["ranks"])
    assert one["update_filter"]["tokens"] > 0 and list(one)[-2:] == ["update_filter", "evaluate"]
    assert one["update_filter"]["hours"] == pytest.approx(8 * eight["update_filter"]["hours"])


def test_a_run_s_figures_by_hand(tmp_path: Path) -> None:
    """Accumulation multiplies the work, hours are steps times seconds, the cache is one pass of
    2 flop per parameter and token, answers are one for each attack and one for harmless prompts, of
    base and tuned model; and what needs the last byte fits, with one tenth less it does not."""
    raw = {
        "model": {"name": str(save_tiny(tmp_path / "model"))},
        "data": write_prompts(tmp_path / "data"),
        "layers": [1, 2],
        "train": {"micro_batch_size": 2, "steps": 50},
        "evaluate": {"limit": 7, "max_new_tokens": 5, "attacks": ["direct", "scav"]},
        "deepspeed": "zero3",
        "output_dir": str(tmp_path / "run"),
    }
    plan = make_plan(without_machine(parse_config(raw)))
    twice = plan.config.train.model_copy(update={"gradient_accumulation": 2})
    more = dataclasses.replace(plan, config=plan.config.model_copy(update={"train": twice}))
    gpu = machine("h100")
    one, two = (Estimator(each, gpu, "bf16", None).on(2) for each in (plan, more))
    for part, flop in one["flop_per_step"].items():
        assert two["flop_per_step"][part] == pytest.approx(2 * flop)
    assert two["pairs_per_step"] == 2 * one["pairs_per_step"] == 8
    stages, shape = one["stages"], model_sizes(plan.config, plan.model)
    assert stages["train"]["hours"] == pytest.approx(50 * one["step_seconds"] / 3600)
    cache = stages["teacher_cache"]
    flop = 2 * shape.active * cache["tokens"]
    seconds = flop / (gpu.attainable * gpu.peak * 2)
    assert cache["hours"] == pytest.approx(seconds / 3600)
    rows = rows_of(plan)
    assert cache["tokens"] == sum(rows.prompts) + sum(rows.responses)
    assert stages["evaluate"]["tokens"] == 2 * 7 * (2 + 1) * 5
    needed = one["memory_bytes"]["total"]
    for memory, fits in ((needed / FILLED + 1, True), (0.9 * needed / FILLED, False)):
        small = dataclasses.replace(gpu, memory=memory)
        assert Estimator(plan, small, "bf16", None).fits(plan.config, 2) == fits


@pytest.mark.parametrize("train", [{}, {"packing": False}], ids=["packed", "padded"])
@pytest.mark.parametrize("positions", ["all", "response"])
def test_micro_batches_are_those_that_are_trained(
    tmp_path: Path, train: dict[str, Any], positions: str
) -> None:
    raw = {
        "model": {"name": str(save_tiny(tmp_path / "model")), "dtype": "fp32"},
        "data": write_prompts(tmp_path / "data"),
        "layers": [1, 2],
        "kl": {"positions": positions},
        "train": {"micro_batch_size": 3, "device": "cpu", "steps": 5} | train,
        "output_dir": str(tmp_path / "run"),
    }
    plan = make_plan(parse_config(raw))
    rows = rows_of(plan)
    works, padding = works_of(plan, rows, 1)
    feed = Feed(plan, plan.groups.harmless, rank=0)
    model = AutoModelForCausalLM.from_config(plan.model).config
    found, real = [], []
    for batch in [batch for step in range(5) for batch in feed(step)]:
        packed = packed_form(batch, model, plan.config.train.packing)
        assert (packed is not None) == (train == {})
        count, width = batch.input_ids.shape
        if packed is None:
            half = count * width // 2
            tokens = (2 * half, half, (2 * half * width, half * width), (0, 0), 0)
            real.append((batch.attention_mask.sum().item(), batch.attention_mask.numel()))
        else:
            size = packed.tokens
            sizes = [index.numel() for index in packed.rows.index]
            pairs = [index.numel() * index.shape[1] for index in packed.rows.index]
            gathered = (sum(sizes), sizes[1])
            tokens = (size, size - packed.harmful, (sum(pairs), pairs[1]), gathered, 0)
        given = objective_inputs(batch, packed)
        found.append((tokens, len(given["kl_index"])))
    known = [(dataclasses.astuple(work.tokens), work.kl_tokens) for _, work in works]
    assert known == found and [share for share, _ in works] == [pytest.approx(1 / 5)] * 5
    kept, computed = (sum(part) for part in zip(*real, strict=True)) if real else (1, 1)
    assert padding == pytest.approx(1 - kept / computed)
    assert dataclasses.astuple(largest(plan, rows)) == max(tokens for tokens, _ in found)


def test_a_part_of_the_steps_has_two_prefixes_by_simulated_attacks(tmp_path: Path) -> None:
    raw = {
        "model": {"name": str(save_tiny(tmp_path / "model")), "dtype": "fp32"},
        "data": write_prompts(tmp_path / "data"),
        "layers": [1, 2],
        "separation": {
            "robust": {"probability": 0.5, "attacks": ["mean_difference", "ablation"]},
        },
        "train": {"micro_batch_size": 3, "device": "cpu", "steps": 5, "teacher": "cache"},
        "output_dir": str(tmp_path / "run"),
    }
    plan = make_plan(parse_config(raw))
    works, _ = works_of(plan, rows_of(plan), 1)
    feed = Feed(plan, plan.groups.harmless, rank=0)
    packed = [pack(batch, apart) for batch in feed(0) for apart in (False, True)]
    found = [(work.tokens.lower, work.tokens.upper) for _, work in works[:2]]
    assert found == [(one.tokens, one.tokens - one.harmful) for one in packed]
    assert [share for share, _ in works[:2]] == [pytest.approx(0.15), pytest.approx(0.05)]
    assert sum(share for share, _ in works) == pytest.approx(1)
    shape = model_sizes(plan.config, plan.model)
    counted = mean_flops(shape, works, checkpointed=False)
    each = [flops(shape, work, checkpointed=False) for _, work in works]
    assert counted.student == pytest.approx(
        sum(share * one.student for (share, _), one in zip(works, each, strict=True))
    )
    assert counted.teacher == 0
