"""Optimizer steps one behind the other: `step_worker.py OUT CONFIG ...`, one rank.

Per configuration the same four steps twice: each with nothing known from the one before, and each
made ready during the one before; with what was exchanged and what the host waited for.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny_models import save_tiny, write_prompts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from es2fast.config import Config, load_config
from es2fast.distributed import runtime as runtimes
from es2fast.distributed.runtime import Runtime
from es2fast.distributed.zero import full_state_dict
from es2fast.modeling.taps import blocks
from es2fast.training.engine import build_engine
from es2fast.training.feed import Feed
from es2fast.training.plan import make_plan
from es2fast.training.prepare import Prepared
from es2fast.training.refusals import anchor_texts
from es2fast.training.robust import SimulatedAttack
from es2fast.training.step import StepInputs, step_inputs, train_step

STEPS = 4
CPU = torch.device("cpu")
ROBUST = {"probability": 0.5, "blocks": "all", "attacks": ["mean_difference", "ablation"]}
REFUSAL = {"weight": 1.0, "source": "list", "texts": ["i will not do that ."]}
CASES: dict[str, dict[str, Any]] = {
    "zero0": {},
    "zero3": {"train": {"gradient_accumulation": 2}},
    "anchored": {"separation": {"bank": 4, "robust": ROBUST}, "refusal": REFUSAL},
    "padded": {
        "separation": {"robust": ROBUST | {"attacks": ["mean_difference"]}},
        "refusal": REFUSAL,
        "train": {"packing": False, "trainable": "lora", "trainable_blocks": "all"},
    },
}
WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "equal", "masked_select"}  # on a GPU
ON_CPU = ("separation/op.py", "_backward")  # looks at a factor on a CPU alone


@dataclass(frozen=True)
class Counting(Runtime):
    """A runtime that counts its small sums."""

    sums: list[int] = field(default_factory=list)

    def sum(self, values: Tensor) -> Tensor:
        self.sums.append(values.numel())
        return super().sum(values)


class Waits(TorchDispatchMode):
    """What would make the host wait for a GPU, and the innermost line of Python that did it; what
    DeepSpeed does in `engine.step` apart."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        index = args[1] if name.startswith(("index", "_index_put")) else ()
        by_mask = any(getattr(one, "dtype", None) == torch.bool for one in index or ())
        if name in WAITS or by_mask:
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
            updating = any(frame.name == "_take_model_step" for frame in frames)
            line = frames[-2]  # behind this one
            if not updating and not (line.filename.endswith(ON_CPU[0]) and line.name == ON_CPU[1]):
                self.found.add(f"{name} in {line.filename}:{line.lineno} {line.name}")
        return func(*args, **(kwargs or {}))


@contextmanager
def lists_told(waits: Waits) -> Iterator[None]:
    """`Tensor.tolist`, which no dispatcher sees, among the waits."""
    plain = Tensor.tolist

    def told(self: Tensor) -> Any:
        waits.found.add("tolist")
        return plain(self)

    Tensor.tolist = told  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.tolist = plain  # type: ignore[method-assign]


@contextmanager
def waiting_forbidden(engine: Any, device: torch.device) -> Iterator[None]:
    """On a GPU torch itself raises where the host waits, but in `engine.step`."""
    if device.type != "cuda":
        yield
        return
    update = engine.step

    def step() -> None:
        torch.cuda.set_sync_debug_mode("default")
        update()
        torch.cuda.set_sync_debug_mode("error")

    engine.step = step
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        engine.step = update


def run(config: Config, runtime: Counting, ahead: bool) -> dict[str, Any]:
    layers = config.layers
    assert isinstance(layers, list)
    plan = make_plan(config, world_size=1)
    texts = anchor_texts(config, plan.groups.harmful)
    feed = Feed(plan, plan.groups.harmless, 0, texts)
    prepared = Prepared(layers, dict.fromkeys(layers, 5.0), dict.fromkeys(layers, 10.0), "test")
    engine = build_engine(plan, prepared, runtime)
    simulated = SimulatedAttack(config, layers, runtime, depth=len(blocks(engine.module.student)))
    found: dict[str, Any] = {"numbers": [], "sums": [], "attacked": [], "waits": []}
    following: StepInputs | None = None

    def ready(step: int) -> StepInputs:
        with _disable_current_modes():  # on the CPU, wherever the engine is
            return step_inputs(engine, feed(step), runtime.device, simulated.where(step + 1))

    for step in range(STEPS):
        inputs = following or ready(step)
        attack = simulated.for_step(step + 1)
        upcoming = (lambda after=step + 1: ready(after)) if ahead and step + 1 < STEPS else None
        runtime.sums.clear()
        waits = Waits()
        with waits, lists_told(waits), waiting_forbidden(engine, runtime.device if step else CPU):
            numbers, following = train_step(
                engine, inputs, config.kl.weight, runtime, attack, simulated.observe,
                meanwhile=upcoming,
            )  # fmt: skip
        if step:  # at the first ZeRO-3 compares the order of the modules with the other ranks'
            found["waits"] += sorted(waits.found)
        found["sums"].append(len(runtime.sums))
        found["attacked"].append(attack is not None)
        found["numbers"].append(numbers.wait())
    found["weights"] = digest(engine)
    try:
        train_step(engine, ready(STEPS), config.kl.weight, runtime, meanwhile=_given_up)
    except StopIteration:
        found["given_up"] = digest(engine)
    engine.destroy()
    return found


def _given_up() -> None:
    raise StopIteration


def digest(engine: Any) -> str:
    made = hashlib.sha256()
    for value in full_state_dict(engine.module.student, main=True).values():
        made.update(value.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def ran(folder: Path, names: Iterable[str], device: str, dtype: str) -> dict[str, Any]:
    """What a process of its own finds of CASES, by name.

    Args:
        folder: an empty one.
        names: of the cases.
        device, dtype: of the training.
    """
    paths = []
    for name in names:
        train = {"steps": 6, "micro_batch_size": 2, "device": device, "lr": 1e-2}
        config = {
            "model": {"name": str(save_tiny(folder / "model")), "dtype": dtype},
            "data": write_prompts(folder / "data"),
            "layers": [1, 2],
            "deepspeed": name if name.startswith("zero") else "zero0",
            "output_dir": str(folder / name),
        }
        config |= CASES[name] | {"train": train | CASES[name].get("train", {})}
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(config))
    accelerator = {"DS_ACCELERATOR": "cpu"} if device == "cpu" else {}
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, __file__, str(folder / "found.json"), *map(str, paths)],
        env=os.environ | accelerator | {"OMP_NUM_THREADS": "1", "PYTHONPATH": tests},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def main() -> None:
    out, *paths = [item for item in sys.argv[1:] if not item.startswith("--local_rank")]
    alone = runtimes.start(load_config(paths[0]))
    runtime = Counting(alone.rank, alone.world_size, alone.device, alone.dtype)
    found = {
        Path(path).stem: [run(load_config(path), runtime, ahead) for ahead in (False, True)]
        for path in paths
    }
    Path(out).write_text(json.dumps(found))
    runtimes.stop()


if __name__ == "__main__":
    main()
