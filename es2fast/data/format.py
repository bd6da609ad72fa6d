"""The tokenizer's chat template, applied the same way everywhere.

The template is the only thing that writes special tokens: those that stand in the text of a user or
a system are broken up. Its text is encoded with `add_special_tokens=False`, so a tokenizer that
prepends BOS on its own adds no second one, and otherwise the ids equal those of
`apply_chat_template(tokenize=True)`.

System prompt: put first unless the row brings a system message of its own. A template that raises
on a system message, or drops it silently, gets it folded into the first user turn, followed by a
blank line (found out by rendering one).

Lengths: a prompt longer than `max_length` first loses its oldest exchanges, when it has several
turns, then the end of its last user turn. What the template writes after that turn (the generation
prompt) is always kept whole, because the state of its last token is what ES2 separates. A response
is cut at its end, to `max_response_tokens` and to what the prompt left of `max_length`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from es2fast.config import DataConfig
from es2fast.data.prompts import Prompt
from es2fast.data.sources import one_line
from es2fast.errors import UserError

_PROBE = "es2fast"
_WORDINGS = ("x", "what is it?", "Tell me 7", "a long story, please.")  # different endings
Messages = list[dict[str, str]]


class Formatter:
    """Prompts to token ids, for one tokenizer and one `data` section.

    The tokenizer is never changed: padding is done here, on the left, with its pad token, else its
    EOS token, else id 0 (padding is masked in every case).

    Attributes:
        template: the chat template in use.
        template_hash: sha256 over template, special tokens and system prompt.
        pad_token_id: the id that fills padding.
        stop_token_ids: EOS and the token with which the template ends an assistant turn; where
            generation has to stop.
    """

    def __init__(self, tokenizer: Any, data: DataConfig) -> None:
        """Raises UserError: no usable chat template, or max_length too short for it."""
        self.tokenizer = tokenizer
        self.data = data
        self.template = _chat_template(tokenizer, data.chat_template)
        self.pad_token_id = _first(tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._cut: set[tuple[tuple[str, str], ...]] = set()
        self._special = _special_ids(tokenizer)
        tokens = tokenizer.convert_ids_to_tokens(sorted(self._special))
        self._special_texts = sorted((t for t in tokens if len(t) > 1), key=len, reverse=True)
        self._system_role = self._has_system_role()
        self._tail = self._after_content()
        self._ends = self._specials_after_answer()
        self.template_hash = self._hash()
        self.stop_token_ids = self._stop_ids()
        self._check_length()

    @property
    def truncated(self) -> int:
        """Distinct prompts that, alone or with their response, did not fit into max_length."""
        return len(self._cut)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Ids of the prompt up to and including the generation prompt, at most `max_length`."""
        return self._fit(prompt, self._encode(self._render(prompt.messages)))

    def message_ids(
        self,
        messages: Sequence[dict[str, str]],
        *,
        system_prompt: bool = True,
        generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of messages in any order of roles, as far as the template writes them.

        Args:
            messages: `{role, content}`; `prompt_ids` has those of an ordinary prompt.
            system_prompt: put the configured system prompt first, as in an ordinary prompt.
            generation_prompt: let the template open the assistant's turn.

        What exceeds `max_length` is cut before the template's last part.

        Raises:
            UserError: the template refuses such messages.
        """
        ids = self._encode(self._render(messages, generation_prompt, system_prompt))
        over = len(ids) - self.data.max_length
        if over <= 0:
            return ids
        end = len(ids) - self.tail_length(ids)
        return ids[: max(0, end - over)] + ids[end:]

    def response_ids(self, prompt: Prompt, response: str) -> list[int]:
        """Ids that follow `prompt_ids(prompt)` and end with the template's end-of-turn token.

        A response that is cut to `max_response_tokens` loses that token. Empty when the prompt
        alone fills `max_length`.
        """
        return self.conversation_ids(prompt, response)[1]

    def conversation_ids(self, prompt: Prompt, response: str) -> tuple[list[int], list[int]]:
        """(`prompt_ids`, `response_ids`) of a pair, rendered once."""
        text = self._render(prompt.messages)
        whole = self._encode(text)
        ids = self._fit(prompt, whole)
        answer = self._answer(prompt, response, text, whole)[: self.data.max_response_tokens]
        room = self.data.max_length - len(ids)
        if len(answer) > room:
            self._cut.add(prompt.turns)
        return ids, answer[:room]

    def opening_ids(self, prompt: Prompt, text: str, tokens: int) -> list[int]:
        """The first `tokens` ids, or all, of an answer that begins with `text` and goes on: as
        `response_ids`, without the end of turn."""
        ids = self.response_ids(prompt, text)
        while ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        return ids[:tokens]

    def prompt_batches(self, prompts: Sequence[Prompt], batch_size: int) -> list[dict[str, Tensor]]:
        """Left-padded `input_ids` and `attention_mask`, (B, T) int64, in the order given."""
        rows = [self.prompt_ids(prompt) for prompt in prompts]
        return [
            self.pad(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)
        ]

    def pad(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Rows of ids, padded on the left to the longest: (B, T) int64 ids and mask."""
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            if row:
                ids[number, width - len(row) :] = torch.tensor(row, dtype=torch.int64)
                mask[number, width - len(row) :] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def tail_length(self, ids: Sequence[int]) -> int:
        """How many of a prompt's last ids the template wrote after the last user turn's content."""
        return _common_suffix(ids, self._tail)

    def template_tail(self) -> int:
        """How many ids at the end of a prompt are the template's whatever the prompt says: what
        differently worded prompts have in common there, and no more than the template's text alone
        has (the wordings may all be unknown words). The id before them is that of the last
        instruction token, or of one in which the tokenizer joined it with the template's text."""
        first, *others = (self._encode(self._render(Prompt.of(w).messages)) for w in _WORDINGS)
        return min(len(self._tail), *(_common_suffix(first, other) for other in others))

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of one row of ids, special tokens left out."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    # Rendering

    def _render(
        self, messages: Sequence[dict[str, str]], generation: bool = True, system: bool = True
    ) -> str:
        """The template's text; the system prompt put first, or folded into the first user turn."""
        try:
            turns = self._with_system(messages) if system else [dict(turn) for turn in messages]
            for turn in turns:
                if turn["role"] != "assistant":
                    turn["content"] = self._escaped(turn["content"])
            return self._render_raw(turns, generation)
        except Exception as error:  # templates raise jinja2 errors, but also TypeError and others
            raise UserError(
                f"chat template: cannot render {one_line(messages[-1]['content'], 40)!r} "
                f"({one_line(error)}); set data.chat_template to a template that can"
            ) from None

    def _escaped(self, content: str) -> str:
        """Content that cannot end its own turn: a space after the first character of what would
        be read as a special token ("< |im_end|>")."""
        for text in self._special_texts:
            content = content.replace(text, f"{text[0]} {text[1:]}")
        return content

    def _render_raw(self, messages: Messages, generation: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.template,
            add_generation_prompt=generation,
            tokenize=False,
        )

    def _with_system(self, messages: Sequence[dict[str, str]]) -> Messages:
        turns = [dict(turn) for turn in messages]
        if self.data.system_prompt and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.data.system_prompt})
        if turns[0]["role"] == "system" and not self._system_role:
            system = turns.pop(0)["content"]
            first = next(turn for turn in turns if turn["role"] == "user")
            first["content"] = f"{system}\n\n{first['content']}"
        return turns

    def _has_system_role(self) -> bool:
        turns = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "x"}]
        try:
            return _PROBE in self._render_raw(turns, True)
        except Exception:  # "System role not supported" and its kin
            return False

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    # Lengths

    def _after_content(self) -> list[int]:
        """Ids of what the template writes after the last user turn's content."""
        x, y = (self._render(Prompt.of(content).messages) for content in ("x", "y"))
        if x == y:
            raise UserError(
                f"chat template: it writes {one_line(x, 40)!r} whatever the prompt says; set "
                "data.chat_template to one that writes the messages' content"
            )
        length = _common_suffix(x, y)
        return self._encode(x[len(x) - length :])

    def _specials_after_answer(self) -> int:
        """How many special tokens the template writes behind an assistant turn's content."""
        turns = ({"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBE})
        _, _, after = self._render(turns, generation=False).rpartition(_PROBE)
        return sum(token in self._special for token in self._encode(after))

    def _check_length(self) -> None:
        taken = len(self._encode(self._render(Prompt.of("x").messages))) - 1
        if taken >= self.data.max_length:
            raise UserError(
                f"data.max_length: {self.data.max_length} leaves no room for a prompt; the chat "
                f"template and system prompt alone take {taken} tokens"
            )

    def _fit(self, prompt: Prompt, ids: list[int]) -> list[int]:
        limit = self.data.max_length
        if len(ids) <= limit:
            return ids
        self._cut.add(prompt.turns)
        messages: Sequence[dict[str, str]] = prompt.messages
        while len(ids) > limit and (shorter := _without_oldest_exchange(messages)):
            messages = shorter
            ids = self._encode(self._render(messages))
        if len(ids) <= limit:
            return ids
        tail = self.tail_length(ids)
        return ids[: max(0, limit - tail)] + ids[len(ids) - tail :]

    # Responses

    def _answer(self, prompt: Prompt, response: str, text: str, ids: list[int]) -> list[int]:
        """Uncut response ids: what the template adds to the prompt, up to its end of turn."""
        turn = {"role": "assistant", "content": response}
        full = self._render((*prompt.messages, turn), generation=False)
        if not full.startswith(text):
            return self._plain_answer(response)
        full_ids = self._encode(full)
        added = full_ids[len(ids) :]
        if full_ids[: len(ids)] != ids:  # a token spans the border
            added = self._encode(full[len(text) :])
        return self._ended(added)

    def _plain_answer(self, response: str) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return self._encode(response) + ([] if eos is None else [eos])

    def _ended(self, ids: list[int]) -> list[int]:
        """Cuts behind the first special token that follows the content, the end of turn.

        Templates write more (a newline, EOS after the end of turn) that a model never generates.
        """
        ends = [i for i, token in enumerate(ids) if token in self._special]
        if 0 < self._ends <= len(ends):
            return ids[: ends[-self._ends] + 1]
        eos = self.tokenizer.eos_token_id
        return ids if eos is None else [*ids, eos]

    def _stop_ids(self) -> list[int]:
        eos = self.tokenizer.eos_token_id
        probe = Prompt.of(_PROBE)
        text = self._render(probe.messages)
        last = self._answer(probe, _PROBE, text, self._encode(text))[-1:]
        stops = [] if eos is None else [eos]
        return stops + [token for token in last if token in self._special and token not in stops]

    def _hash(self) -> str:
        parts = [self.template, self.tokenizer.special_tokens_map, self.data.system_prompt]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def _chat_template(tokenizer: Any, path: str | None) -> str:
    if path is not None:
        try:
            return Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UserError(
                f"data.chat_template: {path!r} cannot be read ({reason}); give a Jinja file"
            ) from None
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            f"chat template: the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has none; "
            "set data.chat_template to a Jinja file, or use a chat model"
        ) from None


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _without_oldest_exchange(messages: Sequence[dict[str, str]]) -> Messages:
    """Messages from the second user turn on, a leading system message kept; [] if there is one."""
    users = [i for i, turn in enumerate(messages) if turn["role"] == "user"]
    if len(users) < 2:
        return []
    head = [messages[0]] if messages[0]["role"] == "system" else []
    return [*head, *messages[users[1] :]]


def _common_suffix(ids: Sequence[Any], tail: Sequence[Any]) -> int:
    length = 0
    while length < min(len(ids), len(tail)) and ids[-1 - length] == tail[-1 - length]:
        length += 1
    return length
