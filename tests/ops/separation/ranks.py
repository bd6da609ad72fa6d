"""Two real processes compute pairs across ranks; started by test_separation_group.py.

Each rank holds its rows of one global problem and writes the loss and its rows' gradients, after
the engine's convention: the loss times the number of ranks, gradients averaged over the ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from es2fast import pairwise_separation
from es2fast.distributed.runtime import stop
from tests.ops.separation.matrix import CASES, FP32, make_problem

H = 24
# rows per rank: ragged, empty on one side, empty on one rank
LAYOUTS = {
    "even": ((4, 5), (4, 5)),
    "ragged": ((3, 6), (5, 2)),
    "one side": ((4, 0), (0, 5)),
    "one rank": ((0, 0), (4, 5)),
    "nothing": ((0, 3), (0, 2)),
}


def problem(case: str, layout: str):
    counts = LAYOUTS[layout]
    n, m = (sum(c[side] for c in counts) for side in (0, 1))
    return make_problem(case, FP32, n=n, m=m, h=H, mean=3.0, weights=layout == "ragged")


def own(tensor: torch.Tensor, layout: str, side: int, rank: int) -> torch.Tensor:
    counts = [c[side] for c in LAYOUTS[layout]]
    return tensor[sum(counts[:rank]) :][: counts[rank]]


def call(case: str, layout: str, rank: int, **more):
    """(loss, averaged gradient of a scale shared by all rows, own rows' gradients)."""
    p = problem(case, layout)
    options = dict(p.options)
    for side, name in enumerate(("harmful_weights", "harmless_weights")):
        if name in options:
            options[name] = own(options[name], layout, side, rank)
    gain = torch.ones(H, requires_grad=True)  # a parameter of the model
    rows = [own(x, layout, side, rank) * gain for side, x in enumerate((p.harmful, p.harmless))]
    for x in rows:
        x.retain_grad()
    loss = pairwise_separation(*rows, group=dist.group.WORLD, **options, **more)
    (dist.get_world_size() * loss).backward()
    dist.all_reduce(gain.grad)
    return dict(
        loss=loss.detach(),
        gain=gain.grad / dist.get_world_size(),
        da=rows[0].grad / dist.get_world_size(),
        db=rows[1].grad / dist.get_world_size(),
    )


def worker(rank: int, world: int, folder: str) -> None:
    """Every case and layout, both ways of knowing the row counts; results to the folder."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    found = {}
    for case in CASES:
        for layout in LAYOUTS:
            found[case, layout, "counted"] = call(case, layout, rank)
            found[case, layout, "bounded"] = call(case, layout, rank, max_rows=(6, 7))
    try:
        pairwise_separation(torch.zeros(1, 2 + rank), torch.zeros(1, 2 + rank), loss="l2",
                            group=dist.group.WORLD)  # fmt: skip
    except ValueError as error:
        found["mismatch"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    stop()
