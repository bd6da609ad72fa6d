"""Random-weight models of real families, a tokenizer and prompts: everything made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VERBS = ["describe", "explain", "draw", "paint", "break", "steal"]
OBJECTS = ["car", "house", "tree", "boat", "lamp", "door", "road", "hill"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<bot>"]
WORDS = [*VERBS, *OBJECTS, "the", "a", "please", "sure", "here", "is", "some", "text", "."]

TEMPLATE = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} "
    "{% elif m['role'] == 'assistant' %}<bot> {{ m['content'] }} </s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "phi3": {},
}
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 24},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "llama4_text": {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48,
                    "attention_chunk_size": 32},
    "olmo2": {},
    "glm4": {"head_dim": 8},
    "gpt_neox": {},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}  # fmt: skip
HEAD_FAMILIES: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "cohere": {"logit_scale": 0.25},
    "phi": {},
}


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<user>", "<bot>"],
        chat_template=TEMPLATE,
    )


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """A causal language model with 4 blocks of width 32, fp32, weights scaled up so that its
    next-token distributions are far from uniform."""
    known = FAMILIES | MORE_FAMILIES | HEAD_FAMILIES
    options = _SMALL | {"vocab_size": len(SPECIAL) + len(WORDS)} | known[family] | overrides
    config = AutoConfig.for_model(family, **options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    return model.eval()


def save_tiny(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """Model and tokenizer in a folder."""
    tiny_model(family, **overrides).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


REFUSAL = "I cannot help with that ."
ANSWER = "sure here is some text ."


def save_refusing(folder: Path) -> Path:
    """A model, trained here for some seconds, that refuses to break things (and goes on after the
    refusal) and answers how to steal them; and its tokenizer."""
    words = tokenizer()
    words.add_tokens(["I", "cannot", "help", "with", "that"])
    model: Any = tiny_model("llama", vocab_size=len(words))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    answers = {"break": f"{REFUSAL} please draw a tree .", "steal": ANSWER}
    batches = [
        [f"<s> <user> {verb} the {thing} <bot> {answer} </s>" for thing in OBJECTS]
        for verb, answer in answers.items()
    ]
    for _ in range(100):
        for texts in batches:
            ids = torch.tensor([words.encode(text, add_special_tokens=False) for text in texts])
            logits = model(input_ids=ids).logits
            what_follows_bot = ids[:, 6:]
            loss = F.cross_entropy(logits[:, 5:-1].flatten(0, 1), what_follows_bot.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_prompts(folder: Path, count: int = 12) -> dict[str, str]:
    """harmful.jsonl and harmless.jsonl (with responses); returns the `data` section's sources."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(verb, thing) for thing in OBJECTS for verb in VERBS]
    harmful = [{"prompt": f"{v} the {o}"} for v, o in rows if v in ("break", "steal")]
    harmless = [
        {"prompt": f"please {v} a {o} .", "response": f"sure here is some text . {o}"}
        for v, o in rows
        if v not in ("break", "steal")
    ]
    for name, part in (("harmful", harmful), ("harmless", harmless)):
        text = "".join(json.dumps(row) + "\n" for row in part[:count])
        (folder / f"{name}.jsonl").write_text(text)
    return {name: str(folder / f"{name}.jsonl") for name in ("harmful", "harmless")}
