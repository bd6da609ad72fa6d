"""What is measured once on the base model before training.

Each rank holds the whole base model where it fits; a model that only fits partitioned is prepared
under the training's ZeRO-3: the missing responses to harmless prompts and, for a refusal anchor in
the model's own words, its answers to harmful ones (greedy, cached on disk); its states or moments,
where `train.teacher` is kept on disk; the last-prompt-token states after
every block in `separation.space`, from them the layers (`layers: auto`, which also looks at what a
push at every block does to the next token after some harmful prompts), the base distances d0 and
the base norms; and the check that the fused head makes the model's own logits. States are gathered
on rank 0, which decides and measures alone; the others are told.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from es2fast.config import Config
from es2fast.data import Prompt
from es2fast.distributed.runtime import Runtime
from es2fast.distributed.zero import zero3_loading
from es2fast.errors import UserError
from es2fast.modeling import head as heads
from es2fast.modeling.load import DTYPES, load_causal_lm
from es2fast.modeling.states import BATCH, STATE_BYTES, check_padding, states_by_block
from es2fast.modeling.taps import backbone, blocks, check_layers
from es2fast.modeling.teacher import teacher_tokens
from es2fast.ops.separation.whitening import Whitening
from es2fast.probing.causal import next_token_logits
from es2fast.probing.choose import Effects, measure_effects, pick, table_of
from es2fast.probing.probes import mean_distance
from es2fast.probing.table import LayerProbe, Probed
from es2fast.run.files import write_text
from es2fast.run.folder import RunFolder
from es2fast.training.plan import Plan
from es2fast.training.refusals import AnchorTexts, anchor_texts, answer_tokens, wants_answers
from es2fast.training.responses import base_answers, fill_responses
from es2fast.training.stage import base_fits
from es2fast.training.teacher_cache import TeacherCache, cache_teacher, keeps_teacher


@dataclass
class Prepared:
    """layers ascending; d0 and norm0 per layer; the table and reason behind the choice; for the
    loss `fisher` the whitening per layer and the mean Mahalanobis distance, its unit of margin;
    with a cached teacher what was kept of it."""

    layers: list[int]
    d0: dict[int, float] = field(default_factory=dict)
    norm0: dict[int, float] = field(default_factory=dict)
    reason: str = ""
    table: list[LayerProbe] = field(default_factory=list)
    whitening: dict[int, Whitening] = field(default_factory=dict)
    whitened0: dict[int, float] = field(default_factory=dict)
    teacher: TeacherCache | None = None

    def save(self, folder: RunFolder) -> None:
        """layers.json and, with a whitening, whitening.safetensors (`layer.name` -> tensor)."""
        write_text(folder.layers, json.dumps(self.plain(), indent=1, default=float) + "\n")
        if self.whitening:
            save_file(self.tensors(), folder.whitening)

    def plain(self) -> dict[str, Any]:
        """All but the whitening and the teacher's cache, as plain values."""
        plain = dataclasses.asdict(dataclasses.replace(self, whitening={}, teacher=None))
        del plain["whitening"], plain["teacher"]
        return plain

    def tensors(self) -> dict[str, Tensor]:
        """`layer.name` -> tensor of the whitening."""
        return {
            f"{layer}.{name}": tensor.contiguous()
            for layer, found in self.whitening.items()
            for name, tensor in found.tensors().items()
        }

    @classmethod
    def of(cls, plain: dict[str, Any], tensors: dict[str, Tensor]) -> Prepared:
        """From `plain`, read back from JSON, and `tensors`."""
        found: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            layer, _, part = name.partition(".")
            found.setdefault(int(layer), {})[part] = tensor
        keyed = {
            name: {int(layer): value for layer, value in plain[name].items()}
            for name in ("d0", "norm0", "whitened0")
        }
        table = [LayerProbe(**row) for row in plain["table"]]
        whitening = {layer: Whitening(**parts) for layer, parts in found.items()}
        return cls(**{**plain, **keyed, "table": table, "whitening": whitening})


