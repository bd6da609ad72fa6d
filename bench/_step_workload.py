"""What bench/step.py trains and on what: a model's folder, prompts, the run's configuration.

Prompts are random common words, which most tokenizers give one token each, in the model's own chat
template; every contestant sees the same rows in the same steps.
"""

from __future__ import annotations

import gc
import json
import random
from pathlib import Path
from typing import Any

import torch

_TEXT = (
    "the and you that was for are with his they this have from one had word but not what all were "
    "when your can said there use each which she how their will other about out many then them "
    "these some her would make like him into time has look two more write see number way could "
    "people than first water been call who oil its now find long down day did get come made may "
    "part over new sound take only little work know place year live back give most very after"
)
WORDS = _TEXT.split()
SYSTEM = "the day you find all of them there will be one more word about time and water"
TEMPLATE = (
    "<s>system " + SYSTEM + " </s>{% for m in messages %}{{ ' <s>' + m['role'] + ' ' + "
    "m['content'] + ' </s>' }}{% endfor %}{% if add_generation_prompt %} <s>assistant{% endif %}"
)
HARMFUL, HARMLESS, RESPONSE = (8, 24), (6, 24), (8, 48)  # words, the lowest and the highest number
ROWS = 64  # prompts per group
MARGIN, KL_WEIGHT, LR, SEED = 4.0, 10.0, 2e-4, 0
RANK, ALPHA = 16, 32  # of LoRA

_LLAMA = {"model_type": "llama", "tie_word_embeddings": False, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "toy": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
           "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


def model_folder(shape: str, work: Path) -> Path:
    """A folder with random weights of one of SHAPES, made where it is missing."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = work / shape
    if (folder / "tokenizer.json").is_file():
        return folder
    special = ["<pad>", "</s>", "<unk>", "<s>system", "<s>user", "<s>assistant"]
    words = {
        word: i for i, word in enumerate([*special, *dict.fromkeys([*WORDS, *SYSTEM.split()])])
    }
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        chat_template=TEMPLATE,
    )  # fmt: skip
    options = _LLAMA | SHAPES[shape] | {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 1}
    torch.manual_seed(SEED)
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    dtype = torch.float32 if shape == "toy" else torch.bfloat16
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def free_memory() -> None:
    """Gives back what making a model took, also on a GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def write_prompts(work: Path) -> dict[str, str]:
    """The two groups' files; the `data` section's sources."""
    draw = random.Random(SEED)

    def text(lengths: tuple[int, int]) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(*lengths)))

    harmful = [{"prompt": text(HARMFUL)} for _ in range(ROWS)]
    harmless = [{"prompt": text(HARMLESS), "response": text(RESPONSE)} for _ in range(ROWS)]
    found = {}
    for name, rows in (("harmful", harmful), ("harmless", harmless)):
        path = work / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[name] = str(path)
    return found


def layers_of(model: Path) -> list[int]:
    """Two blocks to separate, at about a third and just above half of the depth (of 24: 8, 13)."""
    depth = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    return [depth // 3, (depth * 13 + 12) // 24]


def configuration(
    model: Path, work: Path, *, rows: int, steps: int, dtype: str, device: str,
    trainable: str, teacher: str, **train: Any,
) -> dict[str, Any]:  # fmt: skip
    """es2fast's configuration of the run.

    Args:
        model: folder with weights.
        work: folder for prompts, cache and run.
        rows: of each group per step.
        train: more of the section `train`.
    """
    return {
        "model": {"name": str(model), "dtype": dtype},
        "data": write_prompts(work) | {"cache_dir": str(work / "cache")},
        "layers": layers_of(model),
        "separation": {"margin": MARGIN},
        "kl": {"weight": KL_WEIGHT},
        "train": {
            "steps": steps, "micro_batch_size": rows, "lr": LR, "schedule": "constant",
            "warmup_ratio": 0.0, "trainable": trainable, "teacher": teacher, "device": device,
            "seed": SEED, "lora": {"r": RANK, "alpha": ALPHA}, **train,
        },
        "output_dir": str(work / "run"),
    }  # fmt: skip
