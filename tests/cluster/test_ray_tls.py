"""Ray's token and TLS, set up word for word as docs/security.md says: the service answers, and nobody gets in without a certificate."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from dualpath_ray.models.tiny import make_tiny_model
from tests.docs_walk import Walk
from tests.unit.docs_commands import ROOT, commands_of

pytestmark = pytest.mark.live
SECTION = "Ray: token and TLS"
SETTINGS = b"\x04"
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + SETTINGS + b"\0\0\0\0\0"
OTHER_AUTHORITY = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=other -keyout node.key -out node.crt"


@pytest.fixture
def walk(short_tmp: Path) -> Iterator[Walk]:
    """Of that section, from its first command to the service that it starts."""
    model = make_tiny_model("llama", short_tmp / "model")
    walk = Walk(short_tmp, DUALPATH__MODEL__SPEC=str(model), DUALPATH__MODEL__THREADS="1", DUALPATH__SERVING__PORT="0")
    try:
        for command in commands_of(ROOT / "docs" / "security.md"):
            if command.section == SECTION and command.runs != "never":
                walk.run(command.line)
        assert walk.served is not None
        yield walk
        walk.close()
    finally:
        walk.kill()


@pytest.mark.timeout(500)
def test_a_cluster_under_tls(walk: Walk) -> None:
    body = {"model": "model", "prompt": "Every block", "max_tokens": 8, "ignore_eos": True}
    reply = httpx.post(f"{walk.address()}/v1/completions", json=body, timeout=90)
    assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == 8

    assert walk.served is not None
    heads = psutil.Process(walk.served.pid).children()
    (address,) = {word.partition("=")[2] for head in heads for word in head.cmdline() if word.startswith("--gcs-address=")}
    host, _, port = address.rpartition(":")
    member = context(walk.directory)
    assert speaks(host, int(port), member) == ssl.PEM_cert_to_DER_cert((walk.directory / "node.crt").read_text())

    stranger = walk.directory / "stranger"
    walk.run(f"mkdir {stranger} && cp ca.crt {stranger} && cd {stranger} && {OTHER_AUTHORITY}")
    for without in (None, ssl.create_default_context(cafile=str(walk.directory / "ca.crt")), context(stranger)):
        assert speaks(host, int(port), without) is None
    join = [sys.executable, "-c", f"import ray; ray.init(address={address!r}, log_to_driver=False)"]
    friend = subprocess.run(join, env=walk.environment, capture_output=True, text=True, timeout=100)
    assert friend.returncode == 0, friend.stderr


def context(directory: Path) -> ssl.SSLContext:
    """Of who has the certificate in this directory."""
    context = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    context.load_cert_chain(directory / "node.crt", directory / "node.key")
    return context


def speaks(host: str, port: int, secured: ssl.SSLContext | None) -> bytes | None:
    """The certificate that Ray's head shows to a caller with which it begins to speak HTTP/2, which is gRPC's; None if it does not."""
    if secured is not None:
        secured.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((host, port), timeout=20) as plain:
            connection = secured.wrap_socket(plain, server_hostname=host) if secured is not None else plain
            with connection:
                connection.sendall(HELLO)
                if connection.recv(9)[3:4] != SETTINGS:
                    return None
                return connection.getpeercert(binary_form=True) if isinstance(connection, ssl.SSLSocket) else b"none"
    except (ssl.SSLError, ConnectionError):
        return None
