"""KubeRay manifests, against the custom resource definitions, Ray's Serve schema and our settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from deploy.check.launcher import check_ray_start
from deploy.check.problems import Absent, load_yaml
from deploy.check.settings import check_serve_document
from dualpath_ray.config import Settings
from dualpath_ray.errors import ConfigError

RESOURCES = {"cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"}
RDMA_PREFIX = "rdma/"
KUBERNETES_ONLY = ("x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-map-type", "x-kubernetes-validations", "format")
ROLES = ("prefill", "decode")


def check_manifest(path: Path, definitions: Path | None) -> list[str]:
    """Problems of one manifest. Raises Absent, after all else was found right, if there are no definitions."""
    manifest = load_yaml(path)
    problems = list(_inside(manifest))
    if problems:
        return problems
    if definitions is None or not list(definitions.glob("*.yaml")):
        raise Absent("no KubeRay CRDs: give their directory by --crds (ray-project/kuberay, helm-chart/kuberay-operator/crds)")
    kind = (manifest.get("apiVersion"), manifest.get("kind"))
    schemas = _schemas(definitions)
    if kind not in schemas:
        return [f"there is no definition of {kind[0]} {kind[1]}"]
    errors = jsonschema.Draft202012Validator(schemas[kind]).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]


def _inside(manifest: dict[str, Any]) -> Iterator[str]:
    """What the definitions leave open: maps of names, and documents in strings."""
    spec = manifest.get("spec", {})
    cluster = spec.get("rayClusterConfig", spec)
    if "serveConfigV2" in spec:
        yield from (f"serveConfigV2: {problem}" for problem in check_serve_document(yaml.safe_load(spec["serveConfigV2"])))
    groups = [("head", cluster.get("headGroupSpec", {}))] + [(str(g.get("groupName")), g) for g in cluster.get("workerGroupSpecs", [])]
    names = [name for name, _ in groups]
    yield from (f"there is no worker group {role}" for role in ROLES if role not in names)
    for name, group in groups:
        parameters = group.get("rayStartParams", {})
        yield from (f"{name}: {problem}" for problem in check_ray_start(" ".join(f"--{key}=x" for key in parameters)))
        if name in ROLES:
            yield from _role(name, group, parameters)
        for container in group.get("template", {}).get("spec", {}).get("containers", []):
            yield from (f"{name}: {problem}" for problem in _container(container, name in ROLES))


def _role(name: str, group: dict[str, Any], parameters: dict[str, str]) -> Iterator[str]:
    if group.get("labels", {}).get("dp.role") != name:
        yield f"{name}: the label dp.role does not say so"
    try:
        resources = json.loads(parameters.get("resources", '""').strip('"').replace('\\"', '"') or "{}")
    except json.JSONDecodeError as error:
        yield f"{name}: rayStartParams.resources is not JSON: {error}"
        return
    if resources != {f"dp_{name}": 1}:
        yield f"{name}: rayStartParams.resources must be one dp_{name}, not {resources}"


def _container(container: dict[str, Any], is_worker: bool) -> Iterator[str]:
    resources = container.get("resources", {})
    for amounts in resources.values():
        yield from (f"{key} is not a resource we ask for" for key in amounts if key not in RESOURCES and not key.startswith(RDMA_PREFIX))
    if is_worker and not any(key.startswith(RDMA_PREFIX) for key in resources.get("limits", {})):
        yield "no RDMA device is asked for"
    environment = {entry.get("name", ""): entry.get("value", "") for entry in container.get("env", [])}
    yield from (f"variable {name} is neither Ray's nor ours" for name in environment if not name.startswith(("RAY_", "DUALPATH__", "UCX_")))
    missing = {"RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"} - set(environment)
    yield from (f"variable {name} is missing" for name in sorted(missing))
    try:
        Settings.load(None, [], environ=environment)
    except ConfigError as error:
        yield str(error)


@cache
def _schemas(directory: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """JSON schemas by (apiVersion, kind), strict: what they do not name is refused."""
    found = {}
    for file in directory.glob("*.yaml"):
        definition = load_yaml(file)["spec"]
        for version in definition["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
            found[f"{definition['group']}/{version['name']}", definition["names"]["kind"]] = _strict(schema)
    return found


def _strict(schema: Any) -> Any:
    """Kubernetes' dialect of OpenAPI as JSON schema, without room for fields that are not declared."""
    if not isinstance(schema, dict):
        return schema
    strict = {key: value for key, value in schema.items() if key not in KUBERNETES_ONLY}
    nullable = strict.pop("nullable", False)
    if strict.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if "properties" in strict:
        strict["properties"] = {name: _strict(value) for name, value in strict["properties"].items()}
        if not strict.get("x-kubernetes-preserve-unknown-fields"):
            strict.setdefault("additionalProperties", False)
    if isinstance(strict.get("additionalProperties"), dict):
        strict["additionalProperties"] = _strict(strict["additionalProperties"])
    if "items" in strict:
        strict["items"] = _strict(strict["items"])
    return {"anyOf": [strict, {"type": "null"}]} if nullable else strict
