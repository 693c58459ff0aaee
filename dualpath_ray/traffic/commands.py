"""`dualpath qos`: configuration of the fabric for the traffic classes, and whether it is in force."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import click

from dualpath_ray.commands.options import with_settings
from dualpath_ray.config import Settings
from dualpath_ray.errors import ConfigError
from dualpath_ray.rdma.sysfs import read_machine
from dualpath_ray.traffic import infiniband, linux_tc, roce
from dualpath_ray.traffic.finding import Source

FABRICS = click.Choice(["ib", "roce", "linux-tc"])
COMMAND_TIMEOUT_S = 20
RATE = re.compile(r"^([\d.]+)\s*([kmgt]?)bit$", re.IGNORECASE)


@click.command()
@click.option("--fabric", type=FABRICS, required=True, help="Kind of fabric.")
@click.option("--device", default="eth0", show_default=True, help="Network interface (roce, linux-tc).")
@click.option("--rate", default="100gbit", show_default=True, help="Bandwidth of the interface (linux-tc).")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Write the files there instead of printing them.")
@with_settings
def render(settings: Settings, fabric: str, device: str, rate: str, out: Path | None) -> None:
    """Write the configuration of a fabric for the traffic classes."""
    if fabric == "ib":
        files = {**infiniband.render(settings.traffic), "model.env": roce.model_environment(settings.traffic)}
    elif fabric == "roce":
        files = dict(roce.render(settings.traffic, device))
    else:
        files = dict(linux_tc.render(settings.traffic, device, parse_rate(rate)))
    for name, text in files.items():
        if out is None:
            click.echo(f"# ---- {name}\n{text}" if len(files) > 1 else text, nl=len(files) > 1)
        else:
            out.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(text, encoding="utf-8")
            click.echo(out / name)


@click.command()
@click.option("--fabric", type=FABRICS, required=True, help="Kind of fabric.")
@click.option("--device", default="eth0", show_default=True, help="Network interface (roce, linux-tc), or RDMA device (ib).")
@click.option("--lid", type=int, help="Address of the port to ask about (ib; default: the device's own).")
@click.option("--port", type=int, default=1, show_default=True, help="Port number there (ib).")
@click.option("--rate", help="Also check the bandwidth (linux-tc), e.g. 100gbit.")
@click.option("--from", "given", multiple=True, metavar="NAME=FILE", help="Take a command's output from a file; may be repeated.")
@with_settings
def check(settings: Settings, fabric: str, device: str, lid: int | None, port: int, rate: str | None, given: tuple[str, ...]) -> None:
    """Compare what ports really have with what they should have; exit status 1 if anything differs."""
    traffic = settings.traffic
    if fabric == "ib":
        names = infiniband.sources(traffic, 0, port)
        needs_lid = lid is None and {source.name for source in names} - {entry.partition("=")[0] for entry in given}
        wanted = infiniband.sources(traffic, _lid(device) if needs_lid else (lid or 0), port)
    elif fabric == "roce":
        wanted = roce.sources(traffic, device)
    else:
        wanted = linux_tc.sources(traffic, device, None if rate is None else parse_rate(rate))
    outputs = _given(given, wanted)
    findings = [finding for source in wanted for finding in source.compare(outputs.get(source.name) or _run(source))]
    for finding in findings:
        click.echo(finding)
    wrong = sum(not finding.ok for finding in findings)
    click.echo(f"{len(findings) - wrong} of {len(findings)} are as they should be" + ("" if not wrong else ": see dualpath qos render"))
    if wrong:
        raise SystemExit(1)


def parse_rate(text: str) -> float:
    """Bits per second of `100gbit`. Raises ConfigError."""
    match = RATE.match(text.strip())
    if match is None:
        raise ConfigError(f"--rate {text}: write it like 100gbit or 25mbit")
    return float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}[match[2].lower()]


def _given(entries: tuple[str, ...], wanted: list[Source]) -> dict[str, str]:
    outputs = {}
    names = [source.name for source in wanted]
    for entry in entries:
        name, equals, file = entry.partition("=")
        if not equals or name not in names:
            raise ConfigError(f"--from {entry}: write it as NAME=FILE with one of {', '.join(names)}")
        try:
            outputs[name] = Path(file).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--from {entry}: {error.strerror}") from error
    return outputs


def _run(source: Source) -> str:
    tool = source.command[0]
    by_hand = f"run `{' '.join(source.command)}` where it can be and give its output with --from {source.name}=FILE"
    if shutil.which(tool) is None:
        raise ConfigError(f"there is no {tool} here: {by_hand}")
    try:
        done = subprocess.run(source.command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{tool} did not answer within {COMMAND_TIMEOUT_S} s: {by_hand}") from None
    if done.returncode:
        raise ConfigError(f"{tool} failed ({' '.join(done.stderr.split()) or done.returncode}): {by_hand}")
    return done.stdout


def _lid(device: str) -> int:
    port = read_machine().port(device)
    if port is None or not port.lid:
        raise ConfigError(f"{device} is no InfiniBand port with an address here: give --lid, or outputs with --from NAME=FILE")
    return port.lid
