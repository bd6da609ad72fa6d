"""The simulated attack: when it happens, what it pushes, and that the blocks above see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from es2fast.attacks.states.ablation import ablated
from es2fast.attacks.states.mean_difference import MeanDifference
from es2fast.attacks.states.scav import Scav
from es2fast.config import Config, parse_config
from es2fast.distributed.runtime import Runtime
from es2fast.errors import UserError
from es2fast.modeling.sublayers import added
from es2fast.modeling.taps import Intervention, SeparationTaps, backbone
from es2fast.training.robust import SimulatedAttack, attacked_blocks

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


@pytest.mark.parametrize("name", ["mean_difference", "replacement", "ablation", "scav"])
def test_where_a_step_is_attacked_is_known_before_it(name: str) -> None:
    simulated = SimulatedAttack(config(attacks=[name]), [1, 3], ALONE)
    before = [simulated.where(step) for step in range(1, 30)]
    simulated.observe(states(), 40)
    attacks = [simulated.for_step(step) for step in range(1, 30)]
    assert before == [None if attack is None else attack.where for attack in attacks]
    assert len(set(before)) == 2


def test_steps_are_clean_until_a_probe_can_be_fitted() -> None:
    simulated = SimulatedAttack(config(attacks=["scav"], probability=0.9), [1, 3], ALONE)
    for _ in range(4):
        assert all(simulated.for_step(step) is None for step in range(1, 20))
        simulated.observe(states(1), 1)
    assert any(simulated.for_step(step) is not None for step in range(1, 20))


def attacks_of(simulated: SimulatedAttack, count: int = 200) -> list[Intervention]:
    found = (simulated.for_step(step) for step in range(1, count))
    return [attack for attack in found if attack is not None]


def changed(attack: Intervention, layer: int, sample: Tensor, row: int = 0) -> Tensor:
    """States (k, H) of the step's harmful row `row`."""
    return attack.change(layer, sample, torch.full((len(sample),), row))


@pytest.mark.parametrize("name", ["mean_difference", "scav"])
def test_the_push_is_that_of_the_evaluations_attack(name: str) -> None:
    simulated = SimulatedAttack(config(attacks=[name]), [1, 3], ALONE)
    simulated.observe(states(), 40)
    reference = MeanDifference() if name == "mean_difference" else Scav()
    reference.fit(*({i: v[part] for i, v in states().items()}
                    for part in (slice(0, 40), slice(40, 80))))  # fmt: skip
    found = attacks_of(simulated)
    assert {attack.layers for attack in found} == {frozenset({1, 3})}
    sample = states()[1][:5]
    for attack in found:
        assert attack.where == "onwards" and attack.name == name
        pushes = [changed(attack, 1, sample, row) - sample for row in range(4)]
        pushed = [row for row, push in enumerate(pushes) if push.any()]
        for row in pushed:
            torch.testing.assert_close(pushes[row], reference.push(1, sample),
                                       rtol=1e-4, atol=1e-5)  # fmt: skip
        # each row at a block of its own, in turn
        assert pushed in ([[0, 1, 2, 3]] if name == "scav" else [[0, 2], [1, 3]])


def test_scav_acts_where_and_as_strongly_as_its_search_tries() -> None:
    raw: dict[str, Any] = {"model": {"name": "m"}, "refusal": {"weight": 1.0}}
    raw["separation"] = {"robust": {"probability": 0.9, "attacks": ["scav"], "blocks": "all"}}
    simulated = SimulatedAttack(parse_config(raw), [1, 3], ALONE, depth=6)
    generator = torch.Generator().manual_seed(0)
    rows = {i: torch.randn(80, 8, generator=generator) for i in range(6)}
    for value in rows.values():
        value[:40] += 2.0
    simulated.observe(rows, 40)
    reference = Scav()
    reference.fit({i: v[:40] for i, v in rows.items()}, {i: v[40:] for i, v in rows.items()})
    shapes, aims, tokens = set(), [], set()
    for attack in attacks_of(simulated):
        tokens.add(attack.where)
        own: list[list[int]] = [[], [], [], []]
        for layer in attack.layers:
            sample = rows[layer][:5] + 4.0  # all of them well above what is aimed at
            for row in range(4):
                found = changed(attack, layer, sample, row)
                if not torch.equal(found, sample):
                    own[row].append(layer)
                    aims.append(reference.probes[layer].logit(found).sigmoid())
                    torch.testing.assert_close(aims[-1], aims[-1][:1].expand(5), rtol=1e-3, atol=0)
        if own[0] == own[1]:
            assert own == [own[0]] * 4
            shapes.add("middle" if sorted(own[0]) == [2, 3] else len(own[0]))
        else:  # a block for each row
            assert all(len(one) == 1 for one in own) and len({one[0] for one in own}) == 4
            shapes.add("single")
    assert shapes == {"single", "middle", 6} and tokens == {"last", "onwards"}
    probabilities = torch.stack(aims)[:, 0]
    assert 0.9e-5 < probabilities.min() < 3e-5 and 3e-3 < probabilities.max() < 1.1e-2


