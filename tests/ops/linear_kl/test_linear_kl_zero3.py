"""Heads parted by DeepSpeed over two gloo processes, each with its own tokens, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from es2fast.ops import zero3
from tests.ops.linear_kl import zero3_ranks as ranks
from tests.ops.linear_kl.matrix import (
    BF16,
    VALUE_BOUND,
    gradient_bound,
    make_problem,
    oracle,
    relative,
)
from tests.ops.test_linear_ce import oracle as entropy_oracle

pytest.importorskip("deepspeed", reason="the heads are parted by DeepSpeed")
CASES = ranks.cases()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(ranks.worker, args=(2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_equal_to_float64_of_the_own_tokens(found, name):
    problem, count = CASES[name]
    for rank in (0, 1):
        got, own = found[rank][name], ranks.part(problem, count, rank)
        want = oracle(own)
        kl = float(want.loss.abs().mean()) if want.loss.numel() else 0.0
        assert got["loss"].shape == want.loss.shape and torch.equal(got["loss"], got["again"])
        assert relative(got["loss"], want.loss) <= VALUE_BOUND
        assert got["dx"].dtype == problem.hidden.dtype
        assert relative(got["dx"], want.dx) <= gradient_bound(problem.hidden.dtype, kl)


@pytest.mark.slow
@pytest.mark.parametrize("name", ranks.entropies())
def test_cross_entropy_equals_float64_on_the_whole_head(found, name):
    leaves, targets, weights, form, count = ranks.entropies()[name]
    scale, cap = form.get("logit_scale", 1.0), form.get("softcap")
    bound = 2e-6 if leaves[0].dtype == torch.float32 else 8e-3
    for rank, own in enumerate((slice(0, count), slice(count, None))):
        got = found[rank][f"entropy {name}"]
        mine = [leaves[0][own], *leaves[1:]]
        loss, top, gradients = entropy_oracle(mine, targets[own], weights[own], scale, cap)
        assert relative(got["loss"], loss) <= 1e-6
        assert torch.equal(got["hits"], top == targets[own])
        assert got["dx"].dtype == leaves[0].dtype
        assert relative(got["dx"], gradients[0]) <= bound


@pytest.mark.slow
@pytest.mark.parametrize("shape", (ranks.CUT, ranks.WHOLE), ids=("cut", "whole"))
def test_rows_and_bytes(found, shape):
    """Every row is on one rank; both calls' states, statistics and dX are what is exchanged."""
    h = shape["h"]
    rows = [rank[f"rows {h}"] for rank in found]
    assert torch.equal(torch.cat(rows), make_problem(BF16, n=ranks.TOKENS, **shape).weight)
    most, both = 5, 2  # tokens of the larger rank; calls with gradients and without
    states, counts, scales = 2 * (2 * h) * most, 3 * 8, 4 * most
    cut = 2 * h if shape is ranks.CUT else 0
    gathered = both * (states + counts + scales + cut + 24 * ranks.TOKENS)
    for rank in found:
        assert rank[f"bytes {h}"] == (gathered, 0, 2 * most * h * 4)


@pytest.mark.parametrize("ranks_", (1, 2, 3, 8))
@pytest.mark.parametrize(("vocab", "width"), ((127, 65), (128, 48), (257, 3), (1000, 64)))
def test_slices_cover_every_row_once(ranks_, vocab, width):
    """What a rank lacks of its last row is what the next has before its first."""
    size = -(-vocab * width // ranks_)
    shards = [zero3.Shard.of(rank, size, vocab, width) for rank in range(ranks_)]
    assert (shards[0].first, shards[-1].stop, shards[0].lead) == (0, vocab, 0)
    for rank, (shard, after) in enumerate(itertools.pairwise(shards)):
        assert shard.stop == after.first and shard.missing == after.lead
        assert shard.lead + (shard.stop - shard.first) * width == size + shard.missing, rank
    assert shards[-1].missing == 0


def test_heads_that_cannot_be_shared_are_refused():
    x = torch.randn(4, 8)
    for flat, bias, vocab, ranks_, message in (
        (torch.randn(40), None, 20, 2, r"flat_weight has shape \(40,\): expected \(80,\)"),
        (torch.randn(80), torch.randn(9), 20, 2, r"flat_bias has shape \(9,\): expected \(10,\)"),
        (torch.randn(11), None, 9, 7, "vocab_size=9: too few rows for 7 ranks"),
        (torch.randn(80).half(), None, 20, 2, "cast hidden"),
    ):
        with pytest.raises(ValueError, match=message):
            zero3.check_slices(x, flat, bias, vocab, ranks_)
