"""A language model that judges: loaded when first asked, greedy, in batches, on the device.

Rows are padded on the left with masked tokens and start at position 0 wherever they lie, so a row's
result does not depend on its neighbours beyond rounding. They run sorted by length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from es2fast.config import ModelConfig
from es2fast.data import model_fingerprint
from es2fast.distributed.runtime import resolve_device, resolve_dtype
from es2fast.errors import UserError
from es2fast.modeling.load import free_memory, load_causal_lm, load_tokenizer
from es2fast.modeling.taps import position_ids
from es2fast.progress import tqdm

BARS_FROM = 4  # batches


class JudgeModel:
    """A causal language model and its tokenizer.

    Args:
        name: folder or Hugging Face id.
        batch_size: rows per forward pass.

    Raises:
        UserError: when first used, and there is no such model.
    """

    def __init__(self, name: str, batch_size: int = 16):
        self.name, self._batch_size = name, batch_size
        self._config = ModelConfig(name=name)
        self._model: nn.Module | None = None
        self._tokenizer: Any = None
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """Tells its weights from others'."""
        if self._fingerprint is None:
            with _as_judge():
                self._fingerprint = model_fingerprint(self.name)
        return self._fingerprint

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            with _as_judge():
                self._tokenizer = load_tokenizer(self._config)
        return self._tokenizer

    @property
    def model(self) -> Any:
        """In eval mode on its device: bf16 on a GPU, fp32 on a CPU."""
        if self._model is None:
            device = resolve_device("auto")
            with _as_judge():
                loaded = load_causal_lm(self._config, resolve_dtype("auto", device))
            self._model = loaded.to(device).eval()
        return self._model

    @property
    def context(self) -> int:
        """Tokens that fit into the model."""
        return getattr(self.model.config, "max_position_embeddings", None) or 4096

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text; special: with what the tokenizer puts around it, such as BOS."""
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    @torch.inference_mode()
    def generate(self, rows: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        """Greedy continuations as text, without special tokens."""

        def answers(ids: Tensor, mask: Tensor) -> list[str]:
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position_ids(mask),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=self._pad,
            )
            return self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)

        return self._in_batches(rows, answers)

    @torch.inference_mode()
    def next_token(self, rows: Sequence[Sequence[int]], tokens: Sequence[int]) -> Tensor:
        """(N, len(tokens)) fp32: the distribution over `tokens` after each row, alone."""

        def chances(ids: Tensor, mask: Tensor) -> list[Tensor]:
            logits = self._logits(ids, mask, keep=1)[:, -1, list(tokens)]
            return list(logits.float().softmax(-1).cpu())

        return torch.stack(self._in_batches(rows, chances))

    @property
    def begin(self) -> int:
        """What stands before a text: BOS, or where there is none EOS."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next((i for i in ids if i is not None), self._pad)

    @torch.inference_mode()
    def nll(self, rows: Sequence[Sequence[int]], last: Sequence[int]) -> list[list[float]]:
        """Nats of each of the `last[i]` last tokens of row i, which are fewer than its tokens."""
        keep = max(last, default=0) + 1

        def nats(ids: Tensor, mask: Tensor) -> list[list[float]]:
            logits = self._logits(ids, mask, keep=keep)[:, :-1]
            targets = ids[:, ids.shape[1] - logits.shape[1] :]
            return [
                F.cross_entropy(row.float(), target, reduction="none").tolist()
                for row, target in zip(logits, targets)
            ]

        return [row[-n:] for row, n in zip(self._in_batches(rows, nats), last)]

    def close(self) -> None:
        """Frees the model's memory."""
        if self._model is not None:
            self._model = None
            free_memory()

    @property
    def _pad(self) -> int:
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(i for i in ids if i is not None)

    def _logits(self, ids: Tensor, mask: Tensor, keep: int = 0) -> Tensor:
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids(mask),
            use_cache=False,
            logits_to_keep=keep,
        ).logits

    def _in_batches(
        self, rows: Sequence[Sequence[int]], run: Callable[[Tensor, Tensor], Sequence[Any]]
    ) -> list[Any]:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        found: list[Any] = [None] * len(rows)
        starts = range(0, len(order), self._batch_size)
        for start in tqdm(starts, f"judge {self.name}", disable=len(starts) < BARS_FROM):
            places = order[start : start + self._batch_size]
            results = run(*self._padded([rows[i] for i in places]))
            for place, result in zip(places, results):
                found[place] = result
        return found

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self._pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, width - len(row) :] = torch.tensor(row, dtype=torch.int64)
            mask[number, width - len(row) :] = 1
        return ids.to(self.model.device), mask.to(self.model.device)


@contextmanager
def _as_judge() -> Iterator[None]:
    """Errors about a model name the field that asked for it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"evaluate.judge: {str(error).removeprefix('model.name: ')}") from None
