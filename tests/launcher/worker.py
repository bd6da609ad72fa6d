"""Runs a few real optimizer steps on every rank and writes down what happened.

Started by the deepspeed launcher (or alone, as one rank): `worker.py --out FILE --cases FILE`.
For each case the file holds the losses, and the state and gradients before the last step.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from es2fast.config import parse_config
from es2fast.distributed import runtime as runtimes
from es2fast.distributed.zero import full_state_dict
from es2fast.modeling.taps import blocks
from es2fast.ops.separation.whitening import Whitening
from es2fast.training.engine import build_engine
from es2fast.training.feed import Feed
from es2fast.training.plan import make_plan
from es2fast.training.prepare import Prepared, load_base
from es2fast.training.refusals import anchor_texts, refusal_metrics
from es2fast.training.robust import SimulatedAttack
from es2fast.training.step import step_inputs, train_step
from es2fast.training.teacher_cache import cache_teacher, keeps_teacher

STEPS = 4


def gradients(engine: Any) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_grad

    return {
        name: safe_get_full_grad(p).detach().float().cpu().clone()
        for name, p in engine.module.student.named_parameters()
        if p.requires_grad
    }


def trace_complete(engine: Any) -> bool | None:
    offload = getattr(engine.optimizer, "parameter_offload", None)
    return None if offload is None else offload.get_param_coordinator().is_complete_trace()


@contextlib.contextmanager
def wire() -> Iterator[dict[str, int]]:
    """Bytes that this rank receives: `parameters` by DeepSpeed's gathers, `tokens` by the package's
    all-gathers and reduce-scatters."""
    from deepspeed.comm import comm

    found = {"parameters": 0, "tokens": 0}
    backend: Any = comm.cdb
    gather, scatter, parameters = (
        dist.all_gather, dist.reduce_scatter_tensor, backend.all_gather_into_tensor
    )  # fmt: skip

    def all_gather(parts: list[torch.Tensor], mine: torch.Tensor, group: Any = None) -> None:
        found["tokens"] += mine.nbytes * (len(parts) - 1)
        gather(parts, mine, group=group)

    def reduce_scatter(out: torch.Tensor, x: torch.Tensor, group: Any = None) -> None:
        found["tokens"] += x.nbytes - out.nbytes
        scatter(out, x, group=group)

    def all_gather_parameters(output_tensor: Any, input_tensor: Any, **options: Any) -> Any:
        found["parameters"] += output_tensor.nbytes - input_tensor.nbytes
        return parameters(output_tensor, input_tensor, **options)

    dist.all_gather, dist.reduce_scatter_tensor = all_gather, reduce_scatter  # type: ignore[assignment]
    backend.all_gather_into_tensor = all_gather_parameters
    try:
        yield found
    finally:
        dist.all_gather, dist.reduce_scatter_tensor = gather, scatter
        del backend.all_gather_into_tensor


def still_gathered(engine: Any) -> list[str]:
    """Parameters that ZeRO-3 has left whole, those aside that it keeps so on purpose."""
    return [
        name
        for name, p in engine.module.named_parameters()
        if hasattr(p, "ds_id") and p.ds_status.name != "NOT_AVAILABLE" and not p.ds_persist
    ]


def some_whitening() -> Whitening:
    """Of random states with unequal variances, width 32."""
    states = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))
    return Whitening.fit(*(states * torch.linspace(0.5, 3.0, 32)), rank=4)


def run_case(case: dict[str, Any], runtime: runtimes.Runtime) -> dict[str, Any]:
    config = parse_config(case["config"])
    layers = config.layers
    assert isinstance(layers, list)
    prepared = Prepared(layers, dict.fromkeys(layers, 5.0), dict.fromkeys(layers, 10.0), "test")
    if config.separation.loss == "fisher":
        prepared.whitening = {layer: some_whitening() for layer in layers}
        prepared.whitened0 = dict.fromkeys(layers, 8.0)
    plan = make_plan(config, world_size=runtime.world_size)
    texts = anchor_texts(config, plan.groups.harmful)
    teacher = None
    if keeps_teacher(config.train):
        _, run, release = load_base(plan, runtime, whole=plan.zero_stage < 3)
        teacher = cache_teacher(
            plan, plan.groups.harmless, lambda **inputs: run("teacher", **inputs), runtime
        )
        release()
    feed = Feed(plan, plan.groups.harmless, runtime.rank, texts, teacher)
    engine = build_engine(plan, prepared, runtime)
    found: dict[str, Any] = {"losses": [], "kl": [], "trace": [], "states": []}
    found["attacked"], found["refusal"], found["norms"], found["wire"] = [], [], [], []
    simulated = SimulatedAttack(config, layers, runtime, depth=len(blocks(engine.module.student)))
    take_step = engine.step

    def step() -> None:
        if engine.is_gradient_accumulation_boundary():
            found["trace"].append(trace_complete(engine))
            if len(found["losses"]) == STEPS - 1:
                found["grads"] = gradients(engine)
        take_step()

    engine.step = step
    for index in range(STEPS):
        found["states"].append(full_state_dict(engine.module.student, main=True))
        attack = simulated.for_step(index + 1)
        with wire() as received:
            where = None if attack is None else attack.where
            inputs = step_inputs(engine, feed(index), runtime.device, where)
            numbers, _ = train_step(
                engine, inputs, config.kl.weight, runtime, attack, simulated.observe
            )
        sums = numbers.wait()
        found["wire"].append(received)
        found["whole"] = still_gathered(engine)
        found["attacked"].append(None if attack is None else attack.name)
        found["losses"].append(sums["sep"])
        found["norms"].append(sums["grad_norm"])
        found["kl"].append(sums["kl_sum"] / sums["kl_tokens"])
        found["refusal"].append(refusal_metrics(sums))
    digest = hashlib.sha256()
    for value in full_state_dict(engine.module.student, main=True).values():
        digest.update(value.contiguous().numpy().tobytes())
    found["digests"] = runtime.gather_objects(digest.hexdigest())
    engine.destroy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True)
    parser.add_argument("--cases", required=True)
    parser.add_argument("--local_rank")
    arguments = parser.parse_args()
    with open(arguments.cases) as file:
        cases = json.load(file)
    runtime = runtimes.start(parse_config(next(iter(cases.values()))["config"]))
    results = {name: run_case(case, runtime) for name, case in cases.items()}
    if runtime.is_main:
        torch.save(results, arguments.out)
    runtime.barrier()
    runtimes.stop()


if __name__ == "__main__":
    main()
