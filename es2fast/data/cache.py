"""Answers that the base model wrote, kept on disk so that each is written once.

One JSON Lines file for all models; a line is `{"key", "text"}`. The key is a sha256 over everything
the answer depends on: the model's fingerprint, the template's hash, the lengths and the prompt's
messages. See `es2fast.run.files` for what a killed process leaves.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from es2fast.config import DataConfig
from es2fast.data.prompts import Prompt
from es2fast.errors import UserError
from es2fast.run.files import append_line, read_lines

_WEIGHTS = ("*.safetensors", "*.bin")
_SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "adapter_config.json")
_CHUNK = 4096
_CHUNKS = 256
_WHOLE = 32 * 2**20


class ResponseCache:
    """Answers of one base model under one template; several instances may read the same file."""

    def __init__(self, data: DataConfig, *, fingerprint: str, template_hash: str) -> None:
        """Opens the cache.

        Args:
            data: for `cache_dir`, `max_length` and `max_response_tokens`.
            fingerprint: of the base model, from `model_fingerprint`.
            template_hash: `Formatter.template_hash`.

        Raises:
            UserError: the file exists and cannot be read.
        """
        self.path = cache_folder(data.cache_dir) / "responses.jsonl"
        self._scope = [fingerprint, template_hash, data.max_length, data.max_response_tokens]
        self._texts: dict[str, str] = {}
        self.reload()

    def reload(self) -> None:
        """Reads the file again, for a rank other than the one that writes."""
        try:
            records = list(read_lines(self.path))
        except OSError as error:
            raise self._error("read", error) from None
        for record in records:
            if isinstance(record.get("key"), str) and "text" in record:
                self._texts[record["key"]] = str(record["text"])

    def key(self, prompt: Prompt) -> str:
        """sha256 of the prompt's messages in this cache's scope; the response takes no part."""
        text = json.dumps([*self._scope, prompt.turns])
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, prompt: Prompt) -> str | None:
        """The answer, or None."""
        return self._texts.get(self.key(prompt))

    def put(self, prompt: Prompt, text: str) -> None:
        """Keeps an answer, here and on disk. Raises UserError: the folder is not writable."""
        key = self.key(prompt)
        try:
            append_line(self.path, {"key": key, "text": text})
        except OSError as error:
            raise self._error("written", error) from None
        self._texts[key] = text

    def missing(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Prompts without an answer in their row or here: each once, in order."""
        wanted: dict[str, Prompt] = {}
        for prompt in prompts:
            key = self.key(prompt)
            if prompt.response is None and key not in self._texts:
                wanted.setdefault(key, prompt)
        return list(wanted.values())

    def _error(self, action: str, error: OSError) -> UserError:
        return UserError(
            f"data.cache_dir: {str(self.path)!r} cannot be {action} ({error.strerror}); "
            "set data.cache_dir to a folder that can be written"
        )


def cache_folder(configured: str | None) -> Path:
    """`data.cache_dir`, else `es2fast` in XDG_CACHE_HOME, else in ~/.cache."""
    if configured is not None:
        return Path(configured).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "es2fast"


def model_fingerprint(name_or_path: str, revision: str | None = None) -> str:
    """What tells one base model from another, without reading all of it.

    A folder: sha256 over its configuration (an adapter's holds its scale), its tokenizer, and name,
    size and content of its weight files: whole up to 32 MiB, else 256 pieces of 4 KiB evenly spread
    (the first and last pieces alone would miss a model tuned only in its lower blocks). A Hugging
    Face id: `id@commit` when a copy is in the local hub cache, else `id@revision`.

    Raises:
        UserError: a folder without weights or that cannot be read, or a name that is neither.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        try:
            return _folder_fingerprint(folder)
        except OSError as error:
            raise UserError(
                f"model.name: {name_or_path!r} cannot be read ({error.strerror})"
            ) from None
    return _hub_fingerprint(name_or_path, revision)


def _folder_fingerprint(folder: Path) -> str:
    weights = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    if not weights:
        raise UserError(
            f"model.name: folder {str(folder)!r} holds no weights (.safetensors or .bin); "
            "give a folder saved by save_pretrained"
        )
    digest = hashlib.sha256()
    for path in [folder / name for name in _SMALL_FILES] + weights:
        if path.is_file():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            _update(digest, path)
    return digest.hexdigest()


def _update(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE:
            digest.update(file.read())
            return
        for i in range(_CHUNKS):
            file.seek((size - _CHUNK) * i // (_CHUNKS - 1))
            digest.update(file.read(_CHUNK))


def _hub_fingerprint(repo_id: str, revision: str | None) -> str:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    except HFValidationError:
        raise UserError(
            f"model.name: {repo_id!r} is neither a folder nor a Hugging Face model id"
        ) from None
    commit = Path(found).parent.name if isinstance(found, str) else revision or "main"
    return f"{repo_id}@{commit}"
