"""The sampler is a pure function of (seed, step), whatever the number of ranks."""

from __future__ import annotations

from collections import Counter

import pytest

from es2fast.data import PairedSampler
from es2fast.errors import UserError


def sampler(rank=0, world=1, micro=4, accumulation=2, seed=0, harmful=10, harmless=7):
    return PairedSampler(
        harmful,
        harmless,
        seed=seed,
        micro_batch_size=micro,
        gradient_accumulation=accumulation,
        rank=rank,
        world_size=world,
    )


def test_purity():
    one, other = sampler(), sampler()
    forward = [one.indices(step) for step in range(12)]
    backward = [other.indices(step) for step in reversed(range(12))]
    assert forward == backward[::-1]
    assert one.indices(5) == forward[5]


def test_seeds_and_groups_differ():
    assert sampler(seed=1).indices(0) != sampler(seed=2).indices(0)
    pairs = sampler(harmful=50, harmless=50).indices(0)
    assert any(harmful != harmless for harmful, harmless in pairs)


def test_known_values_stay():
    """A change here breaks the resumption of every run made before it."""
    assert sampler().indices(0) == [
        ([9, 7, 6, 3], [0, 3, 6, 2]),
        ([8, 2, 4, 1], [5, 4, 1, 1]),
    ]


@pytest.mark.parametrize(("size", "group"), [(10, 0), (7, 1)])
def test_every_epoch_covers_every_row_once(size, group):
    made = sampler()
    steps = 35  # 280 rows: 28 epochs of 10, 40 of 7
    stream = [row for step in range(steps) for pair in made.indices(step) for row in pair[group]]
    assert len(stream) == 280
    epochs = [stream[i : i + size] for i in range(0, len(stream), size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > len(epochs) // 2  # reshuffled


@pytest.mark.parametrize(("world", "micro"), [(2, 2), (4, 1)])
def test_ranks_slice_the_same_global_micro_batch(world, micro):
    whole = sampler()
    ranks = [sampler(rank=rank, world=world, micro=micro) for rank in range(world)]
    for step in range(9):
        parts = [rank.indices(step) for rank in ranks]
        for j, (harmful, harmless) in enumerate(whole.indices(step)):
            assert [row for part in parts for row in part[j][0]] == harmful
            assert [row for part in parts for row in part[j][1]] == harmless


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("world, micro, accumulation", [(1, 4, 2), (2, 2, 2), (4, 1, 2), (2, 4, 1)])
def test_a_row_of_a_step_has_one_place_however_rows_are_shared_out(
    world, micro, accumulation, window
):
    def placed(world: int, micro: int, accumulation: int) -> dict[int, int]:
        """Place -> harmful row, of step 3."""
        found = {}
        for rank in range(world):
            one = PairedSampler(
                30,
                30,
                seed=0,
                micro_batch_size=micro,
                gradient_accumulation=accumulation,
                rank=rank,
                world_size=world,
                lengths=([7 * i % 30 for i in range(30)], [5] * 30),
                window=window,
            )
            for places, (harmful, _) in zip(one.places(), one.indices(3), strict=True):
                found |= dict(zip(places, harmful, strict=True))
        return found

    found = placed(world, micro, accumulation)
    assert sorted(found) == list(range(8))
    if window == 1:
        assert found == placed(1, 8, 1)
    else:  # sorted within global micro-batches
        assert found == placed(1, micro * world, accumulation)


def test_groups_smaller_than_a_batch_still_give_full_micro_batches():
    made = sampler(harmful=1, harmless=3)
    for harmful, harmless in made.indices(4):
        assert harmful == [0, 0, 0, 0] and len(harmless) == 4
    assert max(Counter(made.indices(0)[0][1]).values()) == 2


def test_epochs():
    assert sampler().epochs(5) == {"harmful": 4.0, "harmless": 40 / 7}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"harmful": 0}, "data.harmful: 0 is too few"),
        ({"harmless": 0}, "data.harmless: 0 is too few"),
        ({"micro": 0}, "train.micro_batch_size: 0 is too few"),
        ({"accumulation": 0}, "train.gradient_accumulation: 0 is too few"),
        ({"rank": 2, "world": 2}, "rank: 2 is out of range; there are 2 ranks"),
    ],
)
def test_errors(change, expected):
    with pytest.raises(UserError, match=expected):
        sampler(**change)
    with pytest.raises(UserError, match="step: -1 is negative"):
        sampler().indices(-1)


