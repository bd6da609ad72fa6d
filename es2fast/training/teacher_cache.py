"""What the base model says on the harmless rows, written to disk once: `train.teacher: cache`
(final hidden states, in the model's dtype) and `moments` (a teacher reduced for a frozen head).

The base model never changes, so one pass over the rows serves every epoch and every run on the same
rows, and no second model is in memory while training. Kept are the tokens that the KL sees, in
safetensors files of about `SHARD_TOKENS` tokens; `index.json` beside them says what they were made
from and each file's size and sha256. Ranks share the files out; a pass that was killed goes on with
those that are missing.

Everything that a token's numbers depend on is part of the key, and the key names the folder: the
model, the tokens of all rows (so template, tokenizer, data and lengths), which of them are kept,
precision and attention, for moments temperature, scale and anchors. A file that is not what the
index says is made again, and a warning names it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from es2fast.config import TrainConfig
from es2fast.data import Formatter, Prompt, cache_folder, kl_span, model_fingerprint
from es2fast.distributed.runtime import Runtime
from es2fast.errors import UserError
from es2fast.modeling.head import read_transform
from es2fast.modeling.taps import position_ids
from es2fast.modeling.teacher import MomentOptions
from es2fast.ops.moments.cache import TENSORS, TeacherMoments
from es2fast.progress import tqdm
from es2fast.run.files import write_text
from es2fast.training.plan import Plan

VERSION = 1
SHARD_TOKENS = 16384  # kept per file: 134 MB of bf16 states of width 4096
PASS_TOKENS = 4096  # per forward pass, padding included
Forward = Callable[..., Any]  # index=, moments= and the backbone's inputs -> the tokens


def keeps_teacher(train: TrainConfig) -> bool:
    """The base model's words are read from disk during the training."""
    return train.teacher in ("cache", "moments")


@dataclass(frozen=True)
class Row:
    """ids of prompt and response; of these the KL sees start..stop-1."""

    ids: list[int]
    start: int
    stop: int

    @property
    def kept(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Shard:
    """One file: the rows in it, in passes, and each row's first token in the file."""

    name: str
    passes: list[list[int]]

    @property
    def rows(self) -> list[int]:
        return [row for rows in self.passes for row in rows]


@dataclass
class TeacherCache:
    """Reads a finished cache; the files are mapped, not loaded.

    folder: where; meaning: what the numbers were made from; rows: of the harmless group, in order.
    """

    folder: Path
    meaning: dict[str, Any]
    rows: list[Row]
    moments: MomentOptions | None = None
    _open: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.shards = layout(self.rows)
        self._place: dict[int, tuple[str, int]] = {}
        for shard in self.shards:
            offset = 0
            for row in shard.rows:
                self._place[row] = (shard.name, offset)
                offset += self.rows[row].kept

    def tokens(self, rows: Sequence[int]) -> Tensor | TeacherMoments:
        """What is kept of some harmless rows, row by row: (N, H) or the moments of N tokens.

        Raises:
            UserError: a file has gone since the run began.
        """
        parts = [self._row(row) for row in rows]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return self._value(joined)

    def _row(self, row: int) -> dict[str, Tensor]:
        name, offset = self._place[row]
        try:
            if name not in self._open:
                self._open[name] = safe_open(self.folder / name, "pt")
            file = self._open[name]
            end = offset + self.rows[row].kept
            return {key: file.get_slice(key)[offset:end] for key in self._keys}
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"train.teacher: {str(self.folder / name)!r} cannot be read ({error}); start the "
                "run again, which makes the file anew"
            ) from None

    @property
    def _keys(self) -> tuple[str, ...]:
        return ("hidden",) if self.moments is None else TENSORS

    def _value(self, tensors: dict[str, Tensor]) -> Tensor | TeacherMoments:
        if self.moments is None:
            return tensors["hidden"]
        head = self.meaning["head"]
        return TeacherMoments(
            **tensors,
            temperature=self.moments.temperature,
            logit_scale=self.moments.logit_scale,
            vocab_size=head["vocab_size"],
            head=head["fingerprint"],
        )

    # Index

    @property
    def index_path(self) -> Path:
        return self.folder / "index.json"

    def read_index(self) -> tuple[dict[str, dict[str, Any]], str | None]:
        """File name -> size, sha256 and kept tokens; and what is wrong with the index, if so."""
        try:
            found = json.loads(self.index_path.read_text(encoding="utf-8"))
            meaning, files = found["meaning"], found["files"]
            files = {name: dict(files[name]) for name in files}
        except FileNotFoundError:
            return {}, None
        except (OSError, ValueError, KeyError, TypeError) as error:
            return {}, f"{str(self.index_path)!r} is not a readable index ({error})"
        wanted = json.loads(json.dumps(_without_head(self.meaning)))
        for name in sorted({*wanted, *_without_head(meaning)}):
            if wanted.get(name) != meaning.get(name):
                return {}, (
                    f"{str(self.index_path)!r} was made for another {name} "
                    f"({meaning.get(name)!r}, this run has {wanted.get(name)!r})"
                )
        if "head" in meaning:
            self.meaning["head"] = meaning["head"]
        return files, None

    def write_index(self, files: dict[str, dict[str, Any]]) -> None:
        text = json.dumps({"meaning": self.meaning, "files": files}, indent=1)
        write_text(self.index_path, text + "\n")

    def fault(self, shard: Shard, entry: dict[str, Any] | None) -> str | None:
        """Why a file cannot be used; None for a sound one; "" for one that was never finished."""
        path = self.folder / shard.name
        if entry is None:
            return ""
        try:
            size = path.stat().st_size
            if size != entry.get("bytes"):
                return f"{str(path)!r} has {size} bytes instead of {entry.get('bytes')}"
            if file_hash(path) != entry.get("sha256"):
                return f"{str(path)!r} is damaged: its sha256 is not the index's"
        except OSError as error:
            return f"{str(path)!r} cannot be read ({error.strerror})"
        if entry.get("tokens") != sum(self.rows[row].kept for row in shard.rows):
            return f"{str(path)!r} holds other tokens than this run needs"
        return None


