"""Our own settings files, and Ray Serve configurations that name our application."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ray.serve.schema import HTTPOptionsSchema, LoggingConfig, ServeApplicationSchema, ServeDeploySchema

from deploy.app import Args
from deploy.check.problems import load_yaml
from dualpath_ray.config import Settings
from dualpath_ray.errors import ConfigError

IMPORT_PATH = "deploy.app:build"


def check_settings(path: Path) -> list[str]:
    try:
        Settings.load(path, [], environ={})
    except ConfigError as error:
        return [str(error)]
    return []


def check_serve(path: Path) -> list[str]:
    return check_serve_document(load_yaml(path))


def check_serve_document(document: Any) -> list[str]:
    """Problems of a Serve configuration, down to our application's arguments."""
    try:
        schema = ServeDeploySchema.model_validate(document)
        parts: list[tuple[Any, type[BaseModel]]] = [(document, ServeDeploySchema), (document.get("http_options", {}), HTTPOptionsSchema)]
        parts += [(document.get("logging_config", {}), LoggingConfig)]
        parts += [(app, ServeApplicationSchema) for app in document["applications"]]
        unknown = [key for part, fields in parts for key in part if key not in fields.model_fields]  # Serve ignores them
        if unknown:
            return [f"{key} is not a field of a Serve configuration" for key in unknown]
        problems = [f"import_path is {app.import_path}, not {IMPORT_PATH}" for app in schema.applications if app.import_path != IMPORT_PATH]
        for app in schema.applications:
            Args.model_validate(app.args)
    except ValidationError as error:
        return [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
    return problems
