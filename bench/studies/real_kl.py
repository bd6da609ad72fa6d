"""Where does the KL of a model of the study lie: on prompts that the base answers, or refuses?

    python bench/studies/real_kl.py --model DIR --work DIR --arms wide,even

On the base model's own answers to the held-out harmless prompts, which the study has left in the
working folder with the trained models. A row per arm and kind of prompt in
bench/results/real_models_kl.jsonl; `real_models.py --report` makes the table.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench._harness import Rows, conditions
from bench.studies.real_arms import BASE
from bench.studies.real_report import KL_ROWS
from es2fast.config import DataConfig, ModelConfig
from es2fast.data import Formatter, Prompt
from es2fast.judges.rules import is_refusal
from es2fast.modeling.load import load_merged, load_tokenizer
from es2fast.run.files import read_lines
from es2fast.run.folder import RunFolder

Row = tuple[list[int], list[int]]  # ids of a prompt, of its answer


def kinds_and_rows(work: Path, formatter: Formatter) -> list[tuple[str, Row]]:
    """The base model's answers: `refused` by the base, else the kind of the prompt."""
    kinds = {row["prompt"]: row["type"] for row in read_lines(work / "harmless_eval.jsonl")}
    found = []
    for row in read_lines(RunFolder(work / "evaluation").answers):
        if (row["model"], row["group"]) == (BASE, "harmless"):
            kind = "refused" if is_refusal(row["text"]) else kinds[row["prompt"]]
            ids = formatter.conversation_ids(Prompt.of(row["prompt"]), row["text"])
            found.append((kind, ids))
    return found


@torch.no_grad()
def log_probabilities(folder: Path, rows: Sequence[Row], dtype: str) -> list[Tensor]:
    """Per row (tokens of the answer, V)."""
    model = load_merged(ModelConfig(name=str(folder)), dtype).eval()
    return [
        model(torch.tensor([[*prompt, *answer]]), logits_to_keep=len(answer) + 1)
        .logits[0, :-1]
        .float()
        .log_softmax(-1)
        for prompt, answer in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--label", default="Qwen2.5-Coder-0.5B-Instruct", help="its name in rows")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--work", type=Path, default=Path("runs/real_models"))
    parser.add_argument("--arms", required=True, help="trained ones, with commas between them")
    parser.add_argument("--out", type=Path, default=KL_ROWS)
    arguments = parser.parse_args()
    formatter = Formatter(load_tokenizer(ModelConfig(name=str(arguments.model))), DataConfig())
    kinds, rows = zip(*kinds_and_rows(arguments.work, formatter), strict=True)
    base = log_probabilities(arguments.model, rows, arguments.dtype)
    out = Rows(arguments.out, conditions("cpu"))
    for arm in arguments.arms.split(","):
        own = log_probabilities(arguments.work / arm / "model", rows, arguments.dtype)
        by_kind: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for kind, p, q in zip(kinds, base, own, strict=True):
            by_kind[kind].append(((p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)))
        for kind, found in sorted(by_kind.items()):
            kl, same = (torch.cat(part) for part in zip(*found, strict=True))
            out.add(
                base=arguments.label, model=arm, kind=kind, prompts=len(found), tokens=len(kl),
                kl_response=kl.mean().item(), top1_agreement=same.float().mean().item(),
            )  # fmt: skip


if __name__ == "__main__":
    main()
