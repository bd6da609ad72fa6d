"""The separation losses against loops written out by hand, in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from es2fast.ops.reference import pairwise_distances, separation

LOSSES = ["hinge", "l2", "log", "softplus", "squared", "centroid"]


def groups(n: int = 3, m: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, 5, dtype=torch.float64, generator=generator)
    return a, torch.randn(m, 5, dtype=torch.float64, generator=generator) + 1


@pytest.mark.parametrize("loss", LOSSES)
def test_values(loss: str) -> None:
    a, b = groups()
    margin, scale = 3.0, 1.7
    d = [math.dist(x, y) for x in a.tolist() for y in b.tolist()]
    expected = {
        "hinge": sum(max(margin - x, 0) for x in d) / len(d) / scale,
        "l2": -sum(d) / len(d) / scale,
        "log": -sum(math.log(x / scale) for x in d) / len(d),
        "softplus": sum(math.log1p(math.exp((margin - x) / scale)) for x in d) / len(d),
        "squared": sum(max(margin**2 - x * x, 0) for x in d) / len(d) / scale**2,
        "centroid": max(margin - math.dist(a.mean(0).tolist(), b.mean(0).tolist()), 0) / scale,
    }[loss]
    found = separation(a, b, loss=loss, margin=margin, scale=scale)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_values_without_a_margin() -> None:
    a, b = groups()
    d = [math.dist(x, y) for x in a.tolist() for y in b.tolist()]
    squared = separation(a, b, loss="squared", scale=1.7)
    assert squared.item() == pytest.approx(-sum(x * x for x in d) / len(d) / 1.7**2, rel=1e-12)
    centroid = separation(a, b, loss="centroid", scale=1.7)
    between = math.dist(a.mean(0).tolist(), b.mean(0).tolist())
    assert centroid.item() == pytest.approx(-between / 1.7, rel=1e-12)


def test_weights_cosine_and_mahalanobis() -> None:
    a, b = groups()
    w = torch.tensor([2.0, 0.0, 1.0])
    repeated = separation(a[[0, 0, 2]], b, loss="l2")
    assert separation(a, b, loss="l2", harmful_weights=w).item() == pytest.approx(repeated.item())

    def cosine(x: list[float], y: list[float]) -> float:
        return sum(p * q for p, q in zip(x, y)) / math.hypot(*x) / math.hypot(*y)

    cosines = [max(cosine(x, y) - 0.1, 0) for x in a.tolist() for y in b.tolist()]
    found = separation(a, b, loss="cosine", margin=0.1)
    assert found.item() == pytest.approx(sum(cosines) / len(cosines), rel=1e-12)
    covariance = torch.diag(torch.tensor([4.0, 1, 1, 9, 1], dtype=torch.float64))
    scaled = torch.tensor([0.5, 1, 1, 1 / 3, 1], dtype=torch.float64)
    found = separation(a, b, loss="fisher", covariance=covariance)
    assert found.item() == pytest.approx(separation(a * scaled, b * scaled, loss="l2").item())


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss: str) -> None:
    a, b = (group.requires_grad_() for group in groups())
    assert torch.autograd.gradcheck(
        lambda x, y: separation(x, y, loss=loss, margin=3.0, scale=1.7), (a, b)
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_points_and_empty_groups_have_finite_gradients(loss: str) -> None:
    a = torch.ones(2, 4, requires_grad=True)
    separation(a, torch.ones(3, 4), loss=loss, margin=1.0).backward()
    assert a.grad is not None and a.grad.isfinite().all()
    empty = torch.ones(0, 4, requires_grad=True)
    value = separation(empty, a, loss=loss, margin=1.0)
    assert value.item() == 0 and value.requires_grad


def test_the_hinge_is_at_rest_beyond_the_margin() -> None:
    a, b = groups()
    far = (a + 100).requires_grad_()
    value = separation(far, b, loss="hinge", margin=3.0)
    value.backward()
    assert value.item() == 0
    assert far.grad is not None and not far.grad.any()


def test_distances_do_not_cancel_far_from_the_origin() -> None:
    a = torch.tensor([[1e4, 0.0]])
    assert pairwise_distances(a, a + 0.5)[0, 0].item() == pytest.approx(0.5 * 2**0.5, rel=1e-6)


def test_mistakes() -> None:
    a, b = groups()
    with pytest.raises(ValueError, match="margin"):
        separation(a, b, loss="hinge")
    with pytest.raises(ValueError, match="unknown loss 'huber'"):
        separation(a, b, loss="huber", margin=1.0)
