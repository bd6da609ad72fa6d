"""All that a run needs to go on bit for bit: what is saved after a step, and read back.

    engine/              trainable weights, optimizer and schedule, by DeepSpeed; frozen weights are
                         the base model's and left out
    prepared.json        what was measured and written before training, so that nothing is anew
    state-R.json         rank R's objects and random generators; their tensors are in
    state-R.safetensors

Which rows a step sees, and which attack, are functions of (seed, step): the step is their position.

Another number of ranks, or another ZeRO stage, may go on: the engine's part is converted
(`reshard`), banked rows, kept states and the last sane weights are parted anew, rank r takes the
generators of rank r mod R of the R earlier ones, and what all ranks hold alike comes from rank 0.

A rank that cannot write (a full disk) does not raise while the others wait for it: DeepSpeed writes
through `_Files`, which keeps the error until all ranks can hear of it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from es2fast.distributed.runtime import Runtime
from es2fast.errors import UserError
from es2fast.run.checkpoints import CheckpointFolder, files_of, seal
from es2fast.run.files import remove
from es2fast.training import reshard
from es2fast.training.refusals import AnchorTexts
from es2fast.training.reshard import Layout

ENGINE = "engine"
PREPARED = "prepared.json"


class Stateful(Protocol):
    """An object of the loop that a checkpoint holds."""

    def state_dict(self) -> dict[str, Any]: ...


def save(
    engine: Any,
    parts: Mapping[str, Stateful],
    step: int,
    *,
    folder: CheckpointFolder,
    keep: int,
    prepared: Callable[[Path], None],
    identity: Mapping[str, Any],
    runtime: Runtime,
) -> str | None:
    """Writes the checkpoint after optimizer step `step` and prunes older ones; on every rank.

    Args:
        engine: of DeepSpeed.
        parts: the loop's objects by name.
        step: from 1.
        folder: of the run's checkpoints, which every rank reaches.
        keep: newest ones that stay.
        prepared: writes what was measured and written before training into a folder.
        identity: of the run, for the manifest.
        runtime: the ranks.

    Returns:
        None, or why it could not be written; earlier ones are untouched then.
    """
    partial = folder.at(step).with_suffix(".tmp")
    problem = runtime.on_main(_guarded, folder.begin, step)
    if problem is None:
        writer = engine.checkpoint_engine
        files = engine.checkpoint_engine = _Files(writer)
        try:
            engine.save_checkpoint(
                str(partial), tag=ENGINE, save_latest=False, exclude_frozen_parameters=True
            )
        finally:
            engine.checkpoint_engine = writer
        own = files.problem or _guarded(_write_state, partial, parts, runtime)
        if own is None and runtime.is_main:
            own = _guarded(prepared, partial)
        problem = _first(runtime.gather_objects(own))  # all files are there, or one is missing
    if problem is None:
        seals: dict[str, Any] = {}
        own = _guarded(lambda: seals.update(_sealed(partial, runtime)))
        gathered = runtime.gather_objects((own, seals))
        problem = _first([own for own, _ in gathered])
        if problem is None:
            everything = {name: found for _, part in gathered for name, found in part.items()}
            problem = runtime.on_main(_guarded, folder.commit, step, everything, dict(identity))
    if runtime.is_main:
        if problem is None:
            folder.prune(keep)
        else:
            _guarded(folder.drop_unfinished)
    runtime.barrier()
    return problem


def load(
    engine: Any, parts: Mapping[str, Any], folder: Path, runtime: Runtime, then: Layout
) -> None:
    """Puts a verified checkpoint into a freshly built engine and the loop's objects; call on every
    rank.

    Args:
        then: what wrote it.

    Raises:
        UserError: it has to be converted and the disk is full; it is untouched then.
    """
    now = Layout(runtime.world_size, engine.zero_optimization_stage())
    if then == now or then.stage == now.stage == 0:
        engine.load_checkpoint(str(folder), tag=ENGINE, load_module_strict=False)
    else:
        _load_converted(engine, folder, runtime, then, now)
    if then == now:
        state = _read_state(folder, runtime.rank)
    else:
        state = _joined([_read_state(folder, rank) for rank in range(then.ranks)], parts, runtime)
    for name, part in parts.items():
        where = (runtime.device,) if name == "bank" else ()
        part.load_state_dict(state["parts"][name], *where)
    _set_generators(state["random"])


def _load_converted(engine: Any, folder: Path, runtime: Runtime, then: Layout, now: Layout) -> None:
    """By way of a folder beside the checkpoints, which rank 0 writes and removes; one that a killed
    process leaves is not read, and goes with the next conversion or the next save."""
    place = folder.with_name("step-converted.tmp") / ENGINE
    problem = runtime.long_on_main(
        _guarded, reshard.convert, folder / ENGINE, place, then.stage, engine
    )
    if problem is not None:
        if runtime.is_main:
            _guarded(remove, place.parent)
        raise UserError(
            f"checkpoint.resume: {str(folder)!r} could not be converted from {then} to {now} "
            f"({problem}); free three times its size there, or go back to {then}"
        )
    reshard.load(engine, place)
    runtime.barrier()
    if runtime.is_main:
        remove(place.parent)


def _joined(
    states: list[dict[str, Any]], parts: Mapping[str, Any], runtime: Runtime
) -> dict[str, Any]:
    """This rank's state from those of all ranks of the checkpoint."""
    joined = {}
    for name, part in parts.items():
        every = [state["parts"][name] for state in states]
        part_anew = getattr(part, "parted", None)
        joined[name] = every[0] if part_anew is None else part_anew(every, runtime.rank)
    return {"parts": joined, "random": states[runtime.rank % len(states)]["random"]}


