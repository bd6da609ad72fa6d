"""The teacher moments on real distributions: the toy chat model's own tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.moments_accuracy import Case, moments_gradient, toy_cases
from es2fast import half_head, moment_kl_div, teacher_moments
from tests.ops.linear_kl.matrix import relative
from tests.ops.moments.matrix import GRADIENT_BOUND, VALUE_BOUND


@pytest.fixture(scope="module")
def cases(toy: Path) -> list[Case]:
    """Perturbed states, and states after real steps of separation."""
    return list(toy_cases(toy))


@pytest.mark.parametrize("kind", ("toy, perturbed", "toy, tuned"))
def test_value_and_gradient_on_real_tokens(cases, kind):
    seen = []
    for case in cases:
        truth = case.oracle()
        if case.name != kind or truth.kl < 1.5e-4:  # the cases aim at 2e-4
            continue
        seen.append(truth.kl)
        for w in (case.w, half_head(case.w).weight):
            moments = teacher_moments(case.x_t, w)
            dx, rounded = moments_gradient(case, moments, w)
            assert relative(dx, truth.dx) <= GRADIENT_BOUND, (truth.kl, w.dtype)
            loss = moment_kl_div(case.x, w, moments, reduction="none")
            for got in (rounded, loss):
                assert (got.double() - truth.values).abs().max() <= VALUE_BOUND
    assert min(seen) < 2e-3 < max(seen)
