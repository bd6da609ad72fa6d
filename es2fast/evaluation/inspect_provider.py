"""inspect_ai's model provider: any inspect eval on a model, with an attack on it or without.

    inspect eval TASK --model es2fast/runs/llama-es2 -M attack=scav

The name behind `es2fast/` is the folder of a finished run (its trained model), a model folder or a
Hugging Face id. The attack is prepared once, on training prompts: those of `-M fit_harmful=FILE
-M fit_harmless=FILE`, or else the run's own. It takes its settings as a mapping, `-M
attack="{name: prefill, tokens: [10]}"`. Answers are greedy whatever inspect's temperature, and an
attack with several answers per prompt gives them as several choices, of which inspect scores the
first. Found through the entry point in the group `inspect_ai`; imported by nothing else.
"""

from __future__ import annotations

import json
from threading import Lock
from typing import Any

import torch
import yaml
from anyio import to_thread
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from es2fast.attacks.base import Target
from es2fast.attacks.registry import make_attack
from es2fast.config import Config, load_config
from es2fast.data import Formatter, Prompt, load_groups
from es2fast.distributed.runtime import resolve_device, resolve_dtype
from es2fast.errors import UserError
from es2fast.judges.registry import judges_of, make_judges
from es2fast.modeling.batch_size import starting_rows
from es2fast.modeling.load import load_merged, load_tokenizer
from es2fast.run.folder import RunFolder


@modelapi(name="es2fast")
class Es2fast(ModelAPI):
    """One model under one attack; one prompt at a time.

    Raises:
        UserError: a model, file or attack that cannot be used.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008, as inspect passes it
        attack: str | dict[str, Any] = "direct",
        fit_harmful: str | None = None,
        fit_harmless: str | None = None,
        **overrides: Any,
    ):
        super().__init__(model_name, base_url, api_key, [], config)
        given = {"data.harmful": fit_harmful, "data.harmless": fit_harmless, **overrides}
        named = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
        resolved, place = _config(model_name, named)
        entry = yaml.safe_load(attack) if isinstance(attack, str) else attack
        self._attack = make_attack(entry, steps=resolved.evaluate.attack_steps)
        self._target = _target(resolved, place, fitted=self._attack.name != "direct")
        self._target.fitted(lambda: self._attack.prepare(self._target))
        self._length, self._lock = self._target.max_new_tokens, Lock()

    def max_connections(self) -> int:
        return 1

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        if tools:
            raise UserError("es2fast: no tools; use an eval without them")
        messages = tuple({"role": str(m.role), "content": m.text} for m in input)
        length = config.max_tokens or self._length
        texts = await to_thread.run_sync(self._texts, Prompt(messages), length)
        return ModelOutput(
            model=self.model_name,
            choices=[
                ChatCompletionChoice(message=ChatMessageAssistant(content=text), stop_reason="stop")
                for text in texts
            ],
        )

    def _texts(self, prompt: Prompt, length: int) -> list[str]:
        with self._lock:  # an attack changes the model while it answers
            self._target.max_new_tokens = length
            ((*answers,),) = self._attack.answers(self._target, [prompt])
        if len(answers) > 1:
            raise UserError(
                f"es2fast: attack {self._attack.label!r} gives {len(answers)} answers to a prompt "
                "and inspect scores the first alone, often the weakest; set its settings so that "
                'one is left, such as -M "attack={name: prefill, tokens: [20]}"'
            )
        return [answers[0].text]


def _config(name: str, named: list[str]) -> tuple[Config, str]:
    """The configuration of a run, or defaults, and where the model is."""
    run = RunFolder(name)
    if run.finished:
        return load_config(run.config, named), str(run.model)
    return load_config(None, [f"model.name={json.dumps(name)}", *named]), name


def _target(config: Config, place: str, *, fitted: bool) -> Target:
    """The model on its device, with the attacker's prompts."""
    settings = config.evaluate
    formatter = Formatter(load_tokenizer(config.model), config.data)
    groups = load_groups(config.data, need_train=False) if fitted else None
    if groups is not None and not (groups.harmful and groups.harmless):
        raise UserError(
            "es2fast: no prompts for the attacker to fit on; give -M fit_harmful=FILE and "
            "-M fit_harmless=FILE"
        )
    device = torch.device(resolve_device(config.train.device))
    dtype, size = resolve_dtype(config.model.dtype, device.type), settings.batch_size

    def load(name: str) -> Any:
        revision = config.model.revision if name == config.model.name else None
        model = config.model.model_copy(update={"name": name, "revision": revision})
        loaded = load_merged(model, dtype, settings.device_map).eval()
        return loaded if settings.device_map is not None else loaded.to(device)

    model, base = load(place), config.model.name
    tokens = config.data.max_length + settings.max_new_tokens
    return Target(
        model,
        formatter,
        groups.harmful[: settings.fit_limit] if groups else [],
        groups.harmless[: settings.fit_limit] if groups else [],
        make_judges(judges_of(config, config.model.name))[0],
        max_new_tokens=settings.max_new_tokens,
        batch_size=size if isinstance(size, int) else starting_rows(model, tokens),
        halves=size == "auto",
        seed=settings.seed,
        by_reference=False,
        load_base=None if base == place else lambda: load(base),
    )
