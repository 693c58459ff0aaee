from __future__ import annotations

import numpy as np
import pytest

from load_tests.experiments.gain import GainPlan, GainResult, parse_shape
from load_tests.experiments.measure import MODES, Run, traffic
from load_tests.experiments.workload import Model, Workload
from load_tests.testbed.counters import Sample, read_totals
from load_tests.testbed.spec import TestbedSpec
from policies.settings import ReadMode

NET_DEV = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     0       0    0    0    0     0          0         0        0       0    0    0    0     0       0          0
br-snic:   99       1    0    0    0     0          0         0       99       1    0    0    0     0       0          0
p0-snic:  120       2    0    0    0     0          0         0     4500      30    0    0    0     0       0          0
"""


def run(shape: str, mode: str, jct: float, rates: dict[str, list[float]] | None = None) -> Run:
    arrays = {name: np.array(values) for name, values in (rates or {}).items()}
    length = max((len(values) for values in arrays.values()), default=0)
    return Run(shape, mode, 0, {"jct_s": jct}, {}, np.arange(length, dtype=np.float64), arrays)


def test_a_ports_sent_bytes_are_what_its_host_received() -> None:
    assert read_totals(NET_DEV) == {"p0-snic": (4500, 120)}


def test_traffic_between_samples() -> None:
    samples = [Sample(10.0, {"p0-snic": (0, 0)}), Sample(10.5, {"p0-snic": (100, 10)}), Sample(11.5, {"p0-snic": (300, 10)})]
    totals, times, rates = traffic(samples)
    assert totals == {"p0-snic": {"rx": 300, "tx": 10}}
    assert rates["p0-snic:rx"].tolist() == [200.0, 200.0]
    assert rates["p0-snic:tx"].tolist() == [20.0, 0.0]
    assert times.tolist() == [10.25, 11.0]
    assert traffic(samples[:1])[0] == {}


@pytest.mark.parametrize(("second", "ratio"), [([10.0] * 40, 1.0), ([0.0] * 40, 2.0), ([30.0] * 40, 1.5)])
def test_balance_of_storage_nics(second: list[float], ratio: float) -> None:
    rates = {"p0-snic:rx": [10.0] * 40, "d0-snic:rx": second, "store-snic:rx": [99.0] * 40, "d0-cnic:rx": [77.0] * 40}
    assert run("1P1D", "split", 1.0, rates).snic_max_over_avg() == pytest.approx(ratio)


def test_speedups_and_equalities() -> None:
    runs = [run("1P1D", "basic", 20.0), run("1P1D", "split", 10.0), run("2P1D", "basic", 10.5), run("1P1D", "basic", 22.0)]
    result = GainResult(GainPlan(shapes=("1P1D", "2P1D"), modes=("basic", "split")), runs)
    assert result.speedups() == {"1P1D": {"split": pytest.approx(2.1)}, "2P1D": {}}
    assert result.equalities() == {"split 1P1D / basic 2P1D": pytest.approx(10 / 10.5)}


def test_shapes() -> None:
    assert parse_shape("2P1D") == (2, 1)
    for wrong in ("2P", "0P1D", "1p1d", ""):
        with pytest.raises(ValueError, match="form"):
            parse_shape(wrong)


def test_modes_name_read_modes() -> None:
    assert {mode.read_mode for mode in MODES.values()} <= set(ReadMode.__args__)  # type: ignore[attr-defined]


def test_a_workload_fits_its_context() -> None:
    workload = Workload(agents=4, turns=6, context=700)
    assert all(session.total_tokens <= workload.max_context for session in workload.sessions())
    assert len(workload.contexts) == len(workload.trajectories) == 4
    assert workload.hit_bytes(Model().geometry) == pytest.approx(4 * 6 * 700 * Model().geometry.token_bytes, rel=0.1)


def test_hosts_and_their_links() -> None:
    spec = TestbedSpec(2, 1, snic_bits=5, cnic_bits=7)
    assert spec.name == "2P1D"
    assert spec.workers == ("p0", "p1", "d0")
    assert (spec.nics("store"), spec.nics("head"), spec.nics("p1")) == (("snic",), ("ctl",), ("snic", "cnic", "ctl"))
    assert (spec.rate("p0", "snic"), spec.rate("d0", "cnic"), spec.rate("d0", "ctl"), spec.rate("store", "snic")) == (5, 7, 0, 0)
    addresses = [spec.address(host, nic) for host in spec.hosts for nic in spec.nics(host)]
    assert len(set(addresses)) == len(addresses)
