"""Pairwise separation of two groups of embeddings, without holding the n x m matrix.

With ``d_ij = ||a_i - b_j||`` and weighted means over all pairs (``sum w_i v_j f / sum w sum v``):

    hinge     mean relu(margin - d) / scale          l2        -mean d / scale
    log       -mean log(d / scale)                   softplus  mean softplus((margin - d) / scale)
    squared   -mean d^2 / scale^2,                   with a margin mean relu(margin^2 - d^2)/scale^2
    centroid  -||mean a - mean b|| / scale,          with a margin relu(margin - ||.||) / scale
    fisher    l2, with a margin hinge, of Mahalanobis distances ||W (a_i - b_j)||
    cosine    mean relu(cos(a_i, b_j) - margin)

Pairs are made tile by tile (:mod:`es2fast.ops.separation.chunked`), value and gradients in the
forward pass; backward only multiplies the saved gradients by ``grad_output``, out of place.
``squared`` without margin and ``centroid`` need no pairs. ``cosine`` is a pair loss on rows scaled
to length 1, where ``cos = 1 - d^2/2``: so it too is computed from centred rows, and its digits
survive a large common mean. ``fisher`` whitens the centred rows first
(:class:`es2fast.ops.separation.whitening.Whitening`).

With ``group`` the pairs are those of all D ranks. A rank makes the pairs of its own harmful rows
with all harmless ones and the reverse, 2/D of all pairs, instead of all of them D times.

This file holds the contract: the checks, the choice of the backend and the autograd glue, for
torch.compile as one ``torch.library.custom_op``.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from es2fast.ops import backends
from es2fast.ops.arguments import Arguments
from es2fast.ops.checks import DTYPES, refuse
from es2fast.ops.separation.chunked import PairProblem, PairResult, PairSpec, run_torch
from es2fast.ops.separation.group import Rows, gather_groups, sum_over_ranks
from es2fast.ops.separation.native import run_native
from es2fast.ops.separation.whitening import Whitening
from es2fast.ops.tokens import without_autocast

LOSSES = ("hinge", "l2", "log", "softplus", "squared", "centroid", "fisher", "cosine")
NEED_MARGIN = ("hinge", "softplus", "cosine")
NO_MARGIN = ("l2", "log")
REDUCTIONS = ("mean", "sum")


# --- backends -------------------------------------------------------------------------------------


def _run_triton(problem: PairProblem) -> PairResult:
    from es2fast.ops.separation.triton import run_triton

    return run_triton(problem)


RUN: dict[str, Callable[[PairProblem], PairResult]] = {
    "torch": run_torch,
    "triton": _run_triton,
    "native": run_native,
}


# --- checks ---------------------------------------------------------------------------------------


def _check_rows(harmful: Tensor, harmless: Tensor) -> None:
    for name, rows in (("harmful", harmful), ("harmless", harmless)):
        refuse(
            rows.dim() != 2,
            f"{name} has shape {tuple(rows.shape)}: expected two dimensions, one row per prompt",
        )
        refuse(
            rows.dtype not in DTYPES,
            f"{name} has dtype {rows.dtype}: expected one of {DTYPES}",
        )
    refuse(
        harmful.shape[1] != harmless.shape[1],
        f"harmful is {harmful.shape[1]} wide and harmless {harmless.shape[1]}: distances need the "
        "same hidden size",
    )
    refuse(
        harmful.dtype != harmless.dtype or harmful.device != harmless.device,
        f"harmful is {harmful.dtype} on {harmful.device} and harmless {harmless.dtype} on "
        f"{harmless.device}: cast or move one of them",
    )


def _check_weights(name: str, weights: Tensor | None, rows: int) -> None:
    if weights is None:
        return
    refuse(
        tuple(weights.shape) != (rows,),
        f"{name}_weights has shape {tuple(weights.shape)}: expected ({rows},), one per row",
    )
    refuse(
        weights.requires_grad,
        f"{name}_weights requires grad: weights are constants; pass {name}_weights.detach()",
    )
    refuse(weights.is_complex(), f"{name}_weights has dtype {weights.dtype}: expected float")


def _check_options(
    loss: str, margin: float | None, scale: float, reduction: str, whitening: Whitening | None
) -> None:
    refuse(loss not in LOSSES, f"loss={loss!r}: expected one of {LOSSES}")
    refuse(reduction not in REDUCTIONS, f"reduction={reduction!r}: expected one of {REDUCTIONS}")
    refuse(not scale > 0, f"scale={scale}: expected a positive number, in the units of the input")
    refuse(
        margin is None and loss in NEED_MARGIN,
        f"margin=None: loss={loss!r} needs a margin, "
        + ("a cosine between -1 and 1" if loss == "cosine" else "in the units of the input"),
    )
    refuse(
        margin is not None and loss in NO_MARGIN,
        f"margin={margin}: loss={loss!r} takes none; use loss='hinge' or margin=None",
    )
    refuse(
        margin is not None and loss != "cosine" and not margin >= 0,
        f"margin={margin}: expected zero or a positive number, in the units of the input",
    )
    refuse(
        loss == "fisher" and whitening is None,
        "whitening=None: loss='fisher' needs the base model's within-group covariance; pass "
        "Whitening.fit(states_harmful, states_harmless)",
    )
    refuse(
        loss != "fisher" and whitening is not None,
        f"whitening is given and loss={loss!r} does not use it: use loss='fisher' or drop it",
    )
    refuse(
        reduction == "sum" and loss == "centroid",
        "reduction='sum': loss='centroid' is the distance of two means; use reduction='mean'",
    )


# --- the public op --------------------------------------------------------------------------------


def pairwise_separation(
    harmful: Tensor,  # (n, H)
    harmless: Tensor,  # (m, H)
    *,
    loss: str = "hinge",
    margin: float | None = None,
    scale: float = 1.0,
    harmful_weights: Tensor | None = None,  # (n,)
    harmless_weights: Tensor | None = None,  # (m,)
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    whitening: Whitening | None = None,
    max_rows: tuple[int, int] | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> Tensor:  # (), float32 (float64 for float64 inputs)
    """Separation loss of two groups of embeddings; smaller = further apart.

    Args:
        harmful: (n, H), bf16, fp16, fp32 (fp64: torch backend). n may be 0.
        harmless: (m, H), same dtype and device. With n or m = 0, or all weights of a group 0, the
            loss is 0 with zero gradients.
        loss: one of the names of the module docstring.
        margin: in the units of the input (fisher: within-group standard deviations; cosine: a
            cosine). Required by hinge, softplus and cosine; makes squared, centroid and fisher
            stop at it; refused by l2 and log.
        scale: d0, the mean distance under the base model, in the units of margin. No use in cosine.
        harmful_weights, harmless_weights: (n,) and (m,) non-negative real or bool; rows of weight 0
            are ignored whatever they hold.
        reduction: "mean" over pairs, or "sum" of w_i v_j f(d_ij).
        group: a process group; the pairs are those of all its ranks' rows. n and m may differ
            between ranks and be 0; every rank of the group must call.
            Every rank returns the global loss, and its rows get the full gradient of it. An engine
            that *averages* gradients over D data-parallel ranks (DeepSpeed, DDP) therefore needs
            the loss times D: ``D * pairwise_separation(..., group=group)``.
        whitening: for fisher.
        max_rows: with ``group``, upper bounds of any rank's n and m, the same on all ranks: then
            nothing synchronises with the host (else one exchange of row counts does).
        chunk_rows: rows of the n x m matrix that exist at once. None: torch 512 on a CPU and 4096
            on a GPU, of at most 2048 columns; triton 2^24 pairs, at least 256 rows.
        backend: "triton", "torch", "native", or None for the best one on harmful's device.

    Returns:
        The loss. Gradients flow to harmful and harmless where they require grad; at distance 0 the
        subgradient 0 is taken (log: and below 1e-12 scale). First derivatives only for losses that
        need pairs.

    Raises:
        ValueError: for anything not supported; the message names the argument and the alternative.

    Source: l2 is arXiv 2603.20206; the others are bounded or whitened forms of it.
    """
    _check_options(loss, margin, scale, reduction, whitening)
    _check_rows(harmful, harmless)
    _check_weights("harmful", harmful_weights, harmful.shape[0])
    _check_weights("harmless", harmless_weights, harmless.shape[0])
    refuse(
        chunk_rows is not None and chunk_rows < 1,
        f"chunk_rows={chunk_rows}: expected a positive number, or None for the default",
    )
    refuse(
        whitening is not None and whitening.inverse_std.shape[0] != harmful.shape[1],
        "whitening was fitted on another hidden size than harmful has: take both from one layer",
    )
    refuse(
        max_rows is not None and group is None,
        f"max_rows={max_rows} without group: there are no other ranks; pass both or neither",
    )
    chosen = backends.choose_backend(backend, harmful=harmful)
    own = Rows.of(harmful, harmful_weights), Rows.of(harmless, harmless_weights)
    if group is not None and dist.get_world_size(group) > 1:
        everyone = gather_groups(*own, group, max_rows)
        parts = [(own[0], everyone[1].detached()), (everyone[0].detached(), own[1])]
    else:
        group, everyone, parts = None, own, [own]
    with without_autocast(harmful.device.type):
        if loss == "centroid" or (loss == "squared" and margin is None):
            return _without_pairs(*everyone, loss, margin, scale, reduction)
        prepare = _Prepared(everyone, loss, margin, scale, reduction, whitening)
        values = [prepare.separation(a, b, chunk_rows, chosen) for a, b in parts]
    if group is None:
        return values[0]
    total = sum_over_ranks(values[0].detach(), group)
    return total + sum(value - value.detach() for value in values)


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _normalised(weights: Tensor, everyone: Rows, total: Tensor | None, reduction: str) -> Tensor:
    """weights / total, 0 when the total is 0; unchanged for sums. Total None: the row count."""
    if reduction == "sum":
        return weights
    if total is None:
        return weights / max(1, everyone.w.shape[0])
    return torch.where(total == 0, 0.0, weights / total)


def _mean_of(everyone: tuple[Rows, Rows]) -> Tensor:  # (H,), no gradient
    """Some point amid both groups: any will do, the same for all rows."""
    with torch.no_grad():
        sums = [torch.where(g.w[:, None] != 0, g.x, 0.0).sum(0, dtype=g.w.dtype) for g in everyone]
        count = sum((g.w != 0).sum() for g in everyone)
        return (sums[0] + sums[1]) / torch.clamp(torch.as_tensor(count), min=1)


def _centred(group: Rows, mean: Tensor) -> Tensor:
    return torch.where(group.w[:, None] != 0, group.x.to(mean.dtype) - mean, 0.0)


def _without_pairs(
    harmful: Rows, harmless: Rows, loss: str, margin: float | None, scale: float, reduction: str
) -> Tensor:
    """The closed forms, in plain differentiable torch on centred rows."""
    mean = _mean_of((harmful, harmless))
    a, b = _centred(harmful, mean), _centred(harmless, mean)
    u, v = (_normalised(g.w, g, g.w.sum(), reduction) for g in (harmful, harmless))
    if loss == "squared":
        # sum_ij u_i v_j |a_i - b_j|^2
        sizes = v.sum() * (u @ a.square().sum(1)) + u.sum() * (v @ b.square().sum(1))
        return (2 * (u @ a) @ (v @ b) - sizes) / scale**2
    between = (u @ a - v @ b).square().sum()
    apart = (between > 0) & (u.sum() > 0) & (v.sum() > 0)
    distance = torch.where(apart, torch.where(apart, between, 1.0).sqrt(), 0.0)
    if margin is None:
        return -distance / scale
    exists = (u.sum() > 0) & (v.sum() > 0)
    return torch.where(exists, (margin - distance).relu(), 0.0) / scale


class _Prepared:
    """One loss on given global groups: the pair spec, the totals, and the map of the rows."""

    def __init__(
        self,
        everyone: tuple[Rows, Rows],
        loss: str,
        margin: float | None,
        scale: float,
        reduction: str,
        whitening: Whitening | None,
    ) -> None:
        self.loss, self.reduction, self.whitening = loss, reduction, whitening
        self.margin = 0.0 if margin is None else float(margin)
        kind = loss
        if loss == "fisher":
            kind = "l2" if margin is None else "hinge"
            self.mean = _mean_of(everyone)
        self.spec = PairSpec(kind, self.margin, float(scale))
        self.everyone = everyone
        self.totals = [None if g.equal else g.w.sum() for g in everyone]

    def _mapped(self, group: Rows) -> tuple[Tensor, Tensor]:
        """(rows as the pair loss wants them, weights without rows that have no direction)."""
        if self.loss == "fisher":
            assert self.whitening is not None
            # in float64: equal rows must stay equal, or their distance of 1e-6 has a direction
            whitened = self.whitening(_centred(group, self.mean).double())
            return whitened.to(group.w.dtype), group.w
        if self.loss != "cosine":
            return group.x, group.w
        kept = group.w[:, None] != 0
        x = torch.where(kept, group.x.to(group.w.dtype), 0.0)
        has_direction = x.detach().any(dim=1)
        x = torch.where(has_direction[:, None], x, 1.0)
        unit = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return unit, group.w * has_direction

    def _share(self, side: int, weights: Tensor) -> Tensor:
        return _normalised(weights, self.everyone[side], self.totals[side], self.reduction)

    def separation(self, a: Rows, b: Rows, chunk_rows: int | None, backend: str) -> Tensor:
        """sum over the pairs of a and b, divided by the global totals for reduction "mean"."""
        (x, w_x), (y, w_y) = self._mapped(a), self._mapped(b)
        u, v = self._share(0, w_x), self._share(1, w_y)
        masked = self.loss == "cosine" or not (a.equal and b.equal)
        half = a.x.dtype in (torch.bfloat16, torch.float16)
        grad = torch.is_grad_enabled()
        value = _call(
            a=x,
            b=y,
            u=u,
            v=v,
            kind=self.spec.kind,
            margin=self.spec.margin,
            scale=self.spec.scale,
            masked=masked,
            half=half,
            chunk_rows=chunk_rows,
            backend=backend,
            need_da=grad and x.requires_grad,
            need_db=grad and y.requires_grad,
        )
        if self.loss == "cosine" and self.margin < 0:  # cosine 0 with a row that has no direction
            all_u, all_v = self._share(0, a.w).sum(), self._share(1, b.w).sum()
            value = value - self.margin * (all_u * all_v - u.sum() * v.sum())
        return value


# --- the custom op --------------------------------------------------------------------------------


def _run(
    a: Tensor,
    b: Tensor,
    u: Tensor,
    v: Tensor,
    kind: str,
    margin: float,
    scale: float,
    masked: bool,
    half: bool,
    chunk_rows: int | None,
    backend: str,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_ij u_i v_j f(d_ij), da, db); a gradient that is not needed is an empty tensor.

    Gradients are kept in the accumulation dtype: rounded to bf16 before *and* after grad_output
    scales them they would miss 1e-3.
    """
    spec = PairSpec(kind, margin, scale)
    problem = PairProblem(a, b, u, v, spec, masked, half, chunk_rows, need_da, need_db)
    with without_autocast(a.device.type):
        result = RUN[backend](problem)
    da = torch.empty(0) if result.da is None else result.da
    db = torch.empty(0) if result.db is None else result.db
    return result.loss, da, db