def test_strengths_are_drawn_from_the_range() -> None:
    simulated = SimulatedAttack(config(strength=[0.5, 2.0]), [1, 3], ALONE)
    simulated.observe(states(), 40)
    rows = states()
    sizes = []
    for attack in attacks_of(simulated):
        own = []
        for layer in (1, 3):
            gap = (rows[layer][40:].mean(0) - rows[layer][:40].mean(0)).norm()
            found = [
                changed(attack, layer, torch.zeros(1, 8), row).norm() / gap for row in range(4)
            ]
            pushed = [float(size) for size in found if size > 0]
            assert len(pushed) == 2  # others at their own block
            own += pushed
        assert len(set(own)) == 4
        sizes += own
    assert 0.5 <= min(sizes) < 0.7 and 1.8 < max(sizes) <= 2.0


def test_ablation_leaves_no_component_and_replacement_only_the_mean() -> None:
    both = config(attacks=["ablation", "replacement"])
    simulated = SimulatedAttack(both, [1, 3], ALONE, depth=5)
    simulated.observe(states(), 40)
    found = attacks_of(simulated)
    assert {attack.name for attack in found} == {"ablation", "replacement"}
    rows, sample = states(), torch.randn(6, 8)
    directions = [
        (v[:40].double().mean(0) - v[40:].double().mean(0)).float() for v in rows.values()
    ]
    for attack in found:
        if attack.name == "ablation":
            assert attack.where == "all" and attack.layers == frozenset(range(4))
            gone = []
            for row in range(2):
                along = changed(attack, 0, sample, row)
                left = [(along @ r).abs().max() / r.norm() for r in directions]
                gone.append([one < 1e-5 for one in left])
            assert sorted(gone) == [[False, True], [True, False]]  # a direction for each row
        else:
            assert attack.where == "last"
            for layer in attack.layers:
                expected = rows[layer][40:].mean(0).expand(6, 8)
                two = [changed(attack, layer, sample, row) for row in (0, 1)]
                assert sum(torch.equal(one, sample) for one in two) == 1
                one = next(one for one in two if not torch.equal(one, sample))
                torch.testing.assert_close(one, expected)


def test_attacks_reach_every_block_only_with_an_anchor() -> None:
    def of(robust: dict[str, Any], anchor: float = 0.0) -> list[int]:
        raw = {"model": {"name": "m"}, "separation": {"robust": {"probability": 0.5} | robust},
               "refusal": {"weight": anchor}}  # fmt: skip
        return attacked_blocks(parse_config(raw), [1, 3], 6)

    assert of({}) == [1, 3]
    assert of({"attacks": ["ablation"]}) == [0, 1, 2, 3]
    assert of({"attacks": ["ablation"]}, 1.0) == list(range(6))
    assert of({"blocks": "all"}, 1.0) == list(range(6))
    with pytest.raises(UserError, match="'all' without a refusal anchor"):
        of({"blocks": "all"})
    with pytest.raises(UserError, match="strength"):
        of({"strength": [2.0, 1.0]})


def test_only_the_most_recent_states_are_kept() -> None:
    simulated = SimulatedAttack(config(states=40), [1, 3], ALONE)
    simulated.observe(states(shift=50.0), 40)
    simulated.observe(states(shift=2.0), 40)
    attack = attacks_of(simulated)[0]
    pushes = [changed(attack, 1, torch.zeros(1, 8), row).mean() for row in (0, 1)]
    assert min(pushes) == pytest.approx(-2.0, abs=0.5) and max(pushes) == 0.0


