from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from dualpath_ray.config import Settings
from dualpath_ray.config.reference import render

PAGE = Path(__file__).parents[3] / "docs" / "settings.md"


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field.description
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")


def test_every_setting_is_described_and_on_the_page() -> None:
    page = render()
    for name, description in fields(Settings):
        assert description, name
        assert description.replace("|", "/") in page, name


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run `make docs`"