class BaseModel(nn.Module):
    """The base model behind one interface, partitioned by ZeRO-3 or whole.

    Its forward is the only entry that ZeRO's hooks see: `task="states"` runs the backbone,
    `task="logits"` gives the next token's, `task="teacher"` what a cache keeps of some tokens,
    `task="parity"` compares the fused head's logits with the model's own.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, task: str, **inputs: Any) -> Any:
        if task == "states":
            return backbone(self.model)(**inputs)
        if task == "logits":
            return next_token_logits(self.model, **inputs)
        if task == "teacher":
            return teacher_tokens(self.model, **inputs)
        return heads.parity_error(self.model, heads.read_transform(self.model.config), **inputs)


def prepare(plan: Plan, runtime: Runtime) -> tuple[Prepared, list[Prompt], AnchorTexts | None]:
    """Runs the base model over the data; returns the measurements, the harmless prompts with every
    response filled in, and what the refusal anchor says, if there is one.

    Raises:
        UserError: a layer the model does not have; a head that the fused loss does not reproduce;
            a model that does not mask padding;
            groups too small to probe, or with equal states; a base model that refuses nothing
            where `refusal.fallback` is empty.
    """
    config, formatter, groups = plan.config, plan.formatter, plan.groups
    model, run, release = load_base(plan, runtime)
    probe_ids = torch.tensor([formatter.prompt_ids(groups.harmless[0])], device=runtime.device)
    error = run("parity", input_ids=probe_ids).item()
    heads.check_parity(error, DTYPES[runtime.dtype], model.config)
    check_padding(
        model,
        formatter,
        groups.harmful[:BATCH],
        lambda **inputs: run("states", **inputs),
        runtime.device,
    )
    if config.layers != "auto":
        check_layers(config.layers, len(blocks(model)))
    harmless = fill_responses(plan, model, runtime)
    texts = own_refusals(plan, model, runtime)
    own = texts.refusals if texts and wants_answers(config) and not texts.borrowed else None
    prepared = measure(
        plan,
        model,
        lambda **inputs: run("states", **inputs),
        runtime,
        logits=lambda **inputs: run("logits", **inputs),
        refusals=own,
    )
    if keeps_teacher(config.train):
        prepared.teacher = cache_teacher(
            plan, harmless, lambda **inputs: run("teacher", **inputs), runtime
        )
    release()
    return prepared, harmless, texts


def cached_teacher(plan: Plan, harmless: Sequence[Prompt], runtime: Runtime) -> TeacherCache | None:
    """The teacher's cache of a run that goes on, if it has one; call on every rank. Files that are
    gone since are made again, for which the base model is loaded."""
    if not keeps_teacher(plan.config.train):
        return None
    base: list[Any] = []

    def forward(**inputs: Any) -> Any:
        if not base:
            base.extend(load_base(plan, runtime))
        return base[1]("teacher", **inputs)

    cache = cache_teacher(plan, harmless, forward, runtime)
    if base:
        base[2]()
    return cache


def own_refusals(plan: Plan, model: nn.Module, runtime: Runtime) -> AnchorTexts | None:
    """The refusal anchor's texts, for which `model`, the base model, answers the harmful prompts
    where the configuration asks for it; call on every rank."""
    config, harmful = plan.config, plan.groups.harmful
    if not wants_answers(config):
        return anchor_texts(config, harmful)
    tokens = answer_tokens(config)
    answers = base_answers(plan, model, runtime, harmful, tokens, "answers to harmful prompts")
    texts = anchor_texts(config, harmful, answers)
    if texts is not None and texts.borrowed and runtime.is_main:
        print(
            f"note: the base model refuses none of the {len(harmful)} harmful prompts; the anchor "
            f"teaches refusal.fallback, such as {config.refusal.fallback[0]!r}",
            flush=True,
        )
    return texts


def load_base(
    plan: Plan, runtime: Runtime, whole: bool | None = None
) -> tuple[nn.Module, Any, Callable[[], None]]:
    """The base model in eval mode, what to call for a pass, and what frees ZeRO's partitions.

    Args:
        plan: the run.
        runtime: its ranks; call on every rank.
        whole: each rank has all of it; default: below stage 3, and where it fits. Partitioned, it
            would be gathered for every token that it writes.
    """
    import deepspeed

    if whole is None:
        whole = plan.zero_stage < 3 or base_fits(
            plan.config, plan.model, world_size=plan.world_size, device=plan.device,
            dtype=runtime.dtype,
        )  # fmt: skip
    if whole:
        model = load_causal_lm(plan.config.model, runtime.dtype).to(runtime.device).eval()
        return model, torch.no_grad()(BaseModel(model)), lambda: None
    raw = copy.deepcopy(plan.deepspeed)
    raw.pop("optimizer", None)
    raw["zero_optimization"].pop("offload_optimizer", None)
    with zero3_loading(raw):
        model = load_causal_lm(plan.config.model, runtime.dtype)
    engine, *_ = deepspeed.initialize(model=BaseModel(model), config=raw)
    engine.eval()
    return model, torch.no_grad()(engine), engine.destroy


def measure(
    plan: Plan,
    model: nn.Module,
    forward: Callable[..., Any],
    runtime: Runtime,
    memory: int = STATE_BYTES,
    *,
    logits: Callable[..., Tensor] | None = None,
    refusals: Sequence[str] | None = None,
) -> Prepared:
    """Layers from the states of all blocks, or those that the configuration names; then d0, norm0
    and whitening of these. The same on every rank, since rank 0 finds them.

    Args:
        plan: the run, with at most `layer_choice.prompts` prompts per group used.
        model: the base model in eval mode; call on every rank.
        forward: what to call for a pass of its backbone.
        runtime: the ranks that share the work.
        memory: bytes of states at a time; chosen blocks that were let go by then are read again.
        logits: what to call for the next token's logits; default: the model.
        refusals: the base model's own, where known: what a refusal starts with.

    Raises:
        UserError: groups too small to probe, or with equal states.
    """
    config, count = plan.config, plan.config.layer_choice.prompts
    harmful, harmless = plan.groups.harmful[:count], plan.groups.harmless[:count]

    def states(layers: list[int] | None = None) -> Any:
        return states_by_block(
            model,
            plan.formatter,
            [*harmful, *harmless],
            runtime,
            layers=layers,
            forward=forward,
            space=config.separation.space,
            memory=memory,
        )

    probed: list[Probed] = []
    part: dict[int, Tensor] = {}
    for part in states(None if config.layers == "auto" else sorted(config.layers)):
        probed += runtime.on_main(table_of, config, part, len(harmful))
    effects = Effects(None)
    if config.layers == "auto":
        effects = measure_effects(
            config, model, plan.formatter, harmful, probed, runtime,
            forward=logits, refusals=refusals,
        )  # fmt: skip
    counts = (len(harmful), len(harmless))
    choice = runtime.on_main(pick, config, probed, effects, counts)
    prepared = Prepared(choice.layers, reason=choice.reason, table=choice.table)
    held = all(layer in part for layer in choice.layers)  # in the last pass
    for chosen in [part] if held else states(choice.layers):
        for layer in sorted(chosen.keys() & set(choice.layers)):
            a, b = chosen[layer][: len(harmful)], chosen[layer][len(harmful) :]
            _add(prepared, layer, runtime.on_main(_geometry, config, layer, a, b))
    return prepared


@dataclass
class _Geometry:
    """Of one layer under the base model."""

    d0: float
    norm0: float
    whitening: dict[str, Tensor] | None = None
    whitened0: float = 0.0


def _geometry(config: Config, layer: int, a: Tensor, b: Tensor) -> _Geometry:
    """Harmful (n, H) and harmless (m, H) states of one layer, measured."""
    d0 = mean_distance(a, b).item()
    if not d0 > 0:
        raise UserError(
            f"layers: harmful and harmless prompts have the same state at block {layer} "
            "(distance 0); is the chat template ending both in a way that hides the prompt?"
        )
    both = torch.cat([a, b])
    found = _Geometry(d0, both.norm(dim=-1).mean().item())
    if config.separation.loss == "fisher":
        w, mean = Whitening.fit(a, b), both.mean(0)
        found.whitening = {name: tensor.contiguous() for name, tensor in w.tensors().items()}
        found.whitened0 = mean_distance(w((a - mean).double()), w((b - mean).double())).item()
    return found


def _add(prepared: Prepared, layer: int, found: _Geometry) -> None:
    prepared.d0[layer], prepared.norm0[layer] = found.d0, found.norm0
    if found.whitening is not None:
        prepared.whitening[layer] = Whitening(**found.whitening)
        prepared.whitened0[layer] = found.whitened0
