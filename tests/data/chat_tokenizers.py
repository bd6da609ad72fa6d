"""Small real tokenizers with the traps that chat models set: a BOS written twice, no system role,
no pad token, text after the end of turn."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<bot>", "<sys>", "<end>"]
WORDS = [f"w{i}" for i in range(60)] + ["be", "kind", "sure", "end", "A:", "Q:", "tail"]

# BOS from the template; the end-of-turn token is not EOS, and more text follows it.
CHAT = (
    "<s>{% for m in messages %}"
    "{% if m['role'] == 'system' %}<sys> {{ m['content'] }} <end> {% endif %}"
    "{% if m['role'] == 'user' %}<user> {{ m['content'] }} <end> {% endif %}"
    "{% if m['role'] == 'assistant' %}<bot> {{ m['content'] }} <end> tail {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<bot>{% else %}</s>{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
DROPS_SYSTEM = CHAT.replace("<sys> {{ m['content'] }} <end> ", "")
# The generation prompt says more than an assistant turn repeats: no common prefix.
NOT_A_PREFIX = CHAT.replace("%}<bot>{% else", "%}<bot> sure{% else")
# No special token at all, and the answer is glued to the prompt's last word.
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }} "
    "{% else %}A:{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


def chat_tokenizer(template: str | None = CHAT, **changes: Any) -> PreTrainedTokenizerFast:
    """Words split at spaces; the post-processor also writes BOS, unless `bos=False`."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if changes.pop("bos", True):
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    names = {key: value for key, value in (names | changes).items() if value is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        extra_special_tokens=["<user>", "<bot>", "<sys>", "<end>"],
        chat_template=template,
        **names,
    )


def words(tokenizer: Any, ids: Any) -> str:
    """Ids as readable text, special tokens included."""
    return " ".join(tokenizer.convert_ids_to_tokens(list(ids)))
