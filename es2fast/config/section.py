"""What every section of a configuration has in common."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

_NUMBERS = (int, float, int | None, float | None)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic makes 1 of true; text that is no UTF-8 fails where it is written."""
        name = info.field_name or ""
        annotation = cls.model_fields[name].annotation
        if value is None and isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return {}  # a section of which nothing is given
        if isinstance(value, bool) and annotation in _NUMBERS:
            raise ValueError(f"{str(value).lower()} is no number; give one")
        if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"{value!r} holds a character that is no text; remove it")
        return value


def _row_count(raw: Any) -> Any:
    if raw != "auto" and (type(raw) is not int or raw < 1):
        raise ValueError(f"expected auto, or a number of 1 or more, found {raw!r}")
    return raw


RowCount = Annotated[Literal["auto"] | int, BeforeValidator(_row_count)]
