"""Everything that serves HTTP, from Ray up, for as long as a `with` block runs."""

from __future__ import annotations

import logging
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError

from actors.cluster import Cluster, connect_ray
from deploy.access.api_keys import read_keys
from deploy.app import application
from deploy.http_api import proxy
from dualpath_ray.config import ServingSettings, Settings
from dualpath_ray.errors import ConfigError

APPLICATION = "dualpath"
HA_PROXY = "RAY_SERVE_ENABLE_HA_PROXY"
DRAIN_S = 30.0  # its engines are there until the end, and somebody waits for that


@contextmanager
def running_service(settings: Settings) -> Iterator[str]:
    """Join or start Ray, start the engines and the HTTP application; yields the server's address, `http://host:port`.

    At the end requests under way are finished, and what was started here is stopped again, in reverse order. Raises ConfigError when
    something cannot start.
    """
    with running_serve(settings, lambda: Cluster.start(settings).stop) as address:
        try:
            _deploy(settings)
            yield address
        finally:
            # Its replicas finish what is under way, as long as the proxies still stand in front of them.
            serve.delete(APPLICATION)


def _deploy(settings: Settings) -> None:
    try:
        serve.run(application(settings, start_engines=False, drain_s=DRAIN_S), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise ConfigError(f"the HTTP application could not start: {' '.join(str(error).split())}") from error


@contextmanager
def running_serve(settings: Settings, start: Callable[[], Callable[[], None]] = lambda: lambda: None) -> Iterator[str]:
    """Ray and Serve's HTTP proxy alone; yields its address. `start` is called once Ray is there; what it returns stops what it started."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    proxy.install()
    # Before anything is started: what is wrong with these shows later only in logs of Serve's.
    check_files(settings.serving)
    host, port = settings.serving.host, settings.serving.port or free_port(settings.serving.host)
    _check_free(host, port)
    with ExitStack() as stack:
        own_ray = connect_ray(settings)
        if own_ray:
            stack.callback(ray.shutdown)
        stack.callback(start())
        try:
            serve.start(http_options=http_options(settings, port), logging_config={"log_level": "WARNING", "enable_access_log": False})
        except RayError as error:
            raise ConfigError(f"Ray Serve could not start its proxy: {' '.join(str(error).split())}") from error
        if own_ray:  # on a cluster that we joined, Serve itself belongs to whoever runs that
            stack.callback(serve.shutdown)
        scheme = "https" if settings.serving.tls_certificate else "http"
        yield f"{scheme}://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


def check_files(serving: ServingSettings) -> None:
    """Raise ConfigError unless the files that serving names can be used on this machine."""
    if serving.api_keys:
        read_keys(serving.api_keys)
    if serving.files is not None:
        try:
            serving.files.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"serving.files {serving.files} cannot be used: {error.strerror}") from error
    certificate, key = serving.tls_certificate, serving.tls_key
    if certificate and key:
        if os.environ.get(HA_PROXY) == "1":
            raise ConfigError(f"serving.tls_certificate has no effect on the proxy that {HA_PROXY}=1 starts: unset one of them")
        for path in (certificate, key):
            if not path.is_file():
                raise ConfigError(f"serving.tls_certificate or serving.tls_key: {path} is no file")
        try:
            # An empty password, so that nobody is asked for one at the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
        except (OSError, ValueError) as error:
            reason = "they do not belong together, are not in PEM format, or the key is encrypted"
            raise ConfigError(
                f"serving.tls_certificate {certificate} and serving.tls_key {key} cannot be used: {reason} ({error})"
            ) from error


def http_options(settings: Settings, port: int) -> dict[str, Any]:
    """Serve's own HTTP options. Serve applies them once per Ray cluster: in a Serve configuration file they are `http_options`."""
    serving = settings.serving
    options: dict[str, Any] = {"host": serving.host, "port": port}
    if serving.tls_certificate and serving.tls_key:
        # Serve's proxies have directories of their own.
        options |= {"ssl_certfile": str(serving.tls_certificate.resolve()), "ssl_keyfile": str(serving.tls_key.resolve())}
    return options


def free_port(host: str) -> int:
    with socket.create_server((host, 0)) as server:
        return int(server.getsockname()[1])


def _check_free(host: str, port: int) -> None:
    """Serve reports an occupied port only in the log of its proxy."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {_reason(error)}; set serving.host and serving.port") from error


def _reason(error: OSError) -> str:
    """Without the address, which Python adds to some."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
