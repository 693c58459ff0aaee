from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve import Application

from deploy.app import Args, build
from dualpath_ray.errors import ConfigError


def test_serve_can_see_the_type_of_the_arguments() -> None:
    """Otherwise it passes a plain dict."""
    assert inspect.signature(build).parameters["args"].annotation is Args


@pytest.mark.parametrize("overrides", [["serving.replicas=3", "model.threads=2"], {"serving.replicas": 3, "model.threads": 2}])
def test_arguments_are_settings(tmp_path: Path, overrides: list[str] | dict[str, int]) -> None:
    file = tmp_path / "dualpath.yaml"
    file.write_text("serving: {replicas: 2}\nmodel: {spec: tiny-llama}\n")
    args = Args(config=file, overrides=overrides)
    settings = args.settings()
    assert (settings.serving.replicas, settings.model.threads, settings.model.spec) == (3, 2, "tiny-llama")
    assert isinstance(build(args), Application)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValidationError):
        Args.model_validate({"cofnig": "x"})
    with pytest.raises(ConfigError, match="did you mean"):
        build(Args(overrides=["serving.replica=3"]))


def test_serve_scales_http_replicas_between_bounds() -> None:
    def config(*overrides: str) -> Any:
        app: Any = build(Args(overrides=list(overrides)))
        return app._bound_deployment._deployment_config

    scaled = config("serving.replicas=2", "serving.most_replicas=5", "serving.max_concurrent_requests=100").autoscaling_config
    assert (scaled.min_replicas, scaled.max_replicas, scaled.target_ongoing_requests) == (2, 5, 60)
    fixed = config("serving.replicas=3")
    assert fixed.autoscaling_config is None and fixed.num_replicas == 3
