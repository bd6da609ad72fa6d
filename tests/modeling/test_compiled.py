"""Compiled blocks compute what plain ones do, whatever is hooked onto them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from torch._dynamo.utils import counters

from es2fast.errors import UserError
from es2fast.modeling.compiled import check_compiler, check_stage, compile_blocks, is_compiled
from es2fast.modeling.sublayers import sublayers
from es2fast.modeling.taps import Intervention, SeparationTaps, backbone, blocks, position_ids

HARMFUL = 2
CLEAN = None
OUTSIDE = Intervention(frozenset([0]), lambda layer, states, rows: 0.5 * states)
INSIDE = Intervention(frozenset([0]), lambda layer, states, rows: 0.5 * states, "all", inside=True)


def loss_and_gradient(
    model: Any, taps: SeparationTaps, length: int, attack: Intervention | None
) -> tuple[Tensor, Tensor]:
    """Of tapped states and the harmless rows' final ones, for 5 padded rows."""
    draw = torch.Generator().manual_seed(length)
    ids = torch.randint(6, 20, (5, length), generator=draw)
    mask = (torch.arange(length) < torch.arange(length - 4, length + 1)[:, None]).long()
    taps.arm(mask.sum(-1) - 1, HARMFUL, attack)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}
    final = backbone(model)(**inputs, use_cache=False).last_hidden_state
    assert len(final) == len(ids) - HARMFUL
    loss = final[mask[HARMFUL:].bool()].square().mean() + taps.states[0].square().mean()
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow
def test_taps_cuts_and_attacks_are_those_of_plain_blocks() -> None:
    model = tiny_model("llama", num_hidden_layers=2).train().requires_grad_(False)
    first = blocks(model)[0].requires_grad_(True)
    names = list(model.state_dict())
    taps = SeparationTaps(
        model, [0], attacked=[0, 1], parts=[(0, part) for part in sublayers(first)]
    )
    steps = [(9, CLEAN), (9, OUTSIDE), (9, INSIDE), (13, INSIDE), (13, CLEAN), (17, OUTSIDE)]
    plain = [loss_and_gradient(model, taps, *step) for step in steps]
    compile_blocks(model, lambda: taps.acts_inside)
    assert all(map(is_compiled, blocks(model))) and list(model.state_dict()) == names
    counters.clear()
    graphs = []
    for step, (loss, gradient) in zip(steps, plain):
        found = loss_and_gradient(model, taps, *step)
        graphs.append(counters["stats"]["unique_graphs"])
        torch.testing.assert_close(found[0], loss, rtol=1e-5, atol=0)
        assert relative(found[1], gradient) <= 1e-5
    assert graphs == [2] * len(steps)  # one of each block, whatever the length and the attack
    assert not counters["graph_break"]


@pytest.fixture
def no_compiler() -> Iterator[None]:
    import torch._inductor.config as inductor
    from torch._inductor.utils import fresh_cache

    with inductor.patch({"cpp.cxx": ("/no/such/compiler",)}), fresh_cache():
        torch._dynamo.reset()
        yield
    torch._dynamo.reset()


def test_a_missing_compiler_is_one_line(no_compiler: None) -> None:
    with pytest.raises(UserError, match=r"train\.compile: .* fails here .*=false") as told:
        check_compiler(torch.device("cpu"))
    assert "\n" not in str(told.value)


def test_zero_3_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.compile: true, but under ZeRO stage 3"):
        check_stage(3)
