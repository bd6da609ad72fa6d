"""`deepspeed: auto`: what is counted, what is estimated, what is picked, on all ranks alike."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_models import save_tiny, tiny_model, write_prompts
from torch import multiprocessing

from es2fast.config import parse_config
from es2fast.distributed.memory import cpu_memory, memory_per_rank
from es2fast.errors import UserError
from es2fast.modeling.teacher import set_trainable
from es2fast.training.activations import Tokens
from es2fast.training.memory import Estimate, estimate, model_sizes
from es2fast.training.shape import Block, Product, Shape
from es2fast.training.stage import choose_stage, lightest, pick
from training import head_ranks, stage_ranks

BLOCK = Block(
    products=(
        *(Product(100, 100, 1, True, 0, "self_attn", last) for last in (False, False, False, True)),
        *(Product(100, 300, 1, True, 0, "mlp", False) for _ in range(2)),
        Product(300, 100, 1, True, 0, "mlp", True),
    ),
    attention=100, keys=100, heads=4, norms=2, norms_trained=2, parameters=10**8,
)  # fmt: skip
SIZES = Shape(total=10**9, trained=10**8, active=1e9, hidden=100, vocabulary=1000,
              blocks=(BLOCK,) * 10, deepest=9, head_trained=False, experts=False,
              tied=False)  # fmt: skip


def need(stage: int, each: float, workspace: float) -> Estimate:
    return Estimate(stage, each, each, 1e9, 1e9, 0.0, 0.0, 0.0, workspace)


SMALL, SPLIT = need(2, 4e9, 1e9), need(3, 1e9, 2e9)
BOTH = {0: need(0, 6e9, 1e9), 2: SMALL, 3: SPLIT}


def needs(
    stage: int,
    ranks: int,
    device: str,
    dtype: str,
    live: int = 10**8,
    sharded: bool = False,
    shape: Shape = SIZES,
    robust: dict[str, Any] | None = None,
    **train: Any,
) -> Estimate:
    raw = {"model": {"name": "m"}, "layers": [0, 1], "separation": {"robust": robust or {}}}
    config = parse_config(raw | {"train": {"micro_batch_size": 1} | train})
    zero = {"stage": stage, "reduce_bucket_size": 10**6, "stage3_max_live_parameters": live}
    return estimate(
        config, shape, zero, world_size=ranks, device=device, dtype=dtype,
        tokens=Tokens.padded(1, 1, 100), sharded=sharded,
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("train", "layers"),
    [
        ({"trainable": "blocks"}, [0, 2]),
        ({"trainable": "blocks", "trainable_blocks": "all"}, [0, 2]),
        ({"trainable": "lora", "lora": {"r": 4}}, [1]),
        ({"trainable": "all"}, [1]),
    ],
)
def test_counts_are_those_of_the_loaded_model(
    train: dict[str, Any], layers: list[int], tied: bool
) -> None:
    config = parse_config({"model": {"name": "m"}, "train": train, "layers": layers})
    model = tiny_model("qwen3", tie_word_embeddings=tied)
    found = model_sizes(config, model.config)
    assert found.total == sum(p.numel() for p in model.parameters())
    student = set_trainable(model, config.train, max(layers))
    assert found.trained == sum(p.numel() for p in student.parameters() if p.requires_grad)


def test_layers_that_are_chosen_later_count_as_the_deepest_possible() -> None:
    def trained(layers: Any) -> int:
        config = parse_config({"model": {"name": "m"}, "layers": layers})
        return model_sizes(config, tiny_model("llama", num_hidden_layers=10).config).trained

    assert trained("auto") == trained([0, 8]) > trained([0, 7])


def test_lora_targets_that_do_not_exist_are_named() -> None:
    raw = {"model": {"name": "m"}, "train": {"trainable": "lora", "lora": {"targets": ["nowhere"]}}}
    with pytest.raises(UserError, match=r"train\.lora\.targets.*nowhere"):
        model_sizes(parse_config(raw), tiny_model("llama").config)


@pytest.mark.parametrize(("dtype", "item"), [("bf16", 2), ("fp32", 4)])
def test_stages_share_what_they_partition(dtype: str, item: int) -> None:
    for ranks in (1, 4):
        two, three = (needs(stage, ranks, "cuda", dtype) for stage in (2, 3))
        assert (two.weights, two.teacher) == (item * 1e9, item * 1e8)  # it shares what is frozen
        assert three.weights == three.teacher == item * 1e9 / ranks
        assert two.optimizer == three.optimizer == 12 * 1e8 / ranks
        assert two.gradients == three.gradients == item * 1e8 / ranks
        assert needs(1, ranks, "cuda", dtype).gradients == item * 1e8
        assert (two.gathers, three.gathers) == (0, pytest.approx(item * 10**8))
        assert needs(3, ranks, "cuda", dtype, live=10**10).total > two.total  # nothing is let go


def test_a_sharded_head_has_fewer_logits_and_is_not_gathered() -> None:
    def both(ranks: int, device: str = "cuda", dtype: str = "bf16") -> tuple[Estimate, Estimate]:
        whole, parted = (
            needs(3, ranks, device, dtype, live=10**10, sharded=sharded)
            for sharded in (False, True)
        )
        return whole, parted

    head, own = 1000 * 100, 2 * 2 * 100 * 100  # of SIZES, with 100 tokens behind the last block
    whole, parted = both(4)
    assert whole.head - own == 8 * 100 * 1000
    # the tokens of all four ranks: of student and teacher, their gradient in float32, twice
    assert parted.head - own == 8 * 400 * 1000 / 4 + (2 + 2 + 4 + 4) * 400 * 100
    assert whole.gathers - parted.gathers == 2 * 2 * head  # the teacher's is gathered with it
    tied = dataclasses.replace(SIZES, tied=True)  # the embedding is gathered anyway
    assert needs(3, 4, "cuda", "bf16", live=10**10, sharded=True, shape=tied).gathers == (
        whole.gathers
    )
    # more tokens than a chunk, and plain torch's thirteen copies in float32
    assert both(64)[1].head - own == 8 * 1024 * 1000 / 64 + 12 * 6400 * 100
    assert both(4, dtype="fp32")[1].head - 2 * own == 52 * 400 * 1000 / 4 + 16 * 400 * 100
    assert both(4, device="cpu")[1].head - own == 52 * 256 * 1000 / 4 + 12 * 400 * 100


@pytest.mark.slow
def test_a_sharded_head_takes_what_is_estimated(tmp_path: Path) -> None:
    """More tokens of both ranks than a chunk holds, in plain torch."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process cannot be read here")
    tokens, vocab, width = 300, 80_000, 64  # 41 MB a copy: malloc gives each back at once
    multiprocessing.spawn(head_ranks.worker, (tokens, vocab, width, str(tmp_path)), nprocs=2)
    config = parse_config({"model": {"name": "m"}})
    shape = dataclasses.replace(SIZES, vocabulary=vocab, hidden=width)
    head = estimate(
        config, shape, {"stage": 3}, world_size=2, device="cpu", dtype="fp32",
        tokens=Tokens.padded(1, 1, tokens), sharded=True,
    ).head  # fmt: skip
    for rank in (0, 1):
        got = int((tmp_path / f"peak-{rank}").read_text())
        assert got == pytest.approx(head, rel=0.1)


