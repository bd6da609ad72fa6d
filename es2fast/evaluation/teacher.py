"""What a model does with harmless tokens, and what the base model did with them.

    KL        KL(base || model) in nats per token, over all tokens and over those that decide the
              response (a chat template's fixed tokens cost nothing and dilute the former)
    top-1     share of response positions where both models think the same token most likely
    NLL       -log p(response token), nats per token; its exponential is the perplexity

The base model's half is kept on disk until all models are measured, so that a model that just fits
can be compared with its base: its LM head, and its final hidden states batch by batch.

Legend: B rows, T tokens, N tokens that are no padding, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from es2fast.data import Formatter, Prompt
from es2fast.modeling.head import HeadTransform, lm_head_of, read_transform
from es2fast.modeling.taps import backbone, causal_lm, position_ids
from es2fast.ops.linear_kl.op import linear_kl_div
from es2fast.progress import tqdm
from es2fast.run.files import remove, write_text

CHUNK = 256  # tokens whose logits are held at a time


@dataclass
class TokenBatch:
    """Prompts with their responses, padded on the left.

    input_ids, attention_mask: (B, T) int64; response: (N,) bool, the token decides a token of the
    response; target: (N,) int64, the next token of its row, or -1.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response: Tensor
    target: Tensor


@dataclass
class TokenStats:
    """kl, kl_response, nll: nats per token; top1: 0..1. None: not measured, or no base model."""

    kl: float | None = None
    kl_response: float | None = None
    top1: float | None = None
    nll: float | None = None


def token_batches(
    formatter: Formatter, prompts: Sequence[Prompt], responses: Sequence[str], batch_size: int
) -> list[TokenBatch]:
    """What both models see: prompts and responses in order, `batch_size` rows at a time."""
    pairs = [formatter.conversation_ids(p, r) for p, r in zip(prompts, responses)]
    batches = []
    for start in range(0, len(pairs), batch_size):
        some = pairs[start : start + batch_size]
        padded = formatter.pad([[*prompt, *response] for prompt, response in some])
        deciding = [
            [False] * (len(prompt) - 1) + [True] * len(response) + [False]
            for prompt, response in some
        ]
        target = [[*prompt[1:], *response, -1] for prompt, response in some]
        batches.append(
            TokenBatch(
                padded["input_ids"],
                padded["attention_mask"],
                torch.tensor([flag for row in deciding for flag in row]),
                torch.tensor([token for row in target for token in row]),
            )
        )
    return batches


@torch.no_grad()
def final_hidden(model: nn.Module, batch: TokenBatch) -> Tensor:
    """What the LM head sees at every token that is no padding: (N, H), on the head's device."""
    mask = batch.attention_mask.to(next(model.parameters()).device)
    out = backbone(model)(
        input_ids=batch.input_ids.to(mask.device),
        attention_mask=mask,
        position_ids=position_ids(mask),
        use_cache=False,
    )
    hidden = out.last_hidden_state
    return hidden[mask.bool().to(hidden.device)].to(lm_head_of(model).weight.device)


@dataclass
class _Head:
    """W (V, H) and bias (V,) of a linear LM head, and what the model does to its logits."""

    weight: Tensor
    bias: Tensor | None
    transform: HeadTransform

    def log_probs(self, hidden: Tensor) -> Iterator[Tensor]:
        """(C, V) fp32 log-probabilities, `CHUNK` rows of hidden (N, H) at a time."""
        for rows in hidden.split(CHUNK):
            logits = nn.functional.linear(rows, self.weight, self.bias).float()
            yield self.transform(logits).log_softmax(-1)


def _head_of(model: nn.Module) -> _Head:
    head = lm_head_of(model)
    return _Head(head.weight, head.bias, read_transform(causal_lm(model).config))


