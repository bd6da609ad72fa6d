"""The simulated attack: when it happens, what it pushes, and that the blocks above see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from es2fast.attacks.states.mean_difference import MeanDifference
from es2fast.attacks.states.scav import Scav
from es2fast.config import Config, parse_config
from es2fast.distributed.runtime import Runtime
from es2fast.modeling.taps import SeparationTaps, backbone
from es2fast.training.robust import SimulatedAttack

ALONE = Runtime(rank=0, world_size=1, device=torch.device("cpu"), dtype="fp32")


def config(**robust: Any) -> Config:
    return parse_config(
        {"model": {"name": "m"}, "separation": {"robust": {"probability": 0.5} | robust}}
    )


def states(count: int = 40, shift: float = 2.0) -> dict[int, Tensor]:
    """layer -> harmful rows, then as many harmless ones, well apart."""
    generator = torch.Generator().manual_seed(0)
    rows = {layer: torch.randn(2 * count, 8, generator=generator) for layer in (1, 3)}
    for value in rows.values():
        value[:count] += shift
    return rows


def test_the_same_steps_are_attacked_everywhere_and_none_before_states_are_known() -> None:
    runs = []
    for _ in range(2):
        simulated = SimulatedAttack(config(), [1, 3], ALONE)
        assert all(simulated.for_step(step) is None for step in range(1, 20))
        simulated.observe(states(), 40)
        runs.append([simulated.for_step(step) is not None for step in range(1, 201)])
    assert runs[0] == runs[1]
    assert 70 < sum(runs[0]) < 130
    never = SimulatedAttack(parse_config({"model": {"name": "m"}}), [1, 3], ALONE)
    never.observe(states(), 40)
    assert all(never.for_step(step) is None for step in range(1, 50))


@pytest.mark.parametrize("name", ["mean_difference", "scav"])
def test_the_push_is_that_of_the_evaluations_attack(name: str) -> None:
    simulated = SimulatedAttack(config(attack=name), [1, 3], ALONE)
    simulated.observe(states(), 40)
    reference = MeanDifference() if name == "mean_difference" else Scav()
    reference.fit(*({i: v[part] for i, v in states().items()}
                    for part in (slice(0, 40), slice(40, 80))))  # fmt: skip
    pushes = [p for p in (simulated.for_step(step) for step in range(1, 60)) if p is not None]
    sample = states()[1][:5]
    pushed = [[bool(push(layer, sample).any()) for layer in (1, 3)] for push in pushes]
    if name == "scav":
        assert all(both == [True, True] for both in pushed)
    else:  # one block at a time, both in turn
        assert {tuple(one) for one in pushed} == {(True, False), (False, True)}
    push = next(p for p, at in zip(pushes, pushed) if at[0])
    if name == "mean_difference":
        while push(1, sample).abs().sum() == 0:
            push = next(p for p in (simulated.for_step(s) for s in range(60, 99)) if p)
    torch.testing.assert_close(push(1, sample), reference.push(1, sample))


def test_only_the_most_recent_states_are_kept() -> None:
    simulated = SimulatedAttack(config(states=40), [1, 3], ALONE)
    simulated.observe(states(shift=50.0), 40)
    simulated.observe(states(shift=2.0), 40)
    push = next(p for p in (simulated.for_step(step) for step in range(1, 60)) if p is not None)
    layer = 1 if push(1, states()[1]).any() else 3
    assert push(layer, states()[layer])[0].mean() == pytest.approx(-2.0, abs=0.5)


def stream(model: Any, ids: Tensor, pushes: dict[int, Tensor]) -> list[Tensor]:
    """Block outputs of one unpadded row (1, T), block by block, pushed at the last position."""
    core = model.model
    hidden = core.embed_tokens(ids)
    places = torch.arange(ids.shape[1])[None]
    rotary = core.rotary_emb(hidden, places)
    outputs = []
    for i, block in enumerate(core.layers):
        hidden = block(hidden, attention_mask=None, position_ids=places, position_embeddings=rotary)
        if i in pushes:
            last = hidden[:, -1:] + pushes[i]
            hidden = torch.cat([hidden[:, :-1], last], dim=1)
        outputs.append(hidden)
    return outputs


@pytest.mark.parametrize("space", ["residual", "normed"])
def test_blocks_above_read_the_pushed_state_and_the_gradient_goes_through(space: str) -> None:
    model = tiny_model("llama").double()
    ids = torch.tensor([[1, 4, 10, 16, 5, 23], [1, 4, 8, 12, 13, 5]])
    taps = SeparationTaps(model, [0, 2], space)
    taps.arm(torch.tensor([5, 5]), 1, lambda layer, states: states * 0.3 + 0.1 * (layer + 1))
    backbone(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    taps.remove()
    clean = taps.outputs
    pushes = {i: clean[i][:1] * 0.3 + 0.1 * (i + 1) for i in (0, 2)}
    for row, pushed in ((0, pushes), (1, {})):
        outputs = stream(model, ids[row : row + 1], pushed)
        for i in (0, 2):
            expected = outputs[i][0, -1]
            if space == "normed":
                expected = model.model.layers[i + 1].input_layernorm(expected)
            torch.testing.assert_close(taps.states[i][row], expected, rtol=1e-6, atol=1e-6)
            assert not clean[i].requires_grad
    weight = model.model.layers[0].mlp.down_proj.weight
    along = torch.linspace(-1.0, 2.0, 32).double()
    found = torch.autograd.grad(taps.states[2][0] @ along, weight)[0]
    last = stream(model, ids[:1], pushes)[2][0, -1]
    if space == "normed":
        last = model.model.layers[3].input_layernorm(last)
    expected = torch.autograd.grad(last @ along, weight)[0]
    assert (found - expected).norm() <= 1e-6 * expected.norm()  # pushes are made in fp32
