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

COLUMNS = 2048  # of the n x m matrix in a tile
CPU_ROWS = 512  # 512 x 2048 float32 = 4 MB
GPU_ROWS = 4096
CLOSE = 1e-3  # of |a|^2 + |b|^2: Gram's relative error in d^2 is about 3e-7 / CLOSE there
TOUCHING = 1e-6  # of |a|^2 + |b|^2: rowsum(C) a - C b cancels to about 1e-4 there
LOG_FLOOR = 1e-12  # of d / scale: a duplicate pair costs 27.6 under loss "log", gradient 0
EXACT_ELEMENTS = 1 << 22  # of the difference vectors that exist at once
# The numbers of csrc/kernels.h.
KIND = {"hinge": 0, "l2": 1, "log": 2, "softplus": 3, "squared": 4, "cosine": 5}
# d^2 (C, M), and (i, j) of the pairs that are close, if there are any.
Distances = tuple[Tensor, tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class PairSpec:
    """Which f: see :func:`pair_values`. ``cosine`` is on rows of length 1."""

    kind: str  # a key of KIND
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
    masked: bool  # some weights may be 0
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
# The plug for other implementations of the row work: contiguous float32 (or float64) tiles that may
# be destroyed; f and c as in pair_values: c is finite at d = 0, 0 there where f'/d is infinite.
PairPass = Callable[[Tensor, Tensor, Tensor, PairSpec, bool], Tensor]


def pair_values(d2: Tensor, spec: PairSpec, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """(f(d), f'(d)/d) of squared distances, which it destroys; the quotient is 0 at d = 0.

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
    d = d2.sqrt_()  # in place where possible: fresh memory costs page faults, more than the sums
    gap = None if spec.kind in ("l2", "log") else (margin - d).div_(scale)
    if spec.kind == "log":
        values, unused = (d / scale).clamp_min_(LOG_FLOOR).log_().neg_(), d <= LOG_FLOOR * scale
    elif gap is None:
        values, unused = d / -scale, d == 0
    elif spec.kind == "softplus":
        values, unused = torch.nn.functional.softplus(gap, threshold=40.0), d == 0
    else:
        values, unused = gap.relu(), (d == 0).logical_or_(gap <= 0)
    if not need_grad:
        return values, None
    coefficient = d.reciprocal_()
    if spec.kind == "log":
        coefficient.square_().neg_()
    else:
        coefficient.mul_(-1 / scale)
    if gap is not None and spec.kind == "softplus":
        coefficient.mul_(gap.sigmoid_())
    return values, coefficient.masked_fill_(unused, 0.0)


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
    if not p.masked:
        total = p.a.sum(0, dtype=p.accum_dtype) + p.b.sum(0, dtype=p.accum_dtype)
        return total / max(1, p.a.shape[0] + p.b.shape[0])
    total = torch.zeros(p.a.shape[1], dtype=p.accum_dtype, device=p.a.device)
    for rows, weights in ((p.a, p.u), (p.b, p.v)):
        for start in range(0, rows.shape[0], CPU_ROWS):
            kept = weights[start : start + CPU_ROWS, None] != 0
            block = rows[start : start + CPU_ROWS].to(p.accum_dtype)
            total += torch.where(kept, block, 0.0).sum(0)
    return total / ((p.u != 0).sum() + (p.v != 0).sum()).clamp_min(1)


# --- the loop -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowBlock:
    """Rows of one group: as given and centred, their squared norms and weights."""

    raw: Tensor  # (C, H)
    x: Tensor  # (C, H); rows of weight 0 are 0, so that NaN stays out
    sq: Tensor  # (C,)
    w: Tensor  # (C,)


class _RowBlocks:
    """Blocks of one group, centred into one buffer: fresh memory for each costs page faults."""

    def __init__(self, p: PairProblem, is_a: bool, mean: Tensor, size: int) -> None:
        self.rows, self.weights = (p.a, p.u) if is_a else (p.b, p.v)
        self.mean, self.size, self.masked = mean, min(size, self.rows.shape[0]), p.masked
        self.x = torch.empty(self.size, mean.shape[0], dtype=mean.dtype, device=mean.device)

    def at(self, start: int) -> RowBlock:
        """The block from row ``start`` on; the one before it is overwritten."""
        part = slice(start, start + self.size)
        raw, w = self.rows[part], self.weights[part]
        x = torch.sub(raw, self.mean, out=self.x[: raw.shape[0]])
        if self.masked:
            x.masked_fill_(w[:, None] == 0, 0.0)
        return RowBlock(raw, x, torch.linalg.vector_norm(x, dim=1).square_(), w)


def _differences(a: RowBlock, b: RowBlock, i: Tensor, j: Tensor) -> Tensor:  # (K, H)
    """a_i - b_j of the rows as given: centring rounds, and between neighbours that shows."""
    return a.raw[i].to(a.x.dtype) - b.raw[j].to(b.x.dtype)


def _none_close(d2: Tensor, a: RowBlock, b: RowBlock) -> bool:
    """One cheap pass that usually spares the search; on a GPU, one synchronization more."""
    if d2.device.type != "cpu" or d2.numel() == 0:
        return d2.numel() == 0
    return bool(d2.amin() >= CLOSE * (a.sq.amax() + b.sq.amax()))


def gram_distances(a: RowBlock, b: RowBlock, d2: Tensor) -> Distances:
    """(d^2 (C, M) from the Gram matrix, in d2; the pairs closer than CLOSE of their sizes)."""
    torch.addmm(b.sq, a.x, b.x.t(), alpha=-2, out=d2).add_(a.sq[:, None])
    if _none_close(d2, a, b):
        return d2, None
    i, j = torch.nonzero(d2 < CLOSE * (a.sq[:, None] + b.sq), as_tuple=True)
    return d2, (i, j)


def torch_product(out: Tensor, c: Tensor, x: Tensor, add: bool) -> None:
    """``out (+)= c @ x``."""
    torch.addmm(out, c, x, beta=1 if add else 0, out=out)


@dataclass(frozen=True)
class TileWork:
    """What a backend may bring of a tile's work: distances, pair pass, the gradient's GEMM."""

    distances: Callable[[RowBlock, RowBlock, Tensor], Distances]
    pair_pass: PairPass
    product: Callable[[Tensor, Tensor, Tensor, bool], None]


TORCH_TILE = TileWork(gram_distances, torch_pair_pass, torch_product)


def squared_distances(
    a: RowBlock, b: RowBlock, buffer: Tensor, work: TileWork = TORCH_TILE
) -> Distances:
    """(d^2 (C, M) in the buffer, exact where pairs are close; indices of touching pairs, if any)"""
    d2 = buffer[: a.sq.shape[0] * b.sq.shape[0]].view(a.sq.shape[0], b.sq.shape[0])
    d2, close = work.distances(a, b, d2)
    if close is None:
        return d2, None
    i, j = close
    step = max(1, EXACT_ELEMENTS // max(1, a.x.shape[1]))
    touching = []
    for start in range(0, i.shape[0], step):
        rows, columns = i[start : start + step], j[start : start + step]
        counts = (a.w[rows] != 0) & (b.w[columns] != 0)
        exact = _differences(a, b, rows, columns).square().sum(1)
        d2[rows, columns] = torch.where(counts, exact, 0.0)
        touching.append(counts & (exact < TOUCHING * (a.sq[rows] + b.sq[columns])))
    if not touching:
        return d2.clamp_min_(0), None  # sizes of 0 leave rounding below 0
    kept = torch.cat(touching)
    return d2, (i[kept], j[kept])


def _add_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """``out[index] += rows`` in a fixed order: of the two ways one is so on each kind of device."""
    if out.device.type == "cpu":
        out.index_add_(0, index, rows)
    else:
        out.index_put_((index,), rows, accumulate=True)


def _add_touching(
    touching: tuple[Tensor, Tensor],
    weights: Tensor,  # (K,)
    a: RowBlock,
    b: RowBlock,
    da: Tensor | None,  # (C, H)
    db: Tensor | None,  # (M, H)
) -> None:
    i, j = touching
    step = max(1, EXACT_ELEMENTS // max(1, a.x.shape[1]))
    for start in range(0, i.shape[0], step):
        rows, columns = i[start : start + step], j[start : start + step]
        pull = _differences(a, b, rows, columns) * weights[start : start + step, None]
        if da is not None:
            _add_rows(da, rows, pull)
        if db is not None:
            _add_rows(db, columns, pull.neg_())


class _Gradient:
    """One group's gradient, ``product - sum x`` of *negated* coefficients, added up by tiles."""

    def __init__(self, rows: Tensor, dtype: torch.dtype, work: TileWork) -> None:
        self.work = work
        self.product = torch.empty(rows.shape, dtype=dtype, device=rows.device)
        self.sums = torch.empty(rows.shape[0], dtype=dtype, device=rows.device)

    def add(self, part: slice, c: Tensor, other: Tensor, first: bool) -> None:
        """Coefficients (own rows, other rows) of a tile."""
        self.work.product(self.product[part], c, other, not first)
        if first:
            torch.sum(c, 1, out=self.sums[part])
        else:
            self.sums[part] += c.sum(1)

    def finish(self, part: slice, x: Tensor) -> None:
        """After the last tile of these rows, whose centred values are ``x``."""
        self.product[part].addcmul_(x, self.sums[part, None], value=-1)


def run_tiles(p: PairProblem, work: TileWork = TORCH_TILE) -> PairResult:
    """Loss and the gradients asked for, tile by tile."""
    n, m = p.a.shape[0], p.b.shape[0]
    if min(n, m) == 0:
        return nothing(p)
    chunk = p.chunk_rows or (CPU_ROWS if p.a.device.type == "cpu" else GPU_ROWS)
    mean = shared_mean(p)
    da = _Gradient(p.a, p.accum_dtype, work) if p.need_da else None
    db = _Gradient(p.b, p.accum_dtype, work) if p.need_db else None
    values = torch.zeros(n, dtype=p.accum_dtype, device=p.a.device)
    a_blocks, b_blocks = _RowBlocks(p, True, mean, chunk), _RowBlocks(p, False, mean, COLUMNS)
    buffer = values.new_empty(a_blocks.size * b_blocks.size)
    for left in range(0, m, COLUMNS):
        b = b_blocks.at(left)
        columns = slice(left, left + COLUMNS)
        for top in range(0, n, chunk):
            a = a_blocks.at(top)
            rows = slice(top, top + chunk)
            c, touching = squared_distances(a, b, buffer, work)
            values[rows] += work.pair_pass(c, a.w, b.w, p.spec, p.need_grad)
            weights = None
            if touching is not None and p.need_grad:
                weights = c[touching]
                c[touching] = 0
            if p.need_grad:
                c.neg_()
            if da is not None:
                da.add(rows, c, b.x, first=left == 0)
                if left + COLUMNS >= m:
                    da.finish(rows, a.x)
            if db is not None:
                db.add(columns, c.t(), a.x, first=top == 0)
            if touching is not None and weights is not None:
                da_tile = None if da is None else da.product[rows]
                db_tile = None if db is None else db.product[columns]
                _add_touching(touching, weights, a, b, da_tile, db_tile)
        if db is not None:
            db.finish(columns, b.x)
    return PairResult(values.sum(), *(None if g is None else g.product for g in (da, db)))


def nothing(p: PairProblem) -> PairResult:
    """The result without pairs: zeros."""
    da, db = (
        torch.zeros(x.shape, dtype=p.accum_dtype, device=x.device) if needed else None
        for x, needed in ((p.a, p.need_da), (p.b, p.need_db))
    )
    return PairResult(p.u.new_zeros(()), da, db)


def distance_tiles(a: Tensor, b: Tensor, chunk_rows: int) -> Iterator[Tensor]:
    """The distances of all pairs, tile by tile, without weights or gradient."""
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    u, v = (torch.ones(x.shape[0], dtype=dtype, device=x.device) for x in (a, b))
    spec = PairSpec("l2", 0.0, 1.0)
    p = PairProblem(a, b, u, v, spec, False, False, chunk_rows, False, False)
    mean = shared_mean(p)
    a_blocks, b_blocks = _RowBlocks(p, True, mean, chunk_rows), _RowBlocks(p, False, mean, COLUMNS)
    buffer = u.new_empty(a_blocks.size * b_blocks.size)
    for left in range(0, b.shape[0], COLUMNS):
        columns = b_blocks.at(left)
        for top in range(0, a.shape[0], chunk_rows):
            yield squared_distances(a_blocks.at(top), columns, buffer)[0].sqrt_()


def run_torch(problem: PairProblem) -> PairResult:
    """The ``torch`` backend: any device, any floating dtype."""
    return run_tiles(problem)
