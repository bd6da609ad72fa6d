"""The tile loop of the pairwise separation losses: Gram GEMM -> pair pass -> gradient GEMMs.

Every pairwise loss here is ``sum_ij u_i v_j f(d_ij)`` with ``d_ij = ||a_i - b_j||``. With
``c_ij = u_i v_j f'(d_ij) / d_ij`` its gradients are

    grad_a_i = sum_j c_ij (a_i - b_j) = rowsum(C)_i a_i - (C b)_i
    grad_b_j = colsum(C)_j b_j - (C^T a)_j

The n x m matrix is cut into tiles of ``chunk_rows`` x ``COLUMNS``; one tile lives at once. Both
groups are centred by one shared mean, block by block in the accumulation dtype: distances and
gradients do not change, and the Gram form ``d^2 = |a|^2 + |b|^2 - 2 a.b`` keeps its digits. What
it still loses is lost where ``d^2`` is far below ``|a|^2 + |b|^2``: below ``CLOSE`` of it the
distance is recomputed from the difference itself, and below ``TOUCHING`` the gradient too (in
float32, at d = 1e-5 |a|, the Gram form has no digit left). Sums have a fixed order: results repeat
bit by bit.

Accumulation is float32 (float64 for float64 inputs). Finding close pairs costs one host
synchronization per tile on a GPU; the Triton backend has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = 4096  # of the n x m matrix in a tile
CPU_ROWS = 512  # 512 x 4096 float32 = 8 MB
GPU_ROWS = 4096
CLOSE = 1e-3  # of |a|^2 + |b|^2: Gram's relative error in d^2 is about 3e-7 / CLOSE there
TOUCHING = 1e-6  # of |a|^2 + |b|^2: rowsum(C) a - C b cancels to about 1e-4 there
LOG_FLOOR = 1e-12  # of d / scale: a duplicate pair costs 27.6 under loss "log", gradient 0
EXACT_ELEMENTS = 1 << 22  # of the difference vectors that exist at once
KINDS = ("hinge", "l2", "log", "softplus", "squared", "cosine")


@dataclass(frozen=True)
class PairSpec:
    """Which f: see :func:`pair_values`. ``cosine`` is on rows of length 1."""

    kind: str  # one of KINDS
    margin: float
    scale: float


@dataclass(frozen=True)
class PairProblem:
    """One call, checked: what a backend gets."""

    a: Tensor  # (n, H)
    b: Tensor  # (m, H)
    u: Tensor  # (n,) weights in the accumulation dtype; rows of weight 0 are ignored, NaN or not
    v: Tensor  # (m,)
    spec: PairSpec
    half: bool  # the user's rows are 16 bit: a 16-bit GEMM on the centred rows is allowed
    chunk_rows: int | None
    need_da: bool
    need_db: bool

    @property
    def need_grad(self) -> bool:
        return self.need_da or self.need_db

    @property
    def accum_dtype(self) -> torch.dtype:
        return self.u.dtype


@dataclass
class PairResult:
    """The loss and the gradients asked for, in the accumulation dtype."""

    loss: Tensor  # ()
    da: Tensor | None = None  # (n, H)
    db: Tensor | None = None  # (m, H)


# (squared distances (C, M), overwritten by the coefficients c_ij when ``need_grad``;
#  u (C,), v (M,), spec, need_grad) -> (C,) values u_i sum_j v_j f(d_ij).
# The plug for other implementations of the row work: float32 (or float64) tiles, rows contiguous
# with a stride of at least M; f and c as in pair_values, c = 0 wherever d = 0.
PairPass = Callable[[Tensor, Tensor, Tensor, PairSpec, bool], Tensor]


def pair_values(d2: Tensor, spec: PairSpec, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """(f(d), f'(d)/d) of squared distances; the quotient is 0 at d = 0 where f' is not.

    hinge relu(margin - d)/scale; l2 -d/scale; log -log(max(d/scale, LOG_FLOOR));
    softplus log(1 + exp((margin - d)/scale)); squared relu(margin^2 - d^2)/scale^2;
    cosine relu(1 - d^2/2 - margin), which is relu(cos - margin) on rows of length 1.
    """
    margin, scale = spec.margin, spec.scale
    if spec.kind == "squared":
        rest = margin**2 - d2
        return rest.relu() / scale**2, (rest > 0).to(d2.dtype) * (-2 / scale**2)
    if spec.kind == "cosine":
        rest = (1 - margin) - d2 / 2
        return rest.relu(), -(rest > 0).to(d2.dtype)
    d = d2.sqrt()
    if spec.kind == "log":
        floor = LOG_FLOOR * scale
        value = (d.clamp_min(floor) / scale).log().neg_()
        return value, torch.where(d > floor, -1 / d2, 0.0) if need_grad else None
    inverse = torch.where(d2 > 0, -1 / (scale * d), 0.0) if need_grad else None
    if spec.kind == "l2":
        return d / -scale, inverse
    rest = (margin - d) / scale
    if spec.kind == "hinge":
        return rest.relu(), None if inverse is None else inverse * (rest > 0)
    return (
        torch.nn.functional.softplus(rest, threshold=40.0),
        None if inverse is None else inverse * rest.sigmoid(),
    )


def torch_pair_pass(
    d2: Tensor, u: Tensor, v: Tensor, spec: PairSpec, need_grad: bool
) -> Tensor:  # (C,)
    """The pair pass in plain torch."""
    values, coefficients = pair_values(d2, spec, need_grad)
    if coefficients is not None:
        torch.mul(coefficients, v, out=d2).mul_(u[:, None])
    return (values @ v) * u


# --- centring -------------------------------------------------------------------------------------


def shared_mean(p: PairProblem) -> Tensor:  # (H,)
    """Mean over the rows of both groups that have a weight, in the accumulation dtype."""
    total = torch.zeros(p.a.shape[1], dtype=p.accum_dtype, device=p.a.device)
    count = torch.zeros((), dtype=p.accum_dtype, device=p.a.device)
    for rows, weights in ((p.a, p.u), (p.b, p.v)):
        for start in range(0, rows.shape[0], COLUMNS):
            kept = weights[start : start + COLUMNS, None] != 0
            block = rows[start : start + COLUMNS].to(p.accum_dtype)
            total += torch.where(kept, block, 0.0).sum(0)
            count += kept.sum()
    return total / count.clamp_min(1)


def centred(rows: Tensor, weights: Tensor, mean: Tensor) -> Tensor:
    """``rows - mean`` in the mean's dtype; rows of weight 0 become 0, so that NaN stays out."""
    return torch.where(weights[:, None] != 0, rows.to(mean.dtype) - mean, 0.0)


# --- the loop -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """Rows of one group: as given and centred, their squared norms and weights."""

    raw: Tensor  # (C, H)
    x: Tensor  # (C, H)
    sq: Tensor  # (C,)
    w: Tensor  # (C,)


def _block(rows: Tensor, weights: Tensor, mean: Tensor, start: int, size: int) -> _Block:
    part = slice(start, start + size)
    x = centred(rows[part], weights[part], mean)
    return _Block(rows[part], x, x.square().sum(1), weights[part])


def _differences(a: _Block, b: _Block, i: Tensor, j: Tensor) -> Tensor:  # (K, H)
    """a_i - b_j of the rows as given: centring rounds, and between neighbours that shows."""
    return a.raw[i].to(a.x.dtype) - b.raw[j].to(b.x.dtype)


def squared_distances(a: _Block, b: _Block) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(d^2 (C, M), exact where pairs are close; the indices of the touching pairs)."""
    sizes = a.sq[:, None] + b.sq
    d2 = torch.addmm(sizes, a.x, b.x.t(), alpha=-2)
    i, j = torch.nonzero(d2 < sizes.mul_(CLOSE), as_tuple=True)
    step = max(1, EXACT_ELEMENTS // max(1, a.x.shape[1]))
    touching = []
    for start in range(0, i.shape[0], step):
        rows, columns = i[start : start + step], j[start : start + step]
        counts = (a.w[rows] != 0) & (b.w[columns] != 0)
        exact = _differences(a, b, rows, columns).square().sum(1)
        d2[rows, columns] = torch.where(counts, exact, 0.0)
        touching.append(counts & (exact < sizes[rows, columns] * (TOUCHING / CLOSE)))
    if not touching:
        return d2, (i, j)
    kept = torch.cat(touching)
    return d2, (i[kept], j[kept])


def _gradients(
    c: Tensor,
    a: _Block,
    b: _Block,
    touching: tuple[Tensor, Tensor],
    da: Tensor | None,  # (C, H)
    db: Tensor | None,  # (M, H)
) -> None:
    """Add a tile's share: touching pairs by differences, the rest by GEMMs."""
    i, j = touching
    weights = c[i, j]
    c[i, j] = 0
    if da is not None:
        da.addcmul_(a.x, c.sum(1)[:, None]).addmm_(c, b.x, alpha=-1)
    if db is not None:
        db.addcmul_(b.x, c.sum(0)[:, None]).addmm_(c.t(), a.x, alpha=-1)
    step = max(1, EXACT_ELEMENTS // max(1, a.x.shape[1]))
    for start in range(0, i.shape[0], step):
        rows, columns = i[start : start + step], j[start : start + step]
        pull = _differences(a, b, rows, columns) * weights[start : start + step, None]
        if da is not None:
            da.index_put_((rows,), pull, accumulate=True)
        if db is not None:
            db.index_put_((columns,), -pull, accumulate=True)


def run_chunked(p: PairProblem, pair_pass: PairPass) -> PairResult:
    """Loss and the gradients asked for, tile by tile."""
    acc, device = p.accum_dtype, p.a.device
    n, m = p.a.shape[0], p.b.shape[0]
    chunk = p.chunk_rows or (CPU_ROWS if device.type == "cpu" else GPU_ROWS)
    mean = shared_mean(p)
    da = torch.zeros(p.a.shape, dtype=acc, device=device) if p.need_da else None
    db = torch.zeros(p.b.shape, dtype=acc, device=device) if p.need_db else None
    values = torch.zeros(n, dtype=acc, device=device)
    for left in range(0, m, COLUMNS):
        b = _block(p.b, p.v, mean, left, COLUMNS)
        db_tile = None if db is None else db[left : left + COLUMNS]
        for top in range(0, n, chunk):
            a = _block(p.a, p.u, mean, top, chunk)
            tile, touching = squared_distances(a, b)
            values[top : top + chunk] += pair_pass(tile, a.w, b.w, p.spec, p.need_grad)
            if p.need_grad:
                da_tile = None if da is None else da[top : top + chunk]
                _gradients(tile, a, b, touching, da_tile, db_tile)
    return PairResult(values.sum(), da, db)


def distance_tiles(a: Tensor, b: Tensor, chunk_rows: int) -> Iterator[Tensor]:
    """The distances of all pairs, tile by tile, without weights or gradient."""
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    u, v = (torch.ones(x.shape[0], dtype=dtype, device=x.device) for x in (a, b))
    spec = PairSpec("l2", 0.0, 1.0)
    mean = shared_mean(PairProblem(a, b, u, v, spec, False, chunk_rows, False, False))
    for left in range(0, b.shape[0], COLUMNS):
        columns = _block(b, v, mean, left, COLUMNS)
        for top in range(0, a.shape[0], chunk_rows):
            rows = _block(a, u, mean, top, chunk_rows)
            yield squared_distances(rows, columns)[0].clamp_min_(0).sqrt_()


def run_torch(problem: PairProblem) -> PairResult:
    """The ``torch`` backend: any device, any floating dtype."""
    return run_chunked(problem, torch_pair_pass)