@pytest.mark.parametrize("share", [0.25, 0.4, 0.5])
def test_borderline_rows_fill_their_share_evenly(share):
    made = PairedSampler(
        10, 9, seed=0, micro_batch_size=4, gradient_accumulation=1, rank=0, world_size=1,
        num_borderline=3, borderline_share=share,
    )  # fmt: skip
    steps = 45
    stream = [row for step in range(steps) for _, rows in made.indices(step) for row in rows]
    rare = [row for row in stream if row >= 6]
    assert len(rare) == round(share * 4 * steps)
    for window in range(0, len(stream), 20):
        assert sum(row >= 6 for row in stream[window : window + 20]) == round(20 * share)
    for rows, count in ((rare, 3), ([row for row in stream if row < 6], 6)):
        whole = rows[: len(rows) // count * count]
        times = Counter(whole)
        assert set(times.values()) == {len(whole) // count}
    epochs = made.epochs(steps)
    assert epochs["borderline"] == pytest.approx(len(rare) / 3)
    assert epochs["harmless"] == pytest.approx((len(stream) - len(rare)) / 6)


def test_without_others_or_without_any_borderline_rows_are_one_stream():
    plain = sampler()
    for count in (0, 7):
        made = PairedSampler(
            10, 7, seed=0, micro_batch_size=4, gradient_accumulation=2, rank=0, world_size=1,
            num_borderline=count,
        )  # fmt: skip
        assert [made.indices(s) for s in range(9)] == [plain.indices(s) for s in range(9)]


def test_ranks_share_the_borderline_rows_too():
    def of(rank, world, micro):
        return PairedSampler(
            10, 9, seed=3, micro_batch_size=micro, gradient_accumulation=1, rank=rank,
            world_size=world, num_borderline=4,
        )  # fmt: skip

    for step in range(8):
        ((_, whole),) = of(0, 1, 4).indices(step)
        parts = [of(rank, 2, 2).indices(step)[0][1] for rank in (0, 1)]
        assert parts[0] + parts[1] == whole


LENGTHS = ([7 * i % 23 for i in range(37)], [11 * i % 53 for i in range(53)])


def by_length(rank=0, world=1, micro=4, window=4, **options):
    return PairedSampler(
        37, 53, seed=5, micro_batch_size=micro, gradient_accumulation=1, rank=rank,
        world_size=world, lengths=LENGTHS, window=window, **options,
    )  # fmt: skip


def test_rows_of_like_length_share_a_batch_and_an_epoch_still_has_every_row_once():
    def padding(made):
        places = tokens = 0
        for step in range(53):
            for rows in made.indices(step)[0][1:]:
                lengths = [LENGTHS[1][row] for row in rows]
                places, tokens = places + 4 * max(lengths), tokens + sum(lengths)
        return 1 - tokens / places

    made = by_length()
    assert [made.indices(s) for s in range(30)] == [
        by_length().indices(s) for s in reversed(range(30))
    ][::-1]
    for group, size in ((0, 37), (1, 53)):
        stream = [row for step in range(size) for row in made.indices(step)[0][group]]
        epochs = [stream[i : i + size] for i in range(0, 4 * size, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 4
    assert padding(made) < 0.5 * padding(by_length(window=1))


@pytest.mark.parametrize(("world", "micro"), [(2, 2), (4, 1)])
def test_ranks_share_a_batch_of_like_lengths_alike(world, micro):
    ranks = [by_length(rank, world, micro) for rank in range(world)]
    for step in range(40):
        ((harmful, harmless),) = by_length().indices(step)
        parts = [rank.indices(step)[0] for rank in ranks]
        for group, whole in enumerate((harmful, harmless)):
            assert sorted(row for part in parts for row in part[group]) == sorted(whole)
            assert all(len(part[group]) == micro for part in parts)
            dealt = [parts[i % world][group][i // world] for i in range(4)]
            assert dealt == whole


def test_borderline_rows_keep_their_share_when_sorted_by_length():
    made = by_length(num_borderline=8, borderline_share=0.25)
    stream = [row for step in range(64) for row in made.indices(step)[0][1]]
    rare = [row for row in stream if row >= 45]
    assert len(rare) == 64 and set(Counter(rare).values()) == {8}