def test_lora_has_no_teacher_and_checkpoints_fewer_activations() -> None:
    plain = needs(2, 2, "cuda", "bf16")
    assert needs(2, 2, "cuda", "bf16", trainable="lora").teacher == 0
    fewer = needs(2, 2, "cuda", "bf16", gradient_checkpointing=True)
    # bf16: two normalised states, two inputs, four rows of attention, four inner ones; fp32 inputs
    kept = 2 * (4 * 100 + 4 * 100 + 4 * 300) + 4 * 2 * 100  # bytes per token and block
    final = 4 * 100 * 100
    assert plain.activations == final + 200 * 10 * kept
    assert fewer.activations == final + 200 * (10 * 2 * 100 + kept)


def test_a_cpu_also_holds_the_copies_that_a_gpu_leaves_to_it() -> None:
    assert needs(2, 2, "cpu", "fp32").workspace > 4e9  # the finished model, gathered on rank 0


def test_stage_3_only_where_stage_2_does_not_fit() -> None:
    stage, reason = pick(BOTH, int(14e9), ranks=2)
    assert stage == 2 and reason.startswith("11 GB per rank of 14 GB (weights 4, teacher 4, ")
    stage, reason = pick(BOTH, int(13e9), ranks=2)  # 80 % of it are 10.4
    assert stage == 3 and "may fail" not in reason
    assert reason.startswith("stage 2 would need 11 GB per rank, stage 3 6 GB per rank of 13 GB")


