"""AdamW on fp32 copies of bf16 weights: torch's AdamW in fp32, rounded for the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from es2fast.training import master_adamw
from es2fast.training.master_adamw import MasterAdamW

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.98), "weight_decay": 0.1}


def weights() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (11,), (3, 4, 2)]
    return [nn.Parameter(torch.randn(s, generator=draw).bfloat16()) for s in shapes]


def set_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("largest", [0.5, 1e9])
def test_steps_are_those_of_fp32_weights(
    largest: float, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """together: as on a GPU, two groups of one tensor and of two."""
    monkeypatch.setattr(master_adamw, "CHUNK", 4)
    if together:
        monkeypatch.setattr(master_adamw, "TOGETHER", 36)
        monkeypatch.setattr(master_adamw, "_at_once", lambda p: p.numel() <= 36)
    ours = weights()
    plain = [nn.Parameter(p.detach().double()) for p in ours]
    mine, reference = MasterAdamW(ours, **OPTIONS), torch.optim.AdamW(plain, **OPTIONS)
    for seed in range(4):
        set_gradients(ours, seed)
        for p, q in zip(ours, plain):
            q.grad = p.grad.double()  # type: ignore[union-attr]
        expected = nn.utils.clip_grad_norm_(plain, largest)
        assert mine.clip(largest).item() == pytest.approx(expected.item(), rel=1e-6)
        mine.step()
        reference.step()
        for p, q in zip(ours, plain):
            torch.testing.assert_close(
                mine.state[p]["master"].double(), q.data, rtol=1e-5, atol=1e-6
            )
            assert torch.equal(p.data, mine.state[p]["master"].bfloat16())


def test_groups_are_of_one_precision_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(master_adamw, "TOGETHER", 10)
    sizes = ((6, torch.bfloat16), (3, torch.float32), (4, torch.bfloat16), (1, torch.bfloat16))
    every = [torch.zeros(n, dtype=dtype) for n, dtype in sizes]
    place = {id(p): number for number, p in enumerate(every)}
    found = [[place[id(p)] for p in some] for some in master_adamw._groups(every)]
    assert found == [[0, 2], [3], [1]]


def test_going_on_from_a_file_is_going_on(tmp_path: Path) -> None:
    def run(parameters: list[nn.Parameter], optimizer: MasterAdamW, seeds: range) -> None:
        for seed in seeds:
            set_gradients(parameters, seed)
            optimizer.step()

    straight = weights()
    run(straight, MasterAdamW(straight, **OPTIONS), range(6))
    first = weights()
    stopped = MasterAdamW(first, **OPTIONS)
    run(first, stopped, range(3))
    torch.save([stopped.state_dict(), first], tmp_path / "state")
    state, second = torch.load(tmp_path / "state", weights_only=False)
    resumed = MasterAdamW(second, **OPTIONS)
    resumed.load_state_dict(state)
    run(second, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight, second))