ARGUMENTS = Arguments(_run)

_separation = torch.library.custom_op("es2fast::separation", mutates_args=())(_run)


@_separation.register_fake
def _(*inputs):
    p = ARGUMENTS.named(inputs)
    accum = _accumulation(p.a.dtype)
    return (
        p.a.new_empty((), dtype=accum),
        torch.empty(p.a.shape, dtype=accum, device=p.a.device) if p.need_da else torch.empty(0),
        torch.empty(p.b.shape, dtype=accum, device=p.b.device) if p.need_db else torch.empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    _, da, db = output
    p = ARGUMENTS.named(inputs)
    ctx.dtypes = {"a": p.a.dtype} if p.need_da else {}
    if p.need_db:
        ctx.dtypes["b"] = p.b.dtype
    ctx.save_for_backward(da, db)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "pairwise_separation has no second derivatives (create_graph=True): use "
            "es2fast.ops.reference.separation where they are needed"
        )
    if grad_loss is None:
        return ARGUMENTS.gradients()
    da, db = ctx.saved_tensors
    made = {"a": da, "b": db}
    # On a CPU, by far the usual factor 1 costs no copy: half of the memory of a large call.
    # Autograd clones what is still saved for another backward; tracing sees no plain tensor.
    is_one = type(grad_loss) is Tensor and grad_loss.device.type == "cpu" and bool(grad_loss == 1)
    if not is_one:  # out of place: backward may run more than once
        made = {name: made[name] * grad_loss for name in ctx.dtypes}
    return ARGUMENTS.gradients(**{name: made[name].to(dtype) for name, dtype in ctx.dtypes.items()})


_separation.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The op without the dispatcher's 100 us a call, which is what 64 x 64 pairs take."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        loss, da, db = _run(*inputs)
        _setup_context(ctx, inputs, (loss, da, db))
        return loss

    backward = staticmethod(_backward)


def _call(**arguments: Any) -> Tensor:
    """One node for torch.compile and torch.export, a plain autograd function otherwise."""
    if torch.compiler.is_compiling():
        return torch.ops.es2fast.separation(**arguments)[0]
    if arguments["need_da"] or arguments["need_db"]:
        return _Eager.apply(*ARGUMENTS.positional(**arguments))
    return _run(**arguments)[0]
