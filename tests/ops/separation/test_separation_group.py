"""Pairs across ranks: two gloo processes against one process that has all rows."""

from __future__ import annotations

import pytest
import torch

from tests.ops.separation import ranks
from tests.ops.separation.matrix import CASES, oracle, relative


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(ranks.worker, args=(2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("how", ("counted", "bounded"))
@pytest.mark.parametrize("layout", ranks.LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_equal_to_one_process(found, case, layout, how):
    p = ranks.problem(case, layout)
    want = oracle(p)
    gain = (want.da * p.harmful.double()).sum(0) + (want.db * p.harmless.double()).sum(0)
    results = [rank[case, layout, how] for rank in found]
    assert torch.equal(results[0]["loss"], results[1]["loss"])
    assert relative(results[0]["loss"], want.loss) < 2e-5
    for side, name in enumerate(("da", "db")):
        rows = torch.cat([r[name] for r in results])
        assert relative(rows, getattr(want, name)) < 2e-5
        for rank, r in enumerate(results):
            assert r[name].shape[0] == ranks.LAYOUTS[layout][rank][side]
    # a parameter's gradient: the sum over all rows cancels to a tenth of its terms
    assert relative(results[0]["gain"], gain) < 1e-4


def test_ranks_that_do_not_fit_are_told_so(found):
    assert all("differ between the ranks" in rank["mismatch"] for rank in found)
