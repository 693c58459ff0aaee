"""What all sections of the configuration have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """Unknown fields are errors, values do not change after loading, and defaults are checked like given values."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, coerce_numbers_to_str=True)


def _number(value: Any) -> Any:
    """YAML's yes and on are truth values, and Python's truth values are numbers."""
    if isinstance(value, bool):
        raise ValueError("Input should be a number")
    return value


def _word(value: Any) -> Any:
    """YAML reads a bare `on` or `off` as a truth value."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Word = BeforeValidator(_word)  # for fields that have `on` or `off` among their words
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_number)]
Delay = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_number)]
Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_number)]
Nodes = Annotated[int, Field(ge=1, le=10_000), BeforeValidator(_number)]
