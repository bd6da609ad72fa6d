"""Data parallel over prompts: every rank answers its share with a replica of its own.

    torchrun --nproc_per_node 2 -m es2fast.cli evaluate MODEL ...

    attack k             is prepared by rank k mod W alone, all ranks at the same time
    what it found        goes from there to all ranks (`Attack.state`, `Attack.restore`)
    prompts r n/W ...    are answered by rank r, into answers.rank{r}.jsonl (rank 0: answers.jsonl)

So there is one search and one fit per attack, and ranks whose arithmetic differs in the last digit
cannot choose differently; preparing on every rank would need them to agree, and on rank 0 alone
would leave the others idle during the searches, which often take longer than the answers. In the
end rank 0 puts all answers into answers.jsonl and goes on as one process does that was interrupted
after its last answer: it measures, judges and reports. What shares a batch differs from one
process, and so may the rounding of an answer; nothing else does.

An evaluation that is stopped goes on with any number of ranks: what lies in files of ranks is taken
over before anything else. Ranks share the folder that is written.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from es2fast.attacks.base import Attack
from es2fast.attacks.direct import Direct
from es2fast.config import EvaluateConfig
from es2fast.data import Prompt
from es2fast.distributed.runtime import Runtime, resolve_device, stop
from es2fast.errors import UserError
from es2fast.evaluation.answering import (
    EvaluationPrompts,
    Preparation,
    Subject,
    SubjectAnswers,
    subject_answers,
)
from es2fast.evaluation.answers import HARMFUL, HARMLESS, AnswerLog
from es2fast.judges.registry import make_judges
from es2fast.run.files import append_line, read_lines
from es2fast.run.folder import RunFolder

PATIENCE = timedelta(days=30)  # ranks wait for each other's searches


def world_size() -> int:
    """Processes that a launcher started for this evaluation; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """This process speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def ranks(device: str, device_map: Any = None) -> Iterator[Runtime]:
    """The launcher's processes as a group that exchanges plain objects; this one's GPU is chosen.

    Raises:
        UserError: a device map, which takes all GPUs for one replica.
    """
    if device_map is not None:
        raise UserError(
            f"evaluate.device_map: {device_map!r} under a launcher with {world_size()} processes; "
            "spread one model over the GPUs (no launcher), or give each its replica (no device map)"
        )
    kind = resolve_device(device)
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Runtime(dist.get_rank(), dist.get_world_size(), torch.device(kind), "")
    finally:
        stop()


def answer_shares(
    subjects: Sequence[Subject],
    prompts: EvaluationPrompts,
    settings: EvaluateConfig,
    folder: RunFolder,
    runtime: Runtime,
) -> None:
    """Every rank's answers, in answers.jsonl when this returns on rank 0; call it on every rank."""
    if runtime.is_main:
        collect(folder.answers)
    runtime.barrier()
    others = [] if runtime.is_main else [folder.answers]
    log = AnswerLog(_shard(folder.answers, runtime.rank), others)
    runtime.barrier()  # all have read the same before anyone writes
    judge, *_ = make_judges(settings.judge, folder.verdicts)
    parts = subject_answers(
        subjects, prompts, settings, folder, log, judge,
        ranks=runtime.world_size, quiet=not runtime.is_main,
    )  # fmt: skip
    for part in parts:
        with part.unloading():
            _share(part, runtime)
    judge.close()
    runtime.barrier()
    if runtime.is_main:
        collect(folder.answers)


def collect(answers: Path) -> None:
    """Puts the answers of all ranks' files into answers.jsonl and removes those files."""
    for shard in sorted(answers.parent.glob(f"{answers.stem}.rank*{answers.suffix}")):
        for line in read_lines(shard):
            append_line(answers, line)
        shard.unlink()


def _shard(answers: Path, rank: int) -> Path:
    return answers if rank == 0 else answers.with_name(f"{answers.stem}.rank{rank}.jsonl")


def _own(prompts: Sequence[Prompt], runtime: Runtime) -> Sequence[Prompt]:
    """The rank's share, of equal size up to one."""
    count, rank, world = len(prompts), runtime.rank, runtime.world_size
    return prompts[rank * count // world : (rank + 1) * count // world]


def _share(part: SubjectAnswers, runtime: Runtime) -> None:
    """This rank's answers of one model."""
    harmless = _own(part.prompts.harmless, runtime)
    part.answers(Direct(Direct.Settings()), HARMLESS, harmless, lambda: None)
    missing = [attack for attack, count in part.missing().attacks if count]
    missing = runtime.from_main([attack.label for attack in missing])
    ready = [part.preparation(attack) for attack in part.attacks() if attack.label in missing]
    owners = [number % runtime.world_size for number in range(len(ready))]
    found = {
        number: _prepared(one, part.prompts)
        for number, (one, owner) in enumerate(zip(ready, owners))
        if owner == runtime.rank
    }
    for number, (one, owner) in enumerate(zip(ready, owners)):
        state = runtime.from_rank(found.get(number), owner)
        if state is None:  # it cannot be prepared, as rank 0 will find and say
            continue
        took = runtime.gather_objects(
            _answered(part, one.attack, runtime, None if owner == runtime.rank else state)
        )
        if owner == runtime.rank and None not in took:
            one.spend(max(took))


def _prepared(ready: Preparation, prompts: EvaluationPrompts) -> bytes | None:
    """The attack's state once it is prepared; None where that is a user's mistake."""
    try:
        ready.attack.coverage(prompts.harmful)
        ready.ensure()
    except UserError:
        return None
    buffer = io.BytesIO()
    torch.save(ready.attack.state(), buffer)
    return buffer.getvalue()


def _unpacked(state: bytes, part: SubjectAnswers) -> Any:
    own = str(part.target.device)  # what was on the other rank's GPU goes to this rank's
    places = {f"cuda:{i}": own for i in range(torch.cuda.device_count())}
    # a pickle, but from a process of this very evaluation
    return torch.load(io.BytesIO(state), map_location=places, weights_only=False)


def _answered(
    part: SubjectAnswers, attack: Attack, runtime: Runtime, state: bytes | None
) -> float | None:
    """Seconds in which the rank's share was answered; None where that is a user's mistake, as rank
    0, which then has to answer what is missing, will find and say.

    Args:
        state: of the attack, where another rank prepared it.
    """
    took = 0.0

    def spend(seconds: float) -> None:
        nonlocal took
        took += seconds

    try:
        if state is not None:
            attack.restore(_unpacked(state, part), part.target)
        part.answers(attack, HARMFUL, _own(part.prompts.harmful, runtime), lambda: None, spend)
    except UserError:
        return None
    return took
