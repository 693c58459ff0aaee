"""Where settings come from (file, environment, command line), and errors that say so."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dualpath_ray.errors import ConfigError

ENVIRONMENT_PREFIX = "DUALPATH__"
FieldPath = tuple[str, ...]
SIZE = "a size is a number of bytes, or a number with a unit: 4GiB, 500MB"
REMEDIES = {"byte_size": SIZE, "byte_size_unit": SIZE, "model_type": "this is a section: give its fields"}
"""What our settings mean by pydantic's errors of these types, which speak of its own terms."""


class _Loader(yaml.SafeLoader):
    """YAML in which a name given twice is an error, as YAML's specification asks: else all but the last would be dropped unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


@dataclass(slots=True)
class Merged:
    """Nested values as pydantic takes them, and who gave each one."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[FieldPath, str] = field(default_factory=dict)

    def put(self, path: FieldPath, value: Any, origin: str) -> None:
        """Set one field; a mapping is merged into what is there, anything else replaces it."""
        if isinstance(value, dict):
            for key, item in value.items():
                self.put((*path, str(key)), item, origin)
            if value or not path:
                return
        target = self.values
        for name in path[:-1]:
            inner = target.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{'.'.join(path)} ({origin}): {name} is set to {inner!r} and has no fields of its own")
            target = inner
        target[path[-1]] = value
        self.origins[path] = origin

    def origin(self, path: FieldPath) -> str | None:
        """Who gave this field, or a part of it, or what it is a part of."""
        return next((name for given, name in self.origins.items() if given[: len(path)] == path or path[: len(given)] == given), None)


def merge(file: Path | None, environ: Mapping[str, str], overrides: Sequence[str]) -> Merged:
    """File, then environment, then overrides; later ones win field by field. Raises ConfigError for what cannot even be parsed."""
    merged = Merged()
    if file is not None:
        merged.put((), _read(file), str(file))
    for name, text in sorted(environ.items()):
        if name.startswith(ENVIRONMENT_PREFIX):
            merged.put(_path(name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"), name), _parse(text, name), name)
    for override in overrides:
        key, equals, text = override.partition("=")
        origin = f"--set {override}"
        if not equals:
            raise ConfigError(f"{origin}: write it as section.field=value")
        merged.put(_path(key.strip().split("."), origin), _parse(text, origin), origin)
    return merged


def explain(error: ValidationError, merged: Merged, model: type[BaseModel]) -> str:
    """One line for all errors of a validation: field, value, origin and remedy."""
    return "; ".join(_explain_one(item, merged, model) for item in error.errors(include_url=False))


def _explain_one(item: Any, merged: Merged, model: type[BaseModel]) -> str:
    path = tuple(str(part) for part in item["loc"])
    message = REMEDIES.get(item["type"], str(item["msg"]).removeprefix("Value error, "))
    origin = merged.origin(path) if path else None
    source = f" (from {origin})" if origin else ""
    if item["type"] == "extra_forbidden":
        known = _fields(model, path[:-1])
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {'.'.join((*path[:-1], close[0]))}?" if close else f"there are: {', '.join(known)}"
        return f"{'.'.join(path)}{source} is not a setting; {hint}"
    if not path:
        return message
    value = item["input"]
    shown = f" = {value!r}" if isinstance(value, str | int | float | bool | None) else ""
    return f"{'.'.join(path)}{shown}{source}: {message}"


def _fields(model: type[BaseModel], path: FieldPath) -> list[str]:
    for name in path:
        inner = model.model_fields[name].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return sorted(model.model_fields)


def _path(parts: list[str], origin: str) -> FieldPath:
    if not all(parts):
        raise ConfigError(f"{origin}: write the field as section.field")
    return tuple(parts)


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: the value is not valid YAML; quote it") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"configuration file {file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {file} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"configuration file {file} must hold sections (model:, cluster:, ...), not a {type(content).__name__}")
    return {name: section for name, section in content.items() if section is not None}  # all lines of a section may be commented out
