"""Which run may go on from a checkpoint, and what becomes of states that ranks hold apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import save_tiny, write_prompts
from torch import nn

from es2fast.config import load_config
from es2fast.errors import UserError
from es2fast.training.bank import EmbeddingBank
from es2fast.training.plan import Plan, make_plan
from es2fast.training.same_run import changes, check_same_run, identity_of
from es2fast.training.weights import GoodWeights, TrainableWeights


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    raw = {
        "model": {"name": str(save_tiny(folder / "model")), "dtype": "fp32"},
        "data": write_prompts(folder / "data"),
        "layers": [1, 2],
        "train": {"device": "cpu"},
        "deepspeed": "zero3",
        "output_dir": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    return folder


def planned(project: Path, ranks: int, micro: int, accumulation: int = 1, *more: str) -> Plan:
    batch = [f"train.micro_batch_size={micro}", f"train.gradient_accumulation={accumulation}"]
    return make_plan(load_config(project / "run.yaml", [*batch, *more]), world_size=ranks)


def other_template(project: Path) -> Plan:
    """The same run when somebody has edited the template meanwhile."""
    path = project / "model" / "chat_template.jinja"
    before = path.read_text()
    path.write_text(before.replace("<bot>", "<bot><bot>", 1))
    plan = planned(project, 1, 4)
    path.write_text(before)
    assert "<bot>" in before
    return plan


def test_the_rows_of_a_step_decide(project: Path) -> None:
    written = identity_of(planned(project, 2, 2))
    for plan, words in (
        (planned(project, 2, 2), ""),
        (planned(project, 1, 4), ", written by 2 ranks at ZeRO stage 3, goes on with 1 rank at"),
        (planned(project, 4, 1, 1, "deepspeed=zero2"), "goes on with 4 ranks at ZeRO stage 2"),
        (planned(project, 1, 2, 2), "2 pairs of prompts meet in a micro-batch, 4 before"),
    ):
        check_same_run(written, plan)
        found = changes(written, plan)
        assert words in found and bool(words) == bool(found)
    for plan, words in (
        (
            planned(project, 1, 2),
            "train.global_batch_size: train.micro_batch_size 2 x train.gradient_accumulation 1 x 1 "
            "ranks = 2 pairs per step, but the unfinished run has 4; on 1 ranks "
            "train.micro_batch_size=4 and train.gradient_accumulation=1 continue it",
        ),
        (planned(project, 3, 1), "continue with a number of ranks that divides 4"),
        (
            planned(project, 1, 2, 2, "train.length_window=2"),
            "2 per micro-batch, but the unfinished run has 4, 4 per micro-batch; on 1 ranks "
            "train.micro_batch_size=4 and",
        ),
        (planned(project, 1, 4, 1, "model.dtype=bf16"), "model.dtype (fp32 there, bf16 now)"),
        (other_template(project), "another state of the chat template or the tokenizer"),
    ):
        with pytest.raises(UserError) as told:
            check_same_run(written, plan)
        assert words in str(told.value)
    many = written | {"gradient_accumulation": 3}  # 2 x 3 x 2 pairs
    with pytest.raises(UserError, match=r"on 6 ranks train\.micro_batch_size=1 and .*=2 cont"):
        check_same_run(many, planned(project, 6, 1))


def test_states_that_cannot_be_converted_ask_for_the_ranks_that_wrote_them(project: Path) -> None:
    own = 'deepspeed={"optimizer": {"type": "Lion"}, "zero_optimization": {"stage": 2}}'
    written = identity_of(planned(project, 2, 2, 1, own))
    check_same_run(written, planned(project, 2, 2, 1, own))
    with pytest.raises(UserError, match=r"deepspeed\.optimizer: .*; go back to 2 ranks at ZeRO st"):
        check_same_run(written, planned(project, 1, 4, 1, own))


def bank(size: int, ranks: int, rank: int, micro: int) -> EmbeddingBank:
    """After six micro-batches of `ranks` x `micro` pairs, whose rows are numbered."""
    found = EmbeddingBank(size, ranks)
    for step in range(6):
        first = (step * ranks + rank) * micro
        rows = torch.arange(first, first + micro, dtype=torch.float32)[:, None]
        found.add(7, rows, 100 + rows)
    return found


@pytest.mark.parametrize(
    ("before", "after"), [((2, 1), (1, 2)), ((1, 4), (4, 1)), ((2, 2), (4, 1))]
)
@pytest.mark.parametrize("size", [3, 4, 8])
def test_banked_rows_are_dealt_out_by_age(
    before: tuple[int, int], after: tuple[int, int], size: int
) -> None:
    """Together the ranks hold what they would hold, had they been as many from the start, but for
    rows of the oldest micro-batch, which may be cut elsewhere."""
    states = [bank(size, before[0], rank, before[1]).state_dict() for rank in range(before[0])]
    kept = before[0] * -(-size // before[0])
    held: dict[str, list[set[float]]] = {"anew": [], "always": []}
    for rank in range(after[0]):
        anew = EmbeddingBank(size, after[0])
        anew.load_state_dict(anew.parted(states, rank), torch.device("cpu"))
        always = bank(size, after[0], rank, after[1])
        for name, found in (("anew", anew), ("always", always)):
            rows = found.rows(7)
            assert rows is not None and torch.equal(rows[1], 100 + rows[0])
            share = min(-(-size // after[0]), kept // after[0] if name == "anew" else size)
            assert len(rows[0]) == share  # as many on every rank
            held[name].append(set(rows[0].flatten().tolist()))
    together = {name: set().union(*sets) for name, sets in held.items()}
    pairs = before[0] * before[1]
    oldest = {value // pairs for value in together["always"] ^ together["anew"]}
    assert len(oldest) <= 1 and oldest <= {min(together["always"]) // pairs}


def parted(values: list[torch.Tensor], rank: int, ranks: int) -> TrainableWeights:
    """The weights as ZeRO-3 leaves them on a rank: flat, padded, an equal share each."""
    model = nn.ParameterList()
    for value in values:
        parameter: Any = nn.Parameter(torch.empty(0))
        share = -(-value.numel() // ranks)
        flat = torch.zeros(share * ranks)
        flat[: value.numel()] = value.flatten()
        parameter.ds_tensor = flat[rank * share : (rank + 1) * share].clone()
        parameter.ds_numel = value.numel()
        model.append(parameter)
    return TrainableWeights(model)


def whole(values: list[torch.Tensor]) -> TrainableWeights:
    return TrainableWeights(nn.ParameterList([nn.Parameter(value.clone()) for value in values]))


@pytest.mark.parametrize("before", [0, 2, 3])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_the_last_good_weights_are_parted_anew(before: int, after: int) -> None:
    """0 ranks stand for a stage below 3, where rank 0 has all of them."""
    torch.manual_seed(0)
    values = [torch.randn(3, 5), torch.randn(7), torch.randn(1)]

    def of(ranks: int, rank: int) -> TrainableWeights:
        return parted(values, rank, ranks) if ranks else whole(values)

    states = []
    for rank in range(before or 1):
        good = GoodWeights(of(before, rank), every=1)
        good.before_step(1)
        good.measured(True, kl=0.5)
        states.append(good.state_dict())
    if not before:  # rank 1 below stage 3
        states.append(states[0] | {"values": []})
    for rank in range(after or 1):
        weights = of(after, rank)
        again = GoodWeights(weights, every=1)
        again.load_state_dict(again.parted(states, rank))
        assert again.copy is not None and (again.copy.step, again.copy.kl) == (0, 0.5)
        for found, right in zip(again.copy.values, weights.copy(), strict=True):
            assert torch.equal(found, right)
