"""Print docs/settings.md: every setting, as declared in the sections' modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from dualpath_ray.config.settings import Settings

_HEAD = """# Settings

Settings come from, in rising precedence: the defaults below, a YAML file (`--config FILE` or `DUALPATH_CONFIG`), environment variables
`DUALPATH__SECTION__FIELD` (for example `DUALPATH__MODEL__DTYPE=bfloat16`), and `--set section.field=value`. Values are read as YAML;
sizes may be written like `8GiB`. Times are in seconds and sizes in bytes unless the name says otherwise.

```console
$ dualpath config check     # whether a configuration is valid
$ dualpath config show      # the values in force
$ dualpath config schema    # the JSON schema
```

This page is made from `dualpath_ray/config/` by `make docs`.
"""


def render() -> str:
    """The page's text."""
    return _HEAD + "".join(_section(name, model, text) for name, model, text in _sections((), Settings))


def _sections(path: tuple[str, ...], model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel], str]]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield ".".join((*path, name)), inner, field.description or ""
            yield from _sections((*path, name), inner)


def _section(name: str, model: type[BaseModel], text: str) -> str:
    rows = [f"\n## {name}\n\n{text}\n\n| field | type | default | meaning |\n|---|---|---|---|\n"]
    schema = model.model_json_schema()
    for field, properties in schema["properties"].items():
        if "$ref" not in properties:  # a section of its own
            rows.append(f"| `{field}` | {_type(properties)} | {_default(model, field)} | {properties['description'].replace('|', '/')} |\n")
    return "".join(rows)


def _type(properties: dict[str, Any]) -> str:
    """What a value may be, in words, with its bounds."""
    if "anyOf" in properties:
        return " or ".join(_type(choice) for choice in properties["anyOf"])
    if "enum" in properties:
        return ", ".join(f"`{value}`" for value in properties["enum"])
    if "const" in properties:
        return f"`{properties['const']}`"
    words = {"null": "none", "object": "mapping"}
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    name = words.get(properties.get("type", ""), properties.get("type", "any"))
    return " ".join([name, *(f"{sign} {properties[key]}" for key, sign in bounds.items() if key in properties)])


def _default(model: type[BaseModel], field: str) -> str:
    default = model.model_fields[field].default
    return "" if default is None or default == {} else f"`{default}`"


if __name__ == "__main__":
    print(render(), end="")
