"""RepE's direction, sign and unit against scikit-learn and rigged pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA, TruncatedSVD
from torch import Tensor

from es2fast.attacks.states.repe import RepE, RepESettings, direction, middle_blocks

H = 7


def groups(n: int = 30, m: int = 30, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two clouds some way apart, of other spread along each axis."""
    noise = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.5, 1.5, H)
    shift = torch.tensor([2.0, -2.0, 1.0, 0, 0, 0, 0.4])
    return (
        torch.randn(n, H, generator=noise) * spread + shift,
        torch.randn(m, H, generator=noise) * spread - shift,
    )


def same_line(found: Tensor, wanted: np.ndarray) -> bool:
    return abs(float(found.double() @ torch.from_numpy(wanted).double())) > 1 - 1e-6


def test_the_vector_is_scikit_learns_component_of_uncentred_differences() -> None:
    harmful, _ = groups()
    same = torch.full((30, H), 0.25)  # one harmless state for all: any pairing is the same
    found = direction(harmful, same)
    differences = (harmful - same).double().numpy()
    svd = TruncatedSVD(n_components=1, algorithm="arpack", random_state=0).fit(differences)
    both = PCA(n_components=1, svd_solver="full").fit(np.concatenate([differences, -differences]))
    centred = PCA(n_components=1, svd_solver="full").fit(differences)
    assert same_line(found.vector, svd.components_[0])
    assert same_line(found.vector, both.components_[0])
    assert not same_line(found.vector, centred.components_[0])
    assert found.vector.norm() == pytest.approx(1.0, abs=1e-6)


def test_pairs_are_drawn_by_the_seed_and_the_order_of_the_groups_does_not_matter_much() -> None:
    harmful, harmless = groups(30, 24)
    first, again, other = (direction(harmful, harmless, seed) for seed in (0, 0, 1))
    assert torch.equal(first.vector, again.vector)
    assert not torch.equal(first.vector, other.vector)
    assert float(first.vector @ other.vector) > 0.9
    assert not same_line(
        first.vector, torch.linalg.svd((harmful[:24] - harmless).double()).Vh[0].numpy()
    )


@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_the_sign_is_that_of_most_pairs_even_against_the_means(flip: float) -> None:
    along = torch.tensor([1.0] * 6 + [-3.0] * 4) * flip  # harmful - harmless
    harmful = torch.zeros(10, H)
    harmful[:, 2] = along
    found = direction(harmful, torch.zeros(10, H))
    expected = torch.zeros(H)
    expected[2] = -flip  # six of ten harmful states come closer to the harmless one
    torch.testing.assert_close(found.vector, expected)
    assert found.gap == pytest.approx(0.6)  # of the means: |(6 - 12) / 10|


def test_strength_one_moves_mean_to_mean_along_the_vector_and_scales() -> None:
    harmful, harmless = groups()
    attack = RepE(RepESettings(layers=[0]))
    attack.fit({0: harmful}, {0: harmless})
    assert attack.layers() == [0] and attack.strength == 1.0
    push = attack.push(0, harmful)
    v = attack.directions[0].vector
    torch.testing.assert_close((harmful + push).mean(0) @ v, harmless.mean(0) @ v)
    across = push - (push @ v)[:, None] * v
    assert across.norm() < 1e-5 * push.norm()
    attack.strength = 0.25
    torch.testing.assert_close(attack.push(0, harmful), 0.25 * push)


def test_scale_of_the_space_is_taken_out() -> None:
    harmful, harmless = groups()
    one, stretched = RepE(RepESettings(layers=[0])), RepE(RepESettings(layers=[0]))
    one.fit({0: harmful}, {0: harmless})
    stretched.fit({0: 8 * harmful}, {0: 8 * harmless})
    torch.testing.assert_close(stretched.push(0, harmful), 8 * one.push(0, harmful))


def test_about_five_middle_blocks_are_pushed() -> None:
    assert middle_blocks(24) == [11, 12, 13, 14, 15]
    assert middle_blocks(8) == [3, 4]
    assert middle_blocks(1) == [0] and middle_blocks(2) == [0]
    for depth in range(1, 100):
        found = middle_blocks(depth)
        assert 1 <= len(found) <= 5 and found == sorted(set(found))
        assert all(0.5 <= (i + 1) / depth <= 0.7 for i in found) or len(found) == 1
    assert middle_blocks(80)[0] == 39 and middle_blocks(80)[-1] == 55
    states = {i: groups()[0] for i in range(8)}
    attack = RepE()
    attack.fit(states, {i: groups()[1] for i in range(8)})
    assert attack.settings.positions == "all"
    assert attack.candidates(8) == [[3, 4], *([i] for i in range(8))]
    attack = RepE(RepESettings(layers=[6, 1]))
    attack.fit(states, states)
    assert attack.candidates(8) == [[1, 6], [1], [6]]