@pytest.mark.parametrize(
    "where, changed", [("last", {(0, 2)}), ("onwards", {(0, 2), (0, 3)}),
                       ("all", {(0, 0), (0, 1), (0, 2), (0, 3)})]
)  # fmt: skip
def test_an_intervention_changes_harmful_rows_at_its_positions_alone(
    where: Any, changed: set[tuple[int, int]]
) -> None:
    model = tiny_model("llama").double()
    ids = torch.tensor([[1, 4, 10, 16], [1, 4, 8, 12]])
    attack = Intervention(frozenset({2}), lambda layer, states, rows: states * 0.0 + 7.0, where)
    seen: list[Tensor] = []
    taps = SeparationTaps(model, [0, 2], attacked=[0, 1, 2])
    handle = model.model.layers[2].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    taps.arm(torch.tensor([2, 3]), 1, attack, keep=True)
    backbone(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    taps.remove()
    handle.remove()
    sevens = (seen[0] == 7.0).all(-1)
    assert {tuple(place) for place in sevens.nonzero().tolist()} == changed
    assert taps.outputs.keys() == {0, 1, 2} and not (taps.outputs[2][0] == 7.0).all()


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "olmo2", "glm4"])
def test_the_simulated_ablation_is_that_of_the_evaluation(family: str) -> None:
    model = tiny_model(family).double()
    ids = torch.tensor([[1, 4, 10, 16, 5, 23], [1, 4, 9, 17, 5, 22], [1, 4, 8, 12, 13, 5]])
    mask = torch.ones_like(ids)
    raw: dict[str, Any] = {"model": {"name": "m"}, "refusal": {"weight": 1.0}}
    raw["separation"] = {"robust": {"probability": 0.9, "attacks": ["ablation"], "blocks": "all"}}
    simulated = SimulatedAttack(parse_config(raw), [1, 2], ALONE, depth=4)
    generator = torch.Generator().manual_seed(0)
    simulated.observe({i: torch.randn(8, 32, generator=generator) for i in range(4)}, 4)
    attack = next(a for a in map(simulated.for_step, range(1, 50)) if a is not None)

    def direction(row: int) -> Tensor:
        minus = changed(attack, 0, torch.eye(32), row) - torch.eye(32)  # -r r^T
        unit = minus[:, minus.diagonal().abs().argmax()]
        return (unit / unit.norm()).double()

    parts = [(i, part) for i, block in enumerate(model.model.layers) for part in added(block)]
    taps = SeparationTaps(model, [1, 2], attacked=range(4), parts=parts)
    taps.arm(torch.tensor([5, 5, 5]), 2, attack, keep=True)
    found = backbone(model)(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    taps.remove()
    plain = backbone(model)(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    assert (direction(0) @ direction(1)).abs() < 0.9
    for row in (0, 1):
        with ablated(model, direction(row)):
            attacked = backbone(model)(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        torch.testing.assert_close(found[row], attacked[row], rtol=1e-4, atol=1e-4)
        assert (attacked[row] - plain[row]).abs().max() > 0.05
    torch.testing.assert_close(found[2], plain[2])


def test_ablated_directions_are_those_of_the_middle_blocks() -> None:
    raw: dict[str, Any] = {"model": {"name": "m"}, "refusal": {"weight": 1.0}}
    raw["train"] = {"micro_batch_size": 2, "gradient_accumulation": 2}
    raw["separation"] = {"robust": {"probability": 0.9, "blocks": "all",
                                    "attacks": ["ablation", "mean_difference"]}}  # fmt: skip
    simulated = SimulatedAttack(parse_config(raw), [1, 2], ALONE, depth=10)
    rows = {i: torch.zeros(2, 10) for i in range(10)}
    for i in range(10):
        rows[i][0, i] = 1.0  # each block's difference of the means lies along its own axis
    simulated.observe(rows, 1)
    ablated_along, pushed = set(), set()
    for attack in attacks_of(simulated, 300):
        if attack.name == "ablation":
            own = [int(changed(attack, 0, torch.eye(10), row).diagonal().argmin())
                   for row in range(4)]  # fmt: skip
            assert len(set(own)) == 4
            ablated_along |= {*own}
        else:
            assert len(attack.layers) == 4  # as many as rows
            pushed |= attack.layers
    assert ablated_along == {3, 4, 5, 6, 7} and pushed == set(range(10))


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
    both = Intervention(
        frozenset({0, 2}), lambda i, states, rows: states + (states * 0.3 + 0.1 * (i + 1)).detach()
    )
    taps.arm(torch.tensor([5, 5]), 1, both)
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
