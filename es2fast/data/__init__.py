"""From prompt files to paired micro-batches.

`sources` reads tables, `prompts` turns their rows into queries, `groups` builds the harmful and
harmless groups and checks them against each other, `format` applies the chat template, `batches`
pads, `packing` makes one sequence of a batch, `sampling` says which rows a step sees, `cache` keeps
answers written by the base model.
"""

from es2fast.data.batches import MicroBatch, Refusal, collate, kl_span
from es2fast.data.cache import ResponseCache, cache_folder, model_fingerprint
from es2fast.data.format import Formatter
from es2fast.data.groups import DataReport, PromptGroups, SourceReport, load_groups
from es2fast.data.prompts import Prompt, normalise_prompt
from es2fast.data.sampling import PairedSampler

__all__ = [
    "DataReport",
    "Formatter",
    "MicroBatch",
    "PairedSampler",
    "Prompt",
    "PromptGroups",
    "Refusal",
    "ResponseCache",
    "SourceReport",
    "cache_folder",
    "collate",
    "kl_span",
    "load_groups",
    "model_fingerprint",
    "normalise_prompt",
]