def _without_head(meaning: dict[str, Any]) -> dict[str, Any]:
    """The head's fingerprint is found while the moments are made: no part of the key."""
    return {name: value for name, value in meaning.items() if name != "head"}


def layout(rows: Sequence[Row]) -> list[Shard]:
    """Which row goes into which file: the longest first, so that passes hold rows alike."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    passes: list[list[int]] = []
    for row in order:
        width = len(rows[passes[-1][0]].ids) if passes else 0
        if not passes or (len(passes[-1]) + 1) * width > PASS_TOKENS:
            passes.append([])
        passes[-1].append(row)
    groups: list[list[list[int]]] = []
    held = SHARD_TOKENS
    for some in passes:
        if held >= SHARD_TOKENS:
            groups.append([])
            held = 0
        groups[-1].append(some)
        held += sum(rows[row].kept for row in some)
    return [Shard(f"{i:05d}.safetensors", group) for i, group in enumerate(groups)]


def rows_of(formatter: Formatter, harmless: Sequence[Prompt], positions: str) -> list[Row]:
    """The harmless rows, each with its response, as training sees them."""
    rows = []
    for prompt in harmless:
        ids, answer = formatter.conversation_ids(prompt, prompt.response or "")
        rows.append(Row(ids + answer, *kl_span(len(ids), len(answer), positions)))
    return rows


def open_cache(plan: Plan, harmless: Sequence[Prompt], runtime: Runtime) -> TeacherCache:
    """The cache that belongs to a run, its files not looked at; call on every rank."""
    config = plan.config
    rows = rows_of(plan.formatter, harmless, config.kl.positions)
    options = None
    if config.train.teacher == "moments":
        options = MomentOptions(config.kl.temperature, read_transform(plan.model).logit_scale)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.ids, row.start, row.stop]).encode())
    meaning: dict[str, Any] = {
        "version": VERSION,
        "kind": "hidden" if options is None else "moments",
        "model": runtime.on_main(model_fingerprint, config.model.name, config.model.revision),
        "template": plan.formatter.template_hash,
        "rows": digest.hexdigest(),
        "max_length": config.data.max_length,
        "max_response_tokens": config.data.max_response_tokens,
        "positions": config.kl.positions,
        "dtype": runtime.dtype,
        "attention": config.model.attn_implementation or "default",
        "layout": [SHARD_TOKENS, PASS_TOKENS],
    }
    if options is not None:
        meaning |= vars(options)
    key = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:20]
    folder = cache_folder(config.data.cache_dir) / "teacher" / key
    return TeacherCache(folder, meaning, rows, options)


def cache_teacher(
    plan: Plan, harmless: Sequence[Prompt], forward: Forward, runtime: Runtime
) -> TeacherCache:
    """The finished cache of a run: what is sound on disk is kept, the rest is made now.

    Args:
        plan: the run.
        harmless: its harmless prompts, each with a response.
        forward: `teacher_tokens` of the base model in eval mode; every rank calls it equally often.
        runtime: the ranks that share the files; call on every rank.

    Raises:
        UserError: the folder cannot be written, has no room, or is not the same on every rank.
    """
    cache = open_cache(plan, harmless, runtime)
    with ExitStack() as stack:  # another run on the same rows waits here and finds it finished
        runtime.long_on_main(_lock, cache, stack)
        files, why = runtime.on_main(cache.read_index)
        if "head" in (head := runtime.from_main(cache.meaning)):
            cache.meaning["head"] = head["head"]
        missing, warnings = _missing(cache, files, runtime)
        if runtime.is_main:
            for warning in [why] if why else warnings:
                tqdm.write(f"warning: teacher cache: {warning}; it is made again")
        sound = {s.name: files[s.name] for s in cache.shards if s not in missing}
        _make(cache, missing, sound, forward, runtime)
    _see_all(cache, runtime)
    if runtime.is_main:
        print(_summary(cache, len(missing)), flush=True)
    return cache


def _lock(cache: TeacherCache, stack: ExitStack) -> None:
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        # taken in one thread and given back in another
        stack.enter_context(FileLock(cache.folder / ".lock", thread_local=False))
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {str(cache.folder)!r} cannot be written ({error.strerror}); set "
            "data.cache_dir to a folder that can be written"
        ) from None


def _missing(
    cache: TeacherCache, files: dict[str, dict[str, Any]], runtime: Runtime
) -> tuple[list[Shard], list[str]]:
    """Files to make, and what is wrong with those that were there; ranks share the reading."""
    own = {
        shard.name: cache.fault(shard, files.get(shard.name))
        for shard in cache.shards[runtime.rank :: runtime.world_size]
    }
    faults: dict[str, str | None] = {}
    for found in runtime.gather_objects(own):
        faults |= found
    missing = [shard for shard in cache.shards if faults[shard.name] is not None]
    return missing, [fault for _, fault in sorted(faults.items()) if fault]


def _make(
    cache: TeacherCache,
    missing: list[Shard],
    files: dict[str, dict[str, Any]],
    forward: Forward,
    runtime: Runtime,
) -> None:
    """Writes the missing files, one per rank and round, and after each round the index."""
    world = runtime.world_size
    bar = tqdm(
        total=sum(len(shard.rows) for shard in missing),
        desc="teacher cache",
        unit="row",
        disable=not (runtime.is_main and missing),
    )
    for first in range(0, len(missing), world):
        own = first + runtime.rank
        shard = missing[own % len(missing)]
        turns = max(len(missing[i].passes) for i in range(first, min(first + world, len(missing))))
        tensors = _tensors(cache, shard, turns, forward, runtime)
        entry = None
        if own < len(missing):  # the others only keep step
            entry = runtime_error(_write, cache, shard, tensors)
        for found in runtime.gather_objects(entry):
            if isinstance(found, UserError):
                raise found
            files |= found or {}
        if runtime.is_main:
            cache.write_index(files)
            done = missing[first : first + world]
            bar.update(sum(len(each.rows) for each in done))
    bar.close()


def runtime_error(work: Callable[..., Any], *args: Any) -> Any:
    """What `work` returns, or its UserError as a value for all ranks to raise together."""
    try:
        return work(*args)
    except UserError as error:
        return error


def _tensors(
    cache: TeacherCache, shard: Shard, turns: int, forward: Forward, runtime: Runtime
) -> dict[str, Tensor]:
    """A file's content, on the CPU, from `turns` passes: the last one is repeated, since under
    ZeRO-3 all ranks have to make equally many."""
    parts: list[dict[str, Tensor]] = []
    for turn in range(turns):
        rows = [cache.rows[i] for i in shard.passes[min(turn, len(shard.passes) - 1)]]
        found = _pass(rows, cache, forward, runtime)
        if turn < len(shard.passes):
            parts.append({name: tensor.cpu() for name, tensor in found.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _pass(
    rows: list[Row], cache: TeacherCache, forward: Forward, runtime: Runtime
) -> dict[str, Tensor]:
    """One forward pass over left-padded rows."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    index = []
    for number, row in enumerate(rows):
        before = width - len(row.ids)
        ids[number, before:] = torch.tensor(row.ids)
        mask[number, before:] = 1
        index.append(torch.arange(row.start, row.stop) + number * width + before)
    mask = mask.to(runtime.device)
    found = forward(
        index=torch.cat(index).to(runtime.device),
        moments=cache.moments,
        input_ids=ids.to(runtime.device),
        attention_mask=mask,
        position_ids=position_ids(mask),
        use_cache=False,
    )
    if isinstance(found, Tensor):
        return {"hidden": found}
    cache.meaning["head"] = {"vocab_size": found.vocab_size, "fingerprint": found.head}
    return {name: getattr(found, name) for name in TENSORS}