def _read_state(folder: Path, rank: int) -> dict[str, Any]:
    """What `_write_state` wrote on a rank."""
    stem = folder / f"state-{rank}"
    tensors = load_file(stem.with_suffix(".safetensors"))
    found = _unpacked(json.loads(stem.with_suffix(".json").read_text(encoding="utf-8")), tensors)
    return dict(found)


def texts_state(responses: list[str | None], texts: AnchorTexts | None) -> dict[str, Any]:
    """What was written before training, for `prepared.json`."""
    return {"responses": responses, "anchor": None if texts is None else asdict(texts)}


class _Files:
    """DeepSpeed's checkpoint engine with another `save`: the first error is kept, not raised."""

    def __init__(self, engine: Any):
        self._engine = engine
        self.problem: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def save(self, state_dict: Any, path: str) -> None:
        """Writes one file."""
        self.problem = self.problem or _guarded(self._engine.save, state_dict, path)


def _guarded(work: Any, *args: Any, **options: Any) -> str | None:
    """Does it; why it could not be done where that is the disk's fault."""
    try:
        work(*args, **options)
    except OSError as error:
        return error.strerror or str(error)
    except RuntimeError as error:  # of torch's and safetensors' writers, which hide the reason
        if not any(word in str(error) for word in ("iostream", "write", "Io", "I/O", "enforce")):
            raise
        return str(error).splitlines()[0]
    return None


def _first(problems: list[str | None]) -> str | None:
    return next((problem for problem in problems if problem is not None), None)


def _sealed(folder: Path, runtime: Runtime) -> dict[str, Any]:
    """This rank's share of the files."""
    return seal(folder, files_of(folder)[runtime.rank :: runtime.world_size])


def _write_state(folder: Path, parts: Mapping[str, Stateful], runtime: Runtime) -> None:
    tensors: dict[str, Tensor] = {}
    state = {
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "random": _generators(),
    }
    plain = _packed(state, tensors)
    stem = folder / f"state-{runtime.rank}"
    stem.with_suffix(".json").write_text(json.dumps(plain), encoding="utf-8")
    try:
        save_file(tensors, stem.with_suffix(".safetensors"))
    except Exception as error:
        if isinstance(error, (OSError, RuntimeError)):
            raise
        raise OSError(str(error)) from None  # safetensors has a type of its own


def _packed(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """The value with its tensors replaced by their names in `tensors`."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(value, dict):
        return {key: _packed(child, tensors, f"{path}.{key}") for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_packed(child, tensors, f"{path}.{i}") for i, child in enumerate(value)]
    return value


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _unpacked(child, tensors) for key, child in value.items()}
    return [_unpacked(child, tensors) for child in value] if isinstance(value, list) else value


def _generators() -> dict[str, Any]:
    """Of this rank: torch's on the CPU and its GPU, Python's and numpy's."""
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    found = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), place, has_gauss, gauss],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def _set_generators(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def failed_to_save(step: int, problem: str, folder: CheckpointFolder) -> str:
    """The line about a checkpoint that could not be written."""
    kept = folder.steps()
    rest = f"that of step {kept[0]} stays usable" if kept else "there is none yet"
    return f"the checkpoint of step {step} could not be written ({problem}); {rest}"
