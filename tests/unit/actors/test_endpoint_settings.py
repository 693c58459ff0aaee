"""What is set in `transfer` reaches the endpoints, each value in its place."""

from __future__ import annotations

from actors.engine_process import endpoint_settings
from dualpath_ray.config import Settings
from dualpath_ray.traffic.classes import TrafficClass
from dualpath_ray.transfer.endpoint_settings import EndpointSettings
from dualpath_ray.transfer.transports import Transports

COPIED = Transports(("sysv", "cma", "tcp", "self"), (), False, copied=True)
SET = {"progress_thread_delay_us": 7, "busy_poll_s": 0.25, "idle_poll_s": 0.5, "push_timeout_s": 9.0, "max_post_bytes": 1234567}


def test_every_transfer_setting_arrives() -> None:
    given = [*(f"transfer.{name}={value}" for name, value in SET.items()), "transfer.verify=true", "transfer.copy_threads=3"]
    settings = Settings.load(None, given)
    assert endpoint_settings(settings, COPIED) == EndpointSettings(**SET, copy_threads=3, verify=True)  # type: ignore[arg-type]


def test_processes_of_one_machine_copy_beside_the_endpoints_thread() -> None:
    across = Transports(("tcp", "self"), (), False)
    assert endpoint_settings(Settings(), COPIED, TrafficClass.KV_READ).copy_threads == 1
    assert endpoint_settings(Settings(), across, TrafficClass.KV_READ).copy_threads == 0
    assert endpoint_settings(Settings.load(None, ["transfer.copy_threads=0"]), COPIED).copy_threads == 0