def _write(cache: TeacherCache, shard: Shard, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Writes a file beside its place and moves it there; its entry in the index."""
    path = cache.folder / shard.name
    temporary = cache.folder / f".{shard.name}.{os.getpid()}.tmp"
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    try:
        free = shutil.disk_usage(cache.folder).free
        if size > free:
            raise UserError(
                f"data.cache_dir: {str(cache.folder)!r} has {free / 1e9:.2g} GB free and the next "
                f"file of the teacher cache takes {size / 1e9:.2g}; set data.cache_dir to a larger "
                "disk, or use train.teacher=auto"
            )
        save_file(tensors, temporary, metadata={"format": "es2fast-teacher"})
        entry = {
            "sha256": file_hash(temporary),
            "bytes": temporary.stat().st_size,
            "tokens": sum(cache.rows[row].kept for row in shard.rows),
        }
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"data.cache_dir: {str(path)!r} cannot be written ({error}); set data.cache_dir to a "
            "folder that can be written"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return {shard.name: entry}


def _see_all(cache: TeacherCache, runtime: Runtime) -> None:
    """Every rank has to see every file, on whichever node it is."""
    runtime.barrier()
    unseen = [s.name for s in cache.shards if not (cache.folder / s.name).is_file()]
    for rank, names in enumerate(runtime.gather_objects(unseen)):
        if names:
            raise UserError(
                f"data.cache_dir: rank {rank} does not see {str(cache.folder / names[0])!r}; set "
                "data.cache_dir to a folder that all nodes share"
            )
    for head in runtime.gather_objects(cache.meaning.get("head")):
        if head is not None:
            cache.meaning["head"] = head


def _summary(cache: TeacherCache, made: int) -> str:
    size = sum((cache.folder / shard.name).stat().st_size for shard in cache.shards)
    kept = sum(row.kept for row in cache.rows)
    done = f"{made} of {len(cache.shards)} files written" if made else "found complete"
    return (
        f"teacher cache: {kept} tokens of {len(cache.rows)} rows, {size / 1e6:.3g} MB in "
        f"{str(cache.folder)!r}, {done}"
    )


def file_hash(path: Path) -> str:
    """sha256 of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
