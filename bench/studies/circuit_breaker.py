"""A circuit breaker (representation rerouting), written from its formula, as a baseline.

    L = c_s mean_{l, t} ReLU(cos(h_base, h_tuned))  over harmful prompts and their answers
      + c_r mean_{l, t} |h_base - h_tuned|_2        over harmless prompts and their answers
    c_s = alpha (1 - s / 2S),  c_r = alpha s / 2S   at step s of S

t: tokens behind what every row begins with (template, system prompt). There harmful and harmless
rows have the same states, which cannot be turned and kept at once; and among them is the first
token, whose norm of thousands would rule the retention.

Where the two models agree neither loss has a gradient: the cosine is at its largest, the distance
at its smallest. LoRA's B therefore starts at small random values and not at 0.

h: block outputs; l: for the rerouting the blocks at 1/3 and 5/8 of the depth (10 and 20 of 32), for
the retention every block; LoRA on the blocks up to the deeper one. Harmful answers are the base
model's own, as far as it gives them.

Source: Zou et al., "Improving Alignment and Robustness with Circuit Breakers", arXiv 2406.04313,
section 3 and appendix A, alpha = 10.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from es2fast.config import Config
from es2fast.data import Formatter, Prompt
from es2fast.data.packing import common_prefix
from es2fast.distributed.runtime import Runtime, resolve_dtype
from es2fast.modeling.load import load_causal_lm
from es2fast.modeling.taps import backbone, blocks, position_ids, tapped
from es2fast.modeling.teacher import set_trainable
from es2fast.run.export import save_model
from es2fast.training.plan import make_plan
from es2fast.training.responses import base_answers, fill_responses

ALPHA = 10.0
START = 1e-3  # standard deviation of B's entries


def circuit_breaker(config: Config, folder: Path, *, answer_tokens: int = 48) -> None:
    """Trains on the data of a run and saves a LoRA adapter.

    Args:
        config: model, data, steps, batch, learning rate and LoRA of the run it is compared with.
        folder: of the adapter; replaced.
        answer_tokens: of the answers to harmful prompts.
    """
    dtype = resolve_dtype(config.model.dtype, "cpu")
    runtime = Runtime(rank=0, world_size=1, device=torch.device("cpu"), dtype=dtype)
    plan = make_plan(config)
    model = load_causal_lm(config.model, dtype).eval()
    harmless = fill_responses(plan, model, runtime)
    answers = base_answers(
        plan, model, runtime, plan.groups.harmful, answer_tokens, "answers to harmful prompts"
    )
    harmful = [
        dataclasses.replace(prompt, response=answer)
        for prompt, answer in zip(plan.groups.harmful, answers)
    ]
    shared = common_prefix([plan.formatter.prompt_ids(one) for one in [*harmful, *harmless]])
    depth = len(blocks(model))
    targets = [round(depth * 10 / 32), round(depth * 20 / 32)]
    torch.manual_seed(config.train.seed)
    student = set_trainable(model, config.train, targets[-1])
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=START)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.train.lr, weight_decay=0.0)
    steps = config.train.steps
    sampler = plan.sampler(0)
    for step in tqdm(range(steps), "circuit breaker"):
        progress = step / (2 * steps)
        for a, b in sampler.indices(step):
            loss = ALPHA * (1 - progress) * rerouting(
                student, plan.formatter, [harmful[i] for i in a], targets, shared
            ) + ALPHA * progress * retention(
                student, plan.formatter, [harmless[i] for i in b], shared
            )
            (loss / config.train.gradient_accumulation).backward()
        torch.nn.utils.clip_grad_norm_(trained, config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    save_model(student, plan.formatter.tokenizer, folder, main=True)


def states(
    student: nn.Module, formatter: Formatter, prompts: list[Prompt], layers: list[int], shared: int
) -> tuple[Tensor, Tensor]:
    """Base and tuned block outputs of all tokens but the first `shared`, each (L, tokens, H)."""
    rows = [
        [i for part in formatter.conversation_ids(p, p.response or "") for i in part]
        for p in prompts
    ]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}
    counted = mask.bool() & (torch.arange(width) >= shared)
    found = []
    with tapped(student, layers, lambda hidden: hidden[counted].float()) as kept:
        with torch.no_grad(), student.disable_adapter():  # type: ignore[operator]
            backbone(student)(**inputs, use_cache=False)
        found.append(torch.stack([kept[layer] for layer in layers]))
        backbone(student)(**inputs, use_cache=False)
        found.append(torch.stack([kept[layer] for layer in layers]))
    return found[0], found[1]


def rerouting(
    student: nn.Module, formatter: Formatter, prompts: list[Prompt], layers: list[int], shared: int
) -> Tensor:
    """Mean ReLU of the cosine between base and tuned states."""
    base, tuned = states(student, formatter, prompts, layers, shared)
    return torch.cosine_similarity(base, tuned, dim=-1).relu().mean()


def retention(
    student: nn.Module, formatter: Formatter, prompts: list[Prompt], shared: int
) -> Tensor:
    """Mean distance between base and tuned states, over every block."""
    base, tuned = states(student, formatter, prompts, list(range(len(blocks(student)))), shared)
    return (base - tuned).norm(dim=-1).mean()
