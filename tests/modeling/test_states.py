"""States of every block in bounded memory, on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, MORE_FAMILIES, OBJECTS, VERBS, tiny_model, tokenizer
from torch import multiprocessing
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoConfig, AutoModelForCausalLM

from es2fast.config import DataConfig
from es2fast.data import Formatter, Prompt
from es2fast.distributed.runtime import Runtime
from es2fast.errors import UserError
from es2fast.modeling.states import check_padding, last_token_states, states_by_block
from es2fast.modeling.taps import blocks, hidden_of
from modeling import states_ranks

COUNT, WIDTH, DEPTH = 40, 32, 4
ALONE = Runtime(rank=0, world_size=1, device=torch.device("cpu"), dtype="fp32")


@pytest.mark.parametrize("at_once, passes", [(0.5, 4), (1.0, 4), (3.9, 2), (9.0, 1)])
def test_states_in_bounded_memory_keep_order_and_values(at_once: float, passes: int) -> None:
    model, formatter = tiny_model("llama"), Formatter(tokenizer(), DataConfig())
    texts = [f"{v} the {o}" + " please" * (i % 5) for i, (v, o) in
             enumerate((v, o) for v in VERBS for o in OBJECTS)][:COUNT]  # fmt: skip
    prompts = [Prompt.of(text) for text in texts]
    memory = int(at_once * 4 * COUNT * WIDTH)
    parts = list(states_by_block(model, formatter, prompts, ALONE, memory=memory))
    assert len(parts) == passes
    assert [layer for part in parts for layer in part] == list(range(DEPTH))
    assert all(len(part) <= max(1, at_once) for part in parts)
    found = {layer: states for part in parts for layer, states in part.items()}
    assert all(states.shape == (COUNT, WIDTH) for states in found.values())
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([formatter.prompt_ids(prompt)])
        with torch.no_grad():
            wanted = model(ids, output_hidden_states=True).hidden_states
        for layer in range(DEPTH - 1):  # transformers' last entry comes after the final norm
            alone = wanted[layer + 1][0, -1]
            torch.testing.assert_close(found[layer][row], alone, rtol=1e-4, atol=1e-4)


def test_nothing_but_the_last_tokens_is_kept() -> None:
    """A view of a block's output would keep all of its (B, T, H) memory."""
    model, outputs = tiny_model("llama"), []
    handle = blocks(model)[0].register_forward_hook(
        lambda module, args, out: outputs.append(StorageWeakRef(hidden_of(out).untyped_storage()))
    )

    def batches():
        for _ in range(3):
            yield {"input_ids": torch.ones(2, 6).long(), "attention_mask": torch.ones(2, 6).long()}
        assert all(output.expired() for output in outputs[:2])

    last_token_states(model, batches(), [0])
    handle.remove()
    assert len(outputs) == 3


PROMPTS = [Prompt.of("describe the car please"), Prompt.of("steal it")]


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_models_that_heed_the_attention_mask(family: str) -> None:
    check_padding(tiny_model(family), Formatter(tokenizer(), DataConfig()), PROMPTS)


def test_a_model_that_reads_its_padding() -> None:
    config = AutoConfig.for_model(
        "rwkv", vocab_size=64, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError, match=r"model\.name: RwkvForCausalLM .* does not heed"):
        check_padding(model, Formatter(tokenizer(), DataConfig()), PROMPTS)


def test_many_prompts_on_two_ranks(tmp_path: Path) -> None:
    """All states are 5 MB. Pickled row views of 16, each with its whole storage, sent to every
    rank, grow it by 4 GB; this way by 8 to 18 MB, tokenized prompts included."""
    multiprocessing.spawn(states_ranks.worker, (2, str(tmp_path)), nprocs=2)
    growth = [json.loads((tmp_path / f"{rank}.json").read_text())["growth"] for rank in (0, 1)]
    assert max(growth) < 100e6, growth
    found = torch.load(tmp_path / "0.pt")
    assert all(not len(rows) for rows in torch.load(tmp_path / "1.pt").values())
    wanted = states_ranks.plain(states_ranks.prompts())
    assert found.keys() == wanted.keys()
    for layer, rows in wanted.items():
        torch.testing.assert_close(found[layer], rows, rtol=1e-4, atol=1e-4)
