"""Everything that can be checked before a run costs anything: `es2fast validate`."""

from __future__ import annotations

from es2fast.config import Config
from es2fast.data import Formatter, PairedSampler, load_groups
from es2fast.distributed.deepspeed_config import build_deepspeed
from es2fast.distributed.runtime import resolve_device, resolve_dtype
from es2fast.modeling.head import read_transform
from es2fast.modeling.load import check_weights, load_model_config, load_tokenizer
from es2fast.modeling.taps import check_layers
from es2fast.modeling.teacher import resolve_teacher
from es2fast.run.folder import RunFolder
from es2fast.run.metrics import check_trackers


def validate(config: Config, *, world_size: int = 1) -> list[str]:
    """Checks configuration, folders, data, model and batch arithmetic; trains nothing.

    Args:
        config: the run.
        world_size: ranks it will have.

    Returns:
        lines that describe the run.

    Raises:
        UserError: the first mistake found.
    """
    RunFolder(config.output_dir).check_free(overwrite=config.train.overwrite)
    check_trackers(config.train)
    device = resolve_device(config.train.device)
    dtype = resolve_dtype(config.model.dtype, device)
    model = load_model_config(config.model)
    check_weights(config.model.name)
    raw = build_deepspeed(config, world_size=world_size, dtype=dtype, model_config=model)
    text = model.get_text_config()
    if config.layers != "auto":
        check_layers(config.layers, text.num_hidden_layers)
    groups = load_groups(config.data)
    formatter = Formatter(load_tokenizer(config.model), config.data)
    sampler = PairedSampler(
        len(groups.harmful), len(groups.harmless), seed=config.train.seed,
        micro_batch_size=config.train.micro_batch_size,
        gradient_accumulation=config.train.gradient_accumulation, rank=0, world_size=world_size,
    )  # fmt: skip
    lengths = [len(formatter.prompt_ids(p)) for p in groups.harmful + groups.harmless]
    unanswered = sum(p.response is None for p in groups.harmless)
    epochs = sampler.epochs(config.train.steps)
    stage = raw.get("zero_optimization", {}).get("stage", 0)
    transform = read_transform(model)
    return [
        *groups.report.lines(),
        f"prompts: {min(lengths)} to {max(lengths)} tokens, {formatter.truncated} cut to "
        f"data.max_length={config.data.max_length}; the base model will write "
        f"{unanswered} harmless responses",
        f"model: {model.model_type}, {text.num_hidden_layers} blocks of width {text.hidden_size}, "
        f"vocabulary {text.vocab_size}; logit transform: {', '.join(transform.keys) or 'none'}",
        f"layers: {config.layers}; trainable: {config.train.trainable}; "
        f"teacher: {resolve_teacher(config.train)}",
        f"run: {world_size} ranks on {device} in {dtype}, ZeRO stage {stage}; "
        f"{config.train.micro_batch_size} pairs x {config.train.gradient_accumulation} "
        f"micro-batches x {world_size} ranks = {raw['train_batch_size']} pairs per step",
        f"steps: {config.train.steps} = {epochs['harmful']:.1f} passes over the harmful and "
        f"{epochs['harmless']:.1f} over the harmless prompts",
    ]
