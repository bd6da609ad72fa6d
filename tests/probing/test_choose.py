"""States of every block in bounded memory, and the configuration behind `es2fast layers`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import OBJECTS, VERBS, tiny_model, tokenizer
from torch.multiprocessing.reductions import StorageWeakRef

from es2fast.config import DataConfig
from es2fast.data import Formatter, Prompt
from es2fast.modeling.taps import blocks, hidden_of, last_token_states
from es2fast.probing.choose import probing_config, states_by_block

COUNT, WIDTH, DEPTH = 40, 32, 4


@pytest.mark.parametrize("at_once, passes", [(0.5, 4), (1.0, 4), (3.9, 2), (9.0, 1)])
def test_states_in_bounded_memory_keep_order_and_values(at_once: float, passes: int) -> None:
    model, formatter = tiny_model("llama"), Formatter(tokenizer(), DataConfig())
    texts = [f"{v} the {o}" + " please" * (i % 5) for i, (v, o) in
             enumerate((v, o) for v in VERBS for o in OBJECTS)][:COUNT]  # fmt: skip
    prompts = [Prompt.of(text) for text in texts]
    memory = int(at_once * 4 * COUNT * WIDTH)
    parts = list(states_by_block(model, formatter, prompts, memory=memory))
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


def test_what_the_argument_is(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("model: {name: some/model}\ndata: {harmful: a.txt, harmless: b.txt}\n")
    config = probing_config(str(run), ["layers=[3]"], harmful=["c.txt", "d.txt"])
    assert config.model.name == "some/model" and config.layers == [3]
    assert [source.source for source in config.data.harmful] == ["c.txt", "d.txt"]
    assert config.data.harmless[0].source == "b.txt"
    config = probing_config("org/other-1", ["data.labelled=x.csv"])
    assert config.model.name == "org/other-1"
