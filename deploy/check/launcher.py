"""Cluster launcher files, against Ray's own schema and what Ray does not look at."""

from __future__ import annotations

import copy
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import click
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start

from deploy.check.problems import load_yaml

# What the files use of the clouds' instance descriptions, which Ray hands on unseen. A new key goes here when it is first used.
NODE_CONFIG = {
    "aws": {"InstanceType", "ImageId", "BlockDeviceMappings", "DeviceName", "Ebs", "VolumeSize", "VolumeType", "Placement", "GroupName"},
    "gcp": {
        "machineType",
        "disks",
        "boot",
        "autoDelete",
        "type",
        "initializeParams",
        "diskSizeGb",
        "sourceImage",
        "scheduling",
        "onHostMaintenance",
    },
}
PROVIDER = {
    "aws": {"type", "region", "availability_zone", "cache_stopped_nodes"},
    "gcp": {"type", "region", "availability_zone", "project_id"},
    "local": {"type", "head_ip", "worker_ips"},
}
CUSTOM_RESOURCES = {"dp_prefill", "dp_decode", "dp_node"}
COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")


def check_launcher(path: Path) -> list[str]:
    """Problems of one file."""
    config = load_yaml(path)
    logging.getLogger("ray.autoscaler").setLevel(logging.ERROR)
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except ValidationError as error:
        return [f"{'.'.join(map(str, error.absolute_path)) or 'top level'}: {error.message}"]
    except Exception as error:  # Ray's own checks raise whatever fits
        return [f"{type(error).__name__}: {error}"]
    provider = set(config["provider"])
    problems = [f"provider.{key} is not known" for key in sorted(provider - PROVIDER[config["provider"]["type"]])]
    problems += _node_types(config) + _mounts(config, path)
    for name in COMMANDS:
        for command in config.get(name, []):
            if not re.match(r"([A-Za-z_0-9]+=\S+\s+)*ray (start|stop)\b", command):
                problems.append(f"{name}: {command.split()[0]} ... neither starts nor stops Ray")
            problems += [f"{name}: {problem}" for problem in check_ray_start(command)]
    return problems


def check_ray_start(command: str) -> list[str]:
    """Options of `ray start` that Ray does not have, and variables that are not its."""
    words = shlex.split(command)
    problems = [
        f"{word.partition('=')[0]} is not a variable of Ray"
        for word in words
        if "=" in word and not word.startswith(("-", "RAY_")) and word.partition("=")[0].isupper()
    ]
    known = {option for parameter in ray_start.params if isinstance(parameter, click.Option) for option in parameter.opts}
    return problems + [
        f"ray start has no option {word.partition('=')[0]}"
        for word in words
        if word.startswith("--") and word.partition("=")[0] not in known
    ]


def _node_types(config: dict[str, Any]) -> list[str]:
    provider = config["provider"]["type"]
    types = config.get("available_node_types", {})
    problems = []
    for name, node_type in types.items():
        unknown = _keys(node_type["node_config"]) - NODE_CONFIG[provider]
        problems += [f"available_node_types.{name}.node_config: {key} is not known" for key in sorted(unknown)]
        resources = set(node_type["resources"])
        problems += [f"available_node_types.{name}.resources: {key} is not asked for" for key in sorted(resources - CUSTOM_RESOURCES)]
        role = node_type.get("labels", {}).get("dp.role")
        if name != config["head_node_type"] and f"dp_{role}" not in resources:
            problems.append(f"available_node_types.{name}: labels and resources do not name the same role")
    return problems


def _mounts(config: dict[str, Any], path: Path) -> list[str]:
    root = path.resolve().parents[2]
    local = [source for source in config.get("file_mounts", {}).values() if not source.startswith("~")]
    return [f"file_mounts: {source} does not exist" for source in local if not (root / source).exists()]


def _keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {key for item in value.values() for key in _keys(item)}
    if isinstance(value, list):
        return {key for item in value for key in _keys(item)}
    return set()
