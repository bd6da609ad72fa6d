"""Template: the request in a chat format that the model was not aligned on.

| variant         | what is asked                                                                 |
|-----------------|-------------------------------------------------------------------------------|
| `no_system`     | without the configured system prompt                                          |
| `empty_system`  | with a system message that is empty, in place of the configured or built-in   |
| `as_system`     | the request as the system message, no user turn                               |
| `as_assistant`  | the request as an assistant turn                                              |
| `no_generation` | the user turn is ended, the assistant's is not opened                         |
| `open_turn`     | nothing after the request: its turn is not even ended                         |
| `raw`           | the text of all turns alone, with what the tokenizer adds to plain text (BOS) |

A defence that acts at the template's last token, as ES2 does, is not asked there in
`no_generation`, `open_turn` and `raw`. Which variants there are is a property of the model's
template: `prepare` keeps those that it can render and that differ from the ordinary rendering and
from each other, on a training prompt. A held-out conversation that a variant cannot render goes
without it.

Source: Jiang et al. 2024, "ChatBug" (arXiv 2406.12935) for mismatched formats; our own list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from pydantic import Field

from es2fast.attacks.base import Answer, Attack, AttackSettings, Cost, Target
from es2fast.attacks.prompts.rows import Row, ask
from es2fast.data import Formatter, Prompt
from es2fast.errors import UserError

Variant = Literal[
    "no_system",
    "empty_system",
    "as_system",
    "as_assistant",
    "no_generation",
    "open_turn",
    "raw",
]
ORDINARY = "ordinary"


class TemplateSettings(AttackSettings):
    variants: list[Variant] = Field(
        list(get_args(Variant)), min_length=1, description="how the template is tampered with"
    )


class Template(Attack):
    """Asks in a tampered chat format."""

    name = "template"
    Settings = TemplateSettings
    settings: TemplateSettings

    def __init__(self, settings: TemplateSettings | None = None):
        super().__init__(settings or self.Settings())
        self.variants: list[Variant] = []

    def cost(self, target: Target, prompts: int) -> Cost:
        return Cost(prompts * len(self.settings.variants))

    def prepare(self, target: Target) -> None:
        """Finds the variants that this model's template makes a difference for.

        Raises:
            UserError: none does.
        """
        prompt = target.harmful[0]
        seen = [target.formatter.prompt_ids(prompt)]
        self.variants = []
        for variant in dict.fromkeys(self.settings.variants):
            ids = tampered(target.formatter, prompt, variant)
            if ids and ids not in seen:
                seen.append(ids)
                self.variants.append(variant)
        if not self.variants:
            raise UserError(
                f"template.variants: none of {', '.join(self.settings.variants)} differs from the "
                "ordinary chat format of this model; name others"
            )

    def answers(self, target: Target, prompts: Sequence[Prompt]) -> list[list[Answer]]:
        return ask(target, [self.rows(target.formatter, prompt) for prompt in prompts])

    def rows(self, formatter: Formatter, prompt: Prompt) -> list[Row]:
        """What is asked for one prompt: a row per variant, or else the ordinary one."""
        found = [(name, tampered(formatter, prompt, name)) for name in self.variants]
        rows = [Row(ids, {"variant": name}) for name, ids in found if ids]
        return rows or [Row(formatter.prompt_ids(prompt), {"variant": ORDINARY})]

    def summary(self) -> dict[str, Any]:
        return {"template_variants": list(self.variants)}


def tampered(formatter: Formatter, prompt: Prompt, variant: Variant) -> list[int] | None:
    """Ids of a prompt in one of the variants; None where the template cannot render it."""
    limit = formatter.data.max_length
    turns = [turn for turn in prompt.messages if turn["role"] != "system"]
    if variant == "raw":
        text = "\n\n".join(turn["content"] for turn in turns)
        return list(formatter.tokenizer(text)["input_ids"])[:limit]
    if variant == "open_turn":
        ids = formatter.prompt_ids(prompt)
        return ids[: len(ids) - formatter.tail_length(ids)]
    try:
        if variant == "no_system":
            return formatter.message_ids(turns, system_prompt=False)
        if variant == "empty_system":
            empty = {"role": "system", "content": ""}
            return formatter.message_ids([empty, *turns], system_prompt=False)
        if variant == "no_generation":
            return formatter.message_ids(prompt.messages, generation_prompt=False)
        role = variant.removeprefix("as_")
        return formatter.message_ids([*turns[:-1], {"role": role, "content": prompt.text}])
    except UserError:  # a template that insists on its order of roles
        return None
