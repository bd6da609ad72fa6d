"""Where the model and the prompts come from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from es2fast.config.section import RowCount, Section


class DataSource(Section):
    """A place prompts come from. A plain string in YAML is short for `{source: ...}`."""

    source: str = Field(
        description="Hugging Face dataset id, folder of a saved dataset, or a .jsonl/.json/.csv/"
        ".parquet file, any other text file with one prompt per line, or prompts that come with "
        "the package: builtin:ordinary, builtin:borderline, builtin:topical (harmless), "
        "builtin:misuse (harmful)"
    )
    split: str = Field("train", description="split, for dataset ids and saved dataset dicts")
    column: str | None = Field(None, description="prompt column; recognised when not named")
    where: dict[str, Any] = Field(
        default_factory=dict,
        description="keep rows whose columns hold these values, each one or a list of them, such "
        "as {label: safe}; compared as text, upper and lower case alike",
    )
    side: Literal["harmful", "harmless"] | None = Field(
        None,
        description="where a column `label` tells harmful rows (harmful, unsafe, 1, true) from "
        "harmless ones (harmless, safe, 0, false), keep this side's",
    )
    rows: str | None = Field(
        None,
        pattern=r"^\d*:\d*(:[1-9]\d*)?$",
        description="slice of the rows that `where` and `side` kept, as in Python: '::2' and "
        "'1::2' part a source in two that share nothing",
    )
    limit: int | None = Field(None, ge=1, description="keep the first N of these rows")
    kind: str | None = Field(
        None,
        description="what these prompts are, such as borderline: refusals of held-out harmless "
        "prompts are also counted by it",
    )

    @field_validator("rows", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare 10:20 as minutes and seconds."""
        if isinstance(value, int):
            raise ValueError(
                f"{value} is a number, which YAML also makes of a bare 10:20; quote the slice, as "
                "in rows: '10:20'"
            )
        return value


def _source_list(value: Any) -> Any:
    """A single source, or a bare string, stands for a list of one."""
    items = value if isinstance(value, list) else [] if value is None else [value]
    return [{"source": item} if isinstance(item, str) else item for item in items]


Sources = Annotated[list[DataSource], BeforeValidator(_source_list)]


class ModelConfig(Section):
    name: str = Field(description="folder or Hugging Face id of an aligned chat model")
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face id")
    dtype: Literal["bf16", "fp32", "auto"] = Field(
        "auto", description="training precision; auto: bf16 on a GPU, fp32 on a CPU"
    )
    attn_implementation: str | None = Field(None, description="sdpa, flash_attention_2, eager ...")
    trust_remote_code: bool = Field(False, description="run model code that ships with the weights")


class DataConfig(Section):
    harmful: Sources = Field(default_factory=list, description="prompts to move away (group A)")
    harmless: Sources = Field(default_factory=list, description="prompts to preserve (group B)")
    borderline: Sources = Field(
        default_factory=list,
        description="more of group B: harmless prompts that look harmful, such as the safe half of "
        "XSTest, or contrasts to the harmful ones; without them a refusal anchor over-refuses",
    )
    borderline_share: float = Field(
        0.25, gt=0, lt=1, description="of the harmless rows of a step, where there are borderline"
    )
    refused: Literal["keep", "even", "drop"] = Field(
        "keep",
        description="harmless prompts whose response is a refusal by the rules: keep trains to "
        "go on refusing them, even gives their first tokens kl.refused_weight in place of "
        "kl.first_weight, drop leaves them out",
    )
    labelled: Sources = Field(
        default_factory=list, description="files whose `label` column tells the two groups apart"
    )
    eval_harmful: Sources = Field(default_factory=list, description="held-out harmful prompts")
    eval_harmless: Sources = Field(default_factory=list, description="held-out harmless prompts")
    eval_labelled: Sources = Field(
        default_factory=list, description="held-out prompts of both kinds, told apart likewise"
    )
    near_duplicates: float | None = Field(
        0.8,
        gt=0,
        le=1,
        description="training prompts at least this similar to a held-out one are left out (words "
        "in common, weighted by their rarity); null: only equal ones",
    )
    system_prompt: str | None = Field(None, description="system message put before every prompt")
    chat_template: str | None = Field(
        None, description="a Jinja file to use in place of the tokenizer's own chat template"
    )
    max_length: int = Field(
        512, ge=8, le=2**22, description="tokens of prompt + response; longer rows are cut"
    )
    max_response_tokens: int = Field(
        128, ge=1, description="tokens of the response, given or written by the base model"
    )
    response_batch_size: RowCount = Field(
        "auto",
        description="prompts that a rank's base model answers at a time; auto: 32 on a CPU, on a "
        "GPU what its memory holds, halved when that was too much (not where ZeRO-3 parts the "
        "model among ranks)",
    )
    cache_dir: str | None = Field(
        None, description="where written responses are kept; default: the user's cache folder"
    )
