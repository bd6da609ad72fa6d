"""What is measured of a model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from es2fast.config.section import RowCount, Section


class LmEvalConfig(Section):
    """Tasks of lm-evaluation-harness (extra `lm-eval`) on every model."""

    tasks: list[str] = Field(
        default_factory=list, description="names, or paths of task files or FOLDER/NAME; none: off"
    )
    tasks_dir: str | None = Field(None, description="folder with task files of your own")
    attacks: list[str] = Field(
        default_factory=list,
        description="labels of evaluate.attacks under which the tasks run as well: attacks on "
        "hidden states or weights",
    )
    limit: int | None = Field(None, ge=1, description="documents per task; default: all")
    num_fewshot: int | None = Field(None, ge=0, description="default: the task's own")
    chat_template: bool = Field(False, description="ask in the model's chat format")


class EvaluateConfig(Section):
    attacks: list[str | dict[str, Any]] = Field(
        ["direct", "scav", "mean_difference"],
        description="names, or mappings of a name and the attack's own settings, such as "
        "{name: scav, p0: 0.001}",
    )
    judge: str | list[str] = Field(
        "rules",
        description="who says how an answer ended: rules, rules+ppl, hf:MODEL, openai:URL#MODEL "
        "(see docs/judges.md); of several the first decides and the others' rates stand beside",
    )
    calibration: str | None = Field(
        None,
        description="file that `es2fast judges --calibrate --json` wrote about the deciding judge; "
        "the report then gives the useful rate corrected for its mistakes",
    )
    limit: int = Field(100, ge=2, description="held-out prompts per group")
    fit_limit: int = Field(140, ge=2, description="training prompts per group for probes and means")
    max_new_tokens: int = Field(
        256,
        ge=1,
        description="at which an answer is cut; other safety evaluations use 256 to 2048, and "
        "fewer show where an answer sets out to go, not what it achieves; answers by which an "
        "attacker chooses end at 64",
    )
    batch_size: RowCount = Field(
        "auto",
        description="prompts that are answered at a time; auto: 32 on a CPU, on a GPU what its "
        "memory holds, halved when that was too much",
    )
    device_map: str | dict[str, int | str] | None = Field(
        None,
        description="for models larger than a GPU: auto spreads the blocks over all GPUs, a "
        "mapping of modules to devices is taken as transformers has it",
    )
    attack_steps: Literal["all", "prompt", "both"] = Field(
        "both",
        description="`steps` of attacks on hidden states that do not say it themselves: push at "
        "every decoding step, or only while the prompt is read; both: the attacker tries both",
    )
    seed: int = Field(0, description="of whatever an attack draws")
    lm_eval: LmEvalConfig = Field(default_factory=LmEvalConfig)

    @model_validator(mode="before")
    @classmethod
    def _settings_of_scav(cls, raw: Any) -> Any:
        """`scav_p0` and `scav_p1` of earlier versions are settings of the attack now."""
        if not isinstance(raw, dict) or not {"scav_p0", "scav_p1"} & raw.keys():
            return raw
        rest = {key: value for key, value in raw.items() if key not in ("scav_p0", "scav_p1")}
        given = {key[5:]: raw[key] for key in ("scav_p0", "scav_p1") if key in raw}
        names = rest.get("attacks", cls.model_fields["attacks"].default)
        rest["attacks"] = [{"name": "scav", **given} if name == "scav" else name for name in names]
        return rest