def test_what_fits_nowhere_takes_the_least_and_says_so() -> None:
    stage, reason = pick(BOTH, int(7e9), ranks=2)
    assert stage == 3 and "above 80% and may fail" in reason and "train.trainable=lora" in reason
    stage, reason = pick(BOTH, int(7e9), ranks=1)  # nobody to share with
    assert stage == 2 and "may fail" in reason
    wide = dataclasses.replace(SPLIT, workspace=9e9)  # gathers more than it shares
    assert pick(BOTH | {3: wide}, int(7e9), ranks=2)[0] == 2


def test_the_stage_is_chosen_by_what_a_sharded_head_takes(monkeypatch: Any) -> None:
    model = tiny_model("llama", tie_word_embeddings=False, vocab_size=200_000).config
    seen = []

    def watched(estimates: dict[int, Estimate], *rest: Any) -> tuple[int, str]:
        seen.append(estimates[3])
        return pick(estimates, *rest)

    monkeypatch.setattr("es2fast.training.stage.pick", watched)
    for way in ("gathered", "sharded"):
        config = parse_config({"model": {"name": "m"}, "train": {"zero3_head": way}})
        choose_stage(config, model, world_size=4, device="cpu", dtype="fp32", longest=32)
    assert seen[0].gathers - seen[1].gathers == pytest.approx(2 * 4 * 200_000 * 32)


def test_states_that_attacks_are_fitted_on_lie_on_a_gpu() -> None:
    robust = {"probability": 0.5, "attacks": ["mean_difference"], "states": 100}
    for device, expected in (("cuda", 2 * 4 * 50 * 2 * SIZES.hidden), ("cpu", 0)):
        seen = [needs(2, 2, device, "bf16", robust=one).workspace for one in (robust, None)]
        assert seen[0] - seen[1] == pytest.approx(expected)


def test_nothing_is_partitioned_where_nobody_gains_by_it() -> None:
    def light(ranks: int, device: str, dtype: str, accumulation: int = 1) -> int:
        return lightest(ranks=ranks, device=device, dtype=dtype, accumulation=accumulation)[0]

    assert light(1, "cpu", "fp32") == light(2, "cpu", "fp32") == light(1, "cuda", "fp32") == 0
    assert light(1, "cuda", "bf16") == light(1, "cpu", "bf16") == 0
    assert light(8, "cuda", "bf16") == light(8, "cuda", "fp32") == 2
    assert light(8, "cuda", "bf16", accumulation=2) == 1
    stage, reason = pick(BOTH, int(20e9), 2, 0, "nothing has to be partitioned")
    assert stage == 0 and reason.startswith("it fits and nothing has to be partitioned; 15 GB")
    assert pick(BOTH, int(15e9), 2, 0, "nothing has to be partitioned")[0] == 2


def test_memory_that_is_not_known_counts_as_little() -> None:
    assert pick(BOTH, None, ranks=2)[0] == 3
    stage, reason = pick(BOTH, None, ranks=1)
    assert stage == 2 and "not known" in reason


def test_ranks_of_a_machine_share_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr("es2fast.distributed.memory.MEMINFO", meminfo)
    meminfo.write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 1000 kB\n")
    assert cpu_memory() == 1_024_000
    assert memory_per_rank("cpu", 4) == 256_000
    limit = tmp_path / "limit"
    monkeypatch.setattr("es2fast.distributed.memory.CONTAINER", (limit,))
    limit.write_text("max\n")
    assert cpu_memory() == 1_024_000
    limit.write_text("512000\n")
    assert cpu_memory() == 512_000
    meminfo.write_text("MemTotal: 9000 kB\n")
    assert cpu_memory() is None and memory_per_rank("cpu", 4) is None


@pytest.mark.slow
def test_ranks_with_unequal_memory_take_the_same_stage(tmp_path: Path) -> None:
    """By its own memory rank 0 would take stage 0, rank 1 stage 3: a run of both would hang."""
    model = save_tiny(tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    settings |= {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    (model / "config.json").write_text(json.dumps(settings))
    save_file({"unused": torch.zeros(1)}, model / "model.safetensors")  # a plan loads no weights
    raw = {
        "model": {"name": str(model), "dtype": "fp32"},
        "data": write_prompts(tmp_path / "data"),
        "train": {"device": "cpu"},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    available = [10**13, 10**11]
    multiprocessing.spawn(stage_ranks.worker, (available, str(tmp_path)), nprocs=2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [one["alone"] for one in found] == [0, 3]
    assert [one["stage"] for one in found] == [3, 3]
    assert found[0]["line"] == found[1]["line"]
