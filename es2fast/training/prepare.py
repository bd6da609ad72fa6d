"""What is measured once on the base model before training.

Under the same ZeRO stage as the training itself, so a model that only fits partitioned can be
prepared too: the missing responses to harmless prompts (greedy, cached on disk), the last-prompt-
token states after every block in `separation.space`, from them the layers (`layers: auto`), the
base distances d0 and the base norms; and the check that the fused head makes the model's own
logits.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from es2fast.config import Config
from es2fast.data import Formatter, Prompt, PromptGroups
from es2fast.distributed.deepspeed_config import build_deepspeed, zero_stage
from es2fast.distributed.runtime import Runtime
from es2fast.distributed.zero import zero3_loading
from es2fast.errors import UserError
from es2fast.modeling import head as heads
from es2fast.modeling.load import DTYPES, load_causal_lm
from es2fast.modeling.taps import backbone, blocks, check_layers, last_token_states
from es2fast.ops.separation.whitening import Whitening
from es2fast.probing.choose import choose
from es2fast.probing.probes import LayerProbe
from es2fast.run.files import write_text
from es2fast.run.folder import RunFolder
from es2fast.training.responses import fill_responses


@dataclass
class Prepared:
    """layers ascending; d0 and norm0 per layer; the table and reason behind the choice; for the
    loss `fisher` the whitening per layer and the mean Mahalanobis distance, its unit of margin."""

    layers: list[int]
    d0: dict[int, float]
    norm0: dict[int, float]
    reason: str
    table: list[LayerProbe] = field(default_factory=list)
    whitening: dict[int, Whitening] = field(default_factory=dict)
    whitened0: dict[int, float] = field(default_factory=dict)

    def save(self, folder: RunFolder) -> None:
        """layers.json and, with a whitening, whitening.safetensors (`layer.name` -> tensor)."""
        plain = dataclasses.asdict(dataclasses.replace(self, whitening={}))
        del plain["whitening"]
        text = json.dumps(plain, indent=1, default=float) + "\n"
        write_text(folder.layers, text)
        if self.whitening:
            tensors = {
                f"{layer}.{name}": tensor.contiguous()
                for layer, found in self.whitening.items()
                for name, tensor in found.tensors().items()
            }
            save_file(tensors, folder.whitening)


class BaseModel(nn.Module):
    """The base model behind one interface, partitioned by ZeRO-3 or whole.

    Its forward is the only entry that ZeRO's hooks see: `task="states"` runs the backbone,
    `task="parity"` compares the fused head's logits with the model's own.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, task: str, **inputs: Any) -> Any:
        if task == "states":
            return backbone(self.model)(**inputs)
        return heads.parity_error(self.model, heads.read_transform(self.model.config), **inputs)


def prepare(
    config: Config, formatter: Formatter, groups: PromptGroups, runtime: Runtime
) -> tuple[Prepared, list[Prompt]]:
    """Runs the base model over the data; returns the measurements and the harmless prompts with
    every response filled in.

    Raises:
        UserError: a layer the model does not have; a head that the fused loss does not reproduce.
    """
    model, run, release = _load(config, runtime)
    dtype = DTYPES[runtime.dtype]
    probe_ids = torch.tensor([formatter.prompt_ids(groups.harmless[0])], device=runtime.device)
    heads.check_parity(run("parity", input_ids=probe_ids).item(), dtype, model.config)
    if config.layers != "auto":
        check_layers(config.layers, len(blocks(model)))
    harmless = fill_responses(config, formatter, groups.harmless, model, runtime)
    count = config.layer_choice.prompts
    a = _states(model, run, formatter, groups.harmful[:count], config, runtime)
    b = _states(model, run, formatter, groups.harmless[:count], config, runtime)
    choice = choose(config, a, b)
    layers = choice.layers
    prepared = Prepared(
        layers,
        {i: torch.cdist(a[i].double(), b[i].double()).mean().item() for i in layers},
        {i: torch.cat([a[i], b[i]]).norm(dim=-1).mean().item() for i in layers},
        choice.reason,
        choice.table,
    )
    _check_distances(prepared)
    if config.separation.loss == "fisher":
        for i in layers:
            prepared.whitening[i] = w = Whitening.fit(a[i], b[i])
            mean = torch.cat([a[i], b[i]]).mean(0)
            apart = torch.cdist(w((a[i] - mean).double()), w((b[i] - mean).double()))
            prepared.whitened0[i] = apart.mean().item()
    release()
    return prepared, harmless


def _check_distances(prepared: Prepared) -> None:
    for layer, d0 in prepared.d0.items():
        if not d0 > 0:
            raise UserError(
                f"layers: harmful and harmless prompts have the same state at block {layer} "
                "(distance 0); is the chat template ending both in a way that hides the prompt?"
            )


def _load(config: Config, runtime: Runtime) -> tuple[nn.Module, Any, Callable[[], None]]:
    """The base model in eval mode, what to call for a pass, and what frees ZeRO's partitions."""
    import deepspeed

    if zero_stage(config.deepspeed) < 3:
        model = load_causal_lm(config.model, runtime.dtype).to(runtime.device).eval()
        return model, torch.no_grad()(BaseModel(model)), lambda: None
    raw = build_deepspeed(config, world_size=runtime.world_size, dtype=runtime.dtype)
    raw.pop("optimizer", None)
    raw["zero_optimization"].pop("offload_optimizer", None)
    with zero3_loading(raw):
        model = load_causal_lm(config.model, runtime.dtype)
    engine, *_ = deepspeed.initialize(model=BaseModel(model), config=raw)
    engine.eval()
    return model, torch.no_grad()(engine), engine.destroy


def _states(
    model: nn.Module,
    run: Any,
    formatter: Formatter,
    prompts: Sequence[Prompt],
    config: Config,
    runtime: Runtime,
) -> dict[int, Tensor]:
    """States at every block in `separation.space`, all ranks sharing the work: layer ->
    (len(prompts), H) fp32."""
    batches = formatter.prompt_batches(prompts, 16)
    rounds = -(-len(batches) // runtime.world_size)
    mine = [batches[(runtime.rank + i * runtime.world_size) % len(batches)] for i in range(rounds)]
    every = range(len(blocks(model)))
    found = last_token_states(
        model,
        mine,
        list(every),
        lambda **kw: run("states", **kw),
        device=runtime.device,
        space=config.separation.space,
    )
    sizes = [batch["input_ids"].shape[0] for batch in mine]
    parts = {layer: list(states.split(sizes)) for layer, states in found.items()}
    gathered = runtime.gather_objects(parts)
    out = {}
    for layer in every:
        order = [
            gathered[j % runtime.world_size][layer][j // runtime.world_size]
            for j in range(len(batches))
        ]
        out[layer] = torch.cat(order)
    return out
