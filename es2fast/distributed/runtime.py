"""Where a run executes: device, precision, ranks, and quiet ranks other than 0."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from es2fast.config import Config
from es2fast.distributed.allocator import keep_few_products, keep_freed_memory
from es2fast.distributed.cores import ranks_here, settle
from es2fast.distributed.operators import drop_stale_locks
from es2fast.errors import UserError
from es2fast.progress import verbose

T = TypeVar("T")
MINUTE = 60.0
LET_GO = 0.05  # seconds in which the interpreter's lock is free


@dataclass(frozen=True)
class Runtime:
    """rank and world_size over all nodes; device of this process; dtype "bf16" or "fp32"."""

    rank: int
    world_size: int
    device: torch.device
    dtype: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks of a small tensor on this device."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def gather_rows(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """On rank 0 every rank's `rows`, in rank order, on the CPU; elsewhere nothing.

        Args:
            rows: of the same shape and dtype on every rank, on any device.
        """
        if self.world_size == 1:
            return [rows.cpu()]
        own = rows.contiguous().to(self.device)
        parts = [torch.empty_like(own) for _ in range(self.world_size)] if self.is_main else None
        dist.gather(own, parts, dst=0)
        return [part.cpu() for part in parts or []]

    def from_main(self, value: Any) -> Any:
        """Rank 0's `value` on every rank; others pass anything."""
        return self.from_rank(value, 0)

    def from_rank(self, value: Any, rank: int) -> Any:
        """One rank's `value` on every rank; others pass anything."""
        if self.world_size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=rank)
        return held[0]

    def on_main(self, work: Callable[..., T], *args: Any, **options: Any) -> T:
        """What `work(*args, **options)` returns on rank 0, on every rank; it runs there alone.

        Raises:
            UserError: rank 0's, on every rank.
        """
        result: T | UserError | None = None
        if self.is_main:
            try:
                result = work(*args, **options)
            except UserError as error:
                result = error
        result = self.from_main(result)
        if isinstance(result, UserError):
            raise result
        return result  # type: ignore[return-value]

    def long_on_main(self, work: Callable[..., T], *args: Any) -> T:
        """`on_main` for work that may take longer than a collective may wait (10 minutes by
        default): rank 0 does it in a thread, and tells the others every minute that it goes on."""
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work, *args) if self.is_main else None
            while not self.from_main(future is not None and bool(wait([future], MINUTE).done)):
                pass
            return self.on_main(lambda: future.result())  # type: ignore[union-attr]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def resolve_device(wanted: str) -> str:
    """ "cpu" or "cuda".

    Raises:
        UserError: cuda asked for and none there.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("train.device: 'cuda' asked for, but torch sees no GPU; use cpu or auto")
    return "cuda" if available and wanted != "cpu" else "cpu"


def resolve_dtype(wanted: str, device: str) -> str:
    """ "bf16" or "fp32"; `auto` is bf16 on a GPU and fp32 on a CPU."""
    if wanted != "auto":
        return wanted
    return "bf16" if device == "cuda" else "fp32"


def start(config: Config) -> Runtime:
    """Joins the process group that the launcher set up (or a group of one) and picks the device."""
    device = resolve_device(config.train.device)
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        keep_freed_memory()
        keep_few_products()
    for name in ("RANK", "LOCAL_RANK"):
        os.environ.setdefault(name, "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    _quiet(int(os.environ["RANK"]))
    for lock in drop_stale_locks():
        if os.environ["RANK"] == "0":
            print(
                f"note: {lock} exists: another process is building a DeepSpeed operator, or "
                "one was killed doing so. If nothing moves for minutes, stop and delete it.",
                flush=True,
            )
    import deepspeed

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        settle(int(os.environ["LOCAL_RANK"]), ranks_here(), config.train.bind_cores)
    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo", verbose=False)
    if device == "cpu":
        _unlink_buffer()
    index = int(os.environ["LOCAL_RANK"]) if device == "cuda" else None
    return Runtime(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=torch.device(device, index) if index is not None else torch.device(device),
        dtype=resolve_dtype(config.model.dtype, device),
    )


def _unlink_buffer() -> None:
    """Takes the name of this rank's shared-memory buffer away; its ranks have it open.

    DeepSpeed's collectives on a CPU make 69 MB per rank in /dev/shm and never remove them, so every
    launch would cost that memory until the machine restarts.
    """
    if dist.get_world_size() > 1:
        dist.barrier()  # all ranks have opened all buffers
    environ = os.environ
    name = "_".join(
        ("deepspeed_allreduce_buffer", str(os.getuid()), environ["MASTER_ADDR"],
         environ["MASTER_PORT"], environ["RANK"])
    )  # fmt: skip
    (Path("/dev/shm") / name).unlink(missing_ok=True)


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        gloo = dist.get_backend() == "gloo"
        dist.destroy_process_group()
        if gloo:
            let_go()


def let_go() -> None:
    """Gives gloo's threads a moment before the interpreter ends.

    One that has ended a collective lets its tensors go with the interpreter's lock; if it waits for
    the lock while the interpreter ends, it aborts the process ("terminate called without an active
    exception").
    """
    time.sleep(LET_GO)


def _quiet(rank: int) -> None:
    """Library chatter below warnings is dropped, unless wanted; ranks other than 0 say errors
    only."""
    wanted = {"error": logging.ERROR, "info": logging.INFO}
    level = wanted.get(os.environ.setdefault("DS_LOG_LEVEL", "warning"), logging.WARNING)
    level = level if rank == 0 else logging.ERROR
    from deepspeed.utils import logger
    from transformers.utils import logging as hf_logging

    logger.setLevel(level)
    for handler in logger.handlers:
        handler.setLevel(level)
    if rank != 0 or not verbose():
        hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if rank != 0:
        warnings.filterwarnings("ignore")
