"""Two real processes collect the states of many prompts; started by test_states.py."""

from __future__ import annotations

import json
import resource
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import WORDS, tiny_model, tokenizer
from torch import Tensor

from es2fast.config import DataConfig
from es2fast.data import Formatter, Prompt
from es2fast.distributed.runtime import Runtime, stop
from es2fast.modeling.states import states_by_block

COUNT = 10_000


def prompts() -> list[Prompt]:
    """2 to 9 words each."""
    texts = []
    for i in range(COUNT):
        digits = [i // len(WORDS) ** k % len(WORDS) for k in range(2 + i % 8)]
        texts.append(" ".join(WORDS[digit] for digit in digits))
    return [Prompt.of(text) for text in texts]


def plain(asked: list[Prompt]) -> dict[int, Tensor]:
    """Block -> (n, H) by transformers' own option; rows of one length at a time, so no padding.
    The last block is left out: there the option hands out what comes after the final norm."""
    model, formatter = tiny_model("llama"), Formatter(tokenizer(), DataConfig())
    ids = [formatter.prompt_ids(prompt) for prompt in asked]
    by_length = defaultdict(list)
    for row, found in enumerate(ids):
        by_length[len(found)].append(row)
    out = {layer: torch.empty(len(ids), model.config.hidden_size) for layer in range(3)}
    for rows in by_length.values():
        with torch.no_grad():
            batch = torch.tensor([ids[row] for row in rows])
            states = model.model(batch, output_hidden_states=True).hidden_states
        for layer, kept in out.items():
            kept[rows] = states[layer + 1][:, -1]
    return out


def worker(rank: int, world: int, folder: str) -> None:
    """States to FOLDER/rank.pt, growth of the peak resident set in bytes to FOLDER/rank.json."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    runtime = Runtime(rank, world, torch.device("cpu"), "fp32")
    model, formatter = tiny_model("llama"), Formatter(tokenizer(), DataConfig())
    asked = prompts()
    list(states_by_block(model, formatter, asked[:200], runtime))  # threads, caches, connections
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (found,) = states_by_block(model, formatter, asked, runtime, layers=[0, 1, 2])
    growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    Path(folder, f"{rank}.json").write_text(json.dumps({"growth": growth}))
    torch.save(found, f"{folder}/{rank}.pt")
    stop()