class SavedTeacher:
    """The base model's half of the KL on disk.

    Args:
        folder: where the files are.
        key: what they were made from; files of another key do not count.
    """

    def __init__(self, folder: Path, key: str):
        self._folder, self._key = folder, key
        self._mark = folder / "complete"

    @property
    def complete(self) -> bool:
        """All of `write` has been written."""
        return self._mark.is_file() and self._mark.read_text() == self._key

    @property
    def vocabulary(self) -> int:
        """Rows of the base model's LM head."""
        with safe_open(self._folder / "head.safetensors", framework="pt") as file:
            return int(file.get_slice("weight").get_shape()[0])

    def write(self, model: nn.Module, batches: Sequence[TokenBatch], title: str) -> None:
        """Saves what the base model says about these batches."""
        remove(self._folder)
        self._folder.mkdir(parents=True)
        head = _head_of(model)
        tensors = {"weight": head.weight.detach().cpu().clone()}
        if head.bias is not None:
            tensors["bias"] = head.bias.detach().cpu().clone()
        save_file(tensors, self._folder / "head.safetensors")
        for number, batch in enumerate(tqdm(batches, title, unit="batch")):
            hidden = final_hidden(model, batch).cpu().contiguous()
            save_file({"hidden": hidden}, self._folder / f"{number}.safetensors")
        write_text(self._mark, self._key)

    @torch.no_grad()
    def compare(self, model: nn.Module, batches: Sequence[TokenBatch], title: str) -> TokenStats:
        """The model against what was written for these batches."""
        head = _head_of(model)
        device = str(head.weight.device)
        saved = load_file(self._folder / "head.safetensors", device=device)
        teacher = _Head(saved["weight"], saved.get("bias"), head.transform)
        sums = _Sums()
        for number, batch in enumerate(tqdm(batches, title, unit="batch")):
            hidden = final_hidden(model, batch)
            before = load_file(self._folder / f"{number}.safetensors", device=device)["hidden"]
            kl = linear_kl_div(
                hidden,
                head.weight,
                before,
                teacher.weight,
                bias=head.bias,
                teacher_bias=teacher.bias,
                logit_scale=head.transform.logit_scale,
                softcap=head.transform.softcap,
                reduction="none",
            )
            sums.add(batch, head, hidden, kl, teacher, before)
        return sums.stats()

    def remove(self) -> None:
        """Deletes the files."""
        remove(self._folder)


@torch.no_grad()
def token_stats(model: nn.Module, batches: Sequence[TokenBatch], title: str) -> TokenStats:
    """Of a model alone: its NLL; KL and top-1 agreement with itself are left out."""
    sums, head = _Sums(), _head_of(model)
    for batch in tqdm(batches, title, unit="batch"):
        sums.add(batch, head, final_hidden(model, batch))
    return sums.stats()


class _Sums:
    """Sums over tokens, in double precision."""

    def __init__(self) -> None:
        self.tokens = self.response = 0
        self.kl = self.kl_response = self.agree = self.nll = 0.0
        self.compared = False

    def add(
        self,
        batch: TokenBatch,
        head: _Head,
        hidden: Tensor,
        kl: Tensor | None = None,
        teacher: _Head | None = None,
        before: Tensor | None = None,
    ) -> None:
        """One batch: hidden, before (N, H) of model and teacher, kl (N,)."""
        mask = batch.response.to(hidden.device)
        target = batch.target.to(hidden.device)[mask]
        self.tokens += len(hidden)
        self.response += int(mask.sum())
        if kl is not None:
            self.compared = True
            self.kl += float(kl.double().sum())
            self.kl_response += float(kl[mask].double().sum())
        place = 0
        others = iter(()) if teacher is None or before is None else teacher.log_probs(before[mask])
        for own in head.log_probs(hidden[mask]):
            wanted = target[place : place + len(own), None]
            self.nll -= float(own.gather(1, wanted).double().sum())
            if kl is not None:
                self.agree += float((own.argmax(-1) == next(others).argmax(-1)).sum())
            place += len(own)

    def stats(self) -> TokenStats:
        response = max(self.response, 1)
        nll = self.nll / response if self.response else None
        if not self.compared:
            return TokenStats(nll=nll)
        return TokenStats(
            self.kl / max(self.tokens, 1), self.kl_response / response, self.agree / response, nll
        )
