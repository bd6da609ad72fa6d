"""TeacherMoments: a teacher reduced to a few numbers per token, as a value one can keep.

Per token: the moment of the tail (H numbers), the ids and probabilities of the K likeliest tokens
(the *anchors*) and three sums over the tail. With the head frozen, forward KL needs nothing else of
the teacher (:mod:`es2fast.ops.moments.chunked` has the formulas). Size per token:
``4 H + 8 K + 24`` bytes, 16.5 KB at H = 4096, K = 16.

The moments are tied to the head they were made with. ``head`` is a fingerprint of it (shape, 16
rows, bias), compared by :meth:`TeacherMoments.check_head` and :meth:`TeacherMoments.load`: one copy
of 16 rows to the host, for once per run. The loss itself compares shapes only, because it must not
wait for the GPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from es2fast.ops.checks import HALVES, refuse

FORMAT = "es2fast-teacher-moments"
VERSION = 1
SAMPLED_ROWS = 16
TENSORS = ("tail_moment", "top_ids", "top_probs", "tail_sums")


def head_fingerprint(
    weight: Tensor,  # (V, H)
    bias: Tensor | None = None,  # (V,)
    vocab_size: int | None = None,
) -> str:
    """16 hex digits of the head's shape and of 16 of its rows (and biases).

    16-bit heads are hashed as float16, so that a bfloat16 head and its float16 copy agree. Copies
    16 rows to the host: one synchronization.
    """
    vocab = weight.shape[0] if vocab_size is None else vocab_size
    rows = torch.linspace(0, vocab - 1, min(SAMPLED_ROWS, vocab)).long().to(weight.device)
    digest = hashlib.sha256(f"{vocab} {weight.shape[1]}".encode())
    for tensor in (weight, bias):
        if tensor is None:
            continue
        sample = tensor.detach().index_select(0, rows).cpu()
        sample = sample.half() if sample.dtype in HALVES else sample
        digest.update(f"{sample.dtype}".encode() + sample.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class TeacherMoments:
    """The moments of N tokens. Made by :func:`es2fast.teacher_moments`.

    ``moments[i]`` with a slice, an index tensor or a bool mask takes tokens; ``len`` is N.
    """

    tail_moment: Tensor  # (N, H) sum over the tail of p_t w, float32 (float64 for float64 states)
    top_ids: Tensor  # (N, K) int32, the anchors, likeliest first
    top_probs: Tensor  # (N, K) their p_t
    tail_sums: Tensor  # (N, 3) float64: sums over the tail of p_t, p_t b, p_t log p_t
    temperature: float
    logit_scale: float
    vocab_size: int
    head: str  # fingerprint of the student's head

    def __len__(self) -> int:
        return self.tail_moment.shape[0]

    @property
    def top_k(self) -> int:
        return self.top_ids.shape[1]

    @property
    def hidden_size(self) -> int:
        """Width of the student's head."""
        return self.tail_moment.shape[1]

    @property
    def anchor_mass(self) -> Tensor:  # (N,)
        """Probability that the anchors hold: the nearer to 1, the better the gradient."""
        return 1.0 - self.tail_sums[:, 0]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self._tensors())

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, getattr(self, name)) for name in TENSORS]

    def _with(self, tensors: dict[str, Any]) -> TeacherMoments:
        return replace(self, **tensors)

    def __getitem__(self, index: slice | Tensor) -> TeacherMoments:
        refuse(
            not isinstance(index, (slice, Tensor))
            or (isinstance(index, Tensor) and not index.dim()),
            f"TeacherMoments[{index!r}]: expected a slice, a tensor of indices or a bool mask; "
            "for one token use moments[i:i + 1]",
        )
        if isinstance(index, Tensor):
            index = index.to(self.tail_moment.device)
        return self._with({name: tensor[index] for name, tensor in self._tensors()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TeacherMoments:
        """The same moments on another device."""
        return self._with({n: t.to(device, non_blocking=non_blocking) for n, t in self._tensors()})

    @staticmethod
    def cat(parts: Sequence[TeacherMoments]) -> TeacherMoments:
        """All tokens of ``parts``, in order. ValueError when they belong to different heads."""
        refuse(not parts, "TeacherMoments.cat: expected at least one part")
        first = parts[0]
        for other in parts[1:]:
            for name, value in first._metadata().items():
                refuse(
                    other._metadata()[name] != value,
                    f"TeacherMoments.cat: {name} is {value} and {other._metadata()[name]}; only "
                    "moments made with the same head and options can be joined",
                )
        return first._with({n: torch.cat([getattr(p, n) for p in parts]) for n in TENSORS})

    # --- the head ---------------------------------------------------------------------------------

    def check_head(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """ValueError unless ``weight`` (V, H) and ``bias`` are the head the moments belong to."""
        refuse(
            weight.dim() != 2
            or weight.shape[1] != self.hidden_size
            or weight.shape[0] < self.vocab_size,
            f"weight has shape {tuple(weight.shape)}: the moments were made for a head of "
            f"{self.vocab_size} tokens and width {self.hidden_size}; make them again for this "
            "head, or use linear_kl_div",
        )
        found = head_fingerprint(weight, bias, self.vocab_size)
        refuse(
            found != self.head,
            f"weight/bias have fingerprint {found}, the moments were made with {self.head}: "
            "another head, dtype or bias; make the moments again for this head, or use "
            "linear_kl_div",
        )

    # --- files ------------------------------------------------------------------------------------

    def _metadata(self) -> dict[str, str]:
        meaning = dict(
            format=FORMAT,
            version=VERSION,
            temperature=self.temperature,
            logit_scale=self.logit_scale,
            top_k=self.top_k,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
        )
        return {k: json.dumps(v) if k != "format" else FORMAT for k, v in meaning.items()} | {
            "head": self.head
        }

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; what the numbers mean stands in its header."""
        save_file({n: t.contiguous() for n, t in self._tensors()}, path, metadata=self._metadata())

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        weight: Tensor | None = None,  # (V, H)
        bias: Tensor | None = None,  # (V,)
    ) -> TeacherMoments:
        """Read what :meth:`save` wrote; with ``weight``, refuse moments made for another head.

        Raises ValueError for a file of another kind or version, and by :meth:`check_head`.
        """
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                meta = file.metadata() or {}
                kind, version = meta.get("format"), meta.get("version")
                refuse(
                    (kind, version) != (FORMAT, str(VERSION)),
                    f"{path}: format {kind!r} version {version}: expected {FORMAT!r} version "
                    f"{VERSION}; make the moments again with teacher_moments",
                )
                tensors = {name: file.get_tensor(name) for name in TENSORS}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file of moments ({error})") from error
        loaded = cls(
            **tensors,
            temperature=json.loads(meta["temperature"]),
            logit_scale=json.loads(meta["logit_scale"]),
            vocab_size=json.loads(meta["vocab_size"]),
            head=meta["head"],
        )
        if weight is not None:
            loaded.check_head(weight, bias)
        return loaded


@dataclass(frozen=True)
class HalfHead:
    """A head in float16 and how faithful it is."""

    weight: Tensor  # (V, H) float16
    inexact: int  # entries that changed
    largest_change: float  # absolute

    @property
    def exact(self) -> bool:
        return self.inexact == 0


def half_head(weight: Tensor) -> HalfHead:  # (V, H)
    """A frozen bfloat16 head in float16, for :func:`es2fast.moment_kl_div`.

    Exact for 2^-17 <= |w| <= 65504 and for 0; smaller entries are off by 2^-25 at most. Compares
    and synchronizes: once per run.

    Raises:
        ValueError: an entry beyond float16's range.
    """
    wide = weight.detach()
    largest = float(wide.abs().max()) if wide.numel() else 0.0
    refuse(
        not largest <= torch.finfo(torch.float16).max,
        f"weight has an entry of magnitude {largest}: beyond float16; keep the head in "
        f"{weight.dtype}",
    )
    half = wide.to(torch.float16)
    inexact, change = 0, 0.0
    for start in range(0, wide.shape[0], 4096):
        part = (wide[start : start + 4096].float() - half[start : start + 4096].float()).abs()
        inexact += int(torch.count_nonzero(part))
        change = max(change, float(part.max()) if part.numel() else 0.0)
    return HalfHead(half, inexact, change)
