from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import trustme
from pydantic import ValidationError
from ray.serve import Application

from deploy.app import Args, build
from deploy.running_service import check_files
from dualpath_ray.config import ServingSettings
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


def test_engines_can_be_an_application_of_their_own() -> None:
    """So that the HTTP service can be deployed anew without them."""
    names = {engines: build(Args(engines=engines))._bound_deployment.name for engines in ("start", "attach", "only")}  # type: ignore[arg-type]
    assert names == {"start": "Http", "attach": "Http", "only": "Engines"}


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
    assert (scaled.upscale_delay_s, scaled.downscale_delay_s) == (30, 600)
    fixed = config("serving.replicas=3")
    assert fixed.autoscaling_config is None and fixed.num_replicas == 3


def test_a_replica_that_is_replaced_outlives_the_requests_it_has() -> None:
    """They may have to wait for engines that are replaced at the same time."""
    app: Any = build(Args(overrides=["serving.request_timeout_s=700"]))
    assert app._bound_deployment._deployment_config.graceful_shutdown_timeout_s == 700


def test_files_of_the_http_service_are_looked_at_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    paths = {name: tmp_path / name for name in ("a.crt", "a.key", "b.key", "text", "keys.json")}
    first, second = authority.issue_cert("localhost"), authority.issue_cert("localhost")
    first.cert_chain_pems[0].write_to_path(paths["a.crt"])
    first.private_key_pem.write_to_path(paths["a.key"])
    second.private_key_pem.write_to_path(paths["b.key"])
    for name in ("text", "keys.json"):
        paths[name].write_text("neither")

    def check(**given: Path) -> None:
        check_files(ServingSettings(**given))  # type: ignore[arg-type]

    check(tls_certificate=paths["a.crt"], tls_key=paths["a.key"])
    for key in ("b.key", "text"):
        with pytest.raises(ConfigError, match=r"serving\.tls_key .* cannot be used"):
            check(tls_certificate=paths["a.crt"], tls_key=paths[key])
    with pytest.raises(ConfigError, match="none is no file"):
        check(tls_certificate=paths["a.crt"], tls_key=tmp_path / "none")
    for name, message in (("keys.json", "Invalid JSON"), ("none", "cannot be read")):
        with pytest.raises(ConfigError, match=message):
            check(api_keys=tmp_path / name)
    check(files=tmp_path / "files")
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(ConfigError, match="unset one of them"):
        check(tls_certificate=paths["a.crt"], tls_key=paths["a.key"])
    with pytest.raises(ConfigError, match=r"serving\.files .* cannot be used: Not a directory"):
        check(files=paths["text"] / "files")
