from __future__ import annotations

import pytest

from load_tests.experiments.gain import SETUP, GainResult
from load_tests.experiments.job import Job, Phase
from load_tests.experiments.measure import Load, make_run, traffic
from load_tests.experiments.modes import MODES
from load_tests.experiments.workload import Model, Workload
from load_tests.replay.records import Replay, Slo
from load_tests.testbed.counters import Sample, read_totals
from load_tests.testbed.spec import TestbedSpec, parse_shape
from policies.settings import ReadMode
from tests.unit.load_tests.runs import run, turn

NET_DEV = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     0       0    0    0    0     0          0         0        0       0    0    0    0     0       0          0
br-snic:   99       1    0    0    0     0          0         0       99       1    0    0    0     0       0          0
p0-snic:  120       2    0    0    0     0          0         0     4500      30    0    0    0     0       0          0
"""


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


def test_only_the_hosts_of_a_shape_count() -> None:
    """A testbed of 2P1D runs a 1P1D: the idle host's NIC is neither balance nor use."""
    names = [f"{host}-snic" for host in ("p0", "p1", "d0", "store")]
    samples = [Sample(float(at), dict.fromkeys(names, (at * 1000, 0))) for at in range(11)]
    hosts = TestbedSpec(2, 1, snic_bits=16_000).shape("1P1D")
    found = make_run(hosts, MODES["split"], Load(Workload()), 0, Replay(0.0, 10.0, (turn(0, 0.0, 1.0),)), samples, 7)
    assert set(found.nic_bytes) == {"p0-snic", "d0-snic", "store-snic"}
    assert found.figures["snic_utilisation"] == pytest.approx(0.5)
    assert found.figures["snic_received_bytes"] == 20_000
    assert found.testbed == "1P1D"


@pytest.mark.parametrize(("second", "ratio"), [([10.0] * 40, 1.0), ([0.0] * 40, 2.0), ([30.0] * 40, 1.5)])
def test_balance_of_storage_nics(second: list[float], ratio: float) -> None:
    rates = {"p0-snic:rx": [10.0] * 40, "d0-snic:rx": second, "store-snic:rx": [99.0] * 40, "d0-cnic:rx": [77.0] * 40}
    assert run("1P1D", "split", 1.0, rates).snic_max_over_avg() == pytest.approx(ratio)


def test_speedups_and_equalities() -> None:
    runs = [run("1P1D", "basic", 20.0), run("1P1D", "split", 10.0), run("2P1D", "basic", 10.5), run("1P1D", "basic", 22.0)]
    result = GainResult("gain", SETUP, runs)
    assert result.speedups() == {"1P1D": {"split": pytest.approx(2.1)}, "2P1D": {}, "1P2D": {}}
    assert result.equalities() == {}
    result.runs.append(run("1P1D", "shorter_queue", 10.0))
    assert result.equalities() == {"shorter_queue 1P1D / basic 2P1D": pytest.approx(10 / 10.5)}


def test_shapes() -> None:
    assert parse_shape("2P1D") == (2, 1)
    for wrong in ("2P", "0P1D", "1p1d", ""):
        with pytest.raises(ValueError, match="form"):
            parse_shape(wrong)
    assert TestbedSpec(2, 2).shape("1P2D").workers == ("p0", "d0", "d1")
    with pytest.raises(ValueError, match="does not fit"):
        TestbedSpec(2, 2).shape("3P1D")


def test_modes_name_read_modes() -> None:
    assert {mode.read_mode for mode in MODES.values()} <= set(ReadMode.__args__)  # type: ignore[attr-defined]


def test_a_workload_fits_what_it_says() -> None:
    workload = Workload(agents=4, turns=6, context=700)
    assert all(session.total_tokens <= workload.longest for session in workload.sessions())
    assert len(workload.contexts) == len(workload.trajectories) == 4
    assert workload.turn_count == 24
    assert workload.hit_bytes(Model().geometry) == pytest.approx(4 * 6 * 700 * Model().geometry.token_bytes, rel=0.1)


def test_agents_may_share_stored_contexts_of_different_lengths() -> None:
    workload = Workload(agents=6, turns=1, stored=2, spread=0.5)
    lengths = [session.turns[0].append for session in workload.sessions()]
    assert lengths == workload.contexts * 3
    assert len(set(lengths)) == 2


def test_scales_change_only_their_lengths() -> None:
    plain, long = Workload(agents=2), Workload(agents=2, generate_scale=3.0)
    assert [t.append for s in plain.trajectories for t in s.turns] == [t.append for s in long.trajectories for t in s.turns]
    assert long.trajectories[0].turns[0].generate > 2 * plain.trajectories[0].turns[0].generate
    assert plain.contexts == long.contexts


def test_a_job_survives_its_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("job") / "job"
    job = Job(["a.b=1"], 512, [Phase([[(3, 1, 0.5)]], [7], agents_per_s=0.25)])
    job.write(path)
    assert Job.read(path) == job


def test_an_slo_counts_turns_that_keep_it() -> None:
    records = (turn(0, 0.0, 1.0), turn(1, 0.0, 5.0), turn(2, 0.0, 1.0, "failed"))
    assert Slo(ttft_s=2.0, tpot_s=1.0).goodput(Replay(0.0, 10.0, records)) == pytest.approx(0.1)
    assert Slo(ttft_s=9.0, tpot_s=0.01).goodput(Replay(0.0, 10.0, records)) == 0.0


def test_hosts_and_their_links() -> None:
    spec = TestbedSpec(2, 1, snic_bits=5, cnic_bits=7)
    assert spec.name == "2P1D"
    assert spec.workers == ("p0", "p1", "d0")
    assert (spec.nics("store"), spec.nics("head"), spec.nics("p1")) == (("snic",), ("ctl",), ("snic", "cnic", "ctl"))
    assert (spec.rate("p0", "snic"), spec.rate("d0", "cnic"), spec.rate("d0", "ctl"), spec.rate("store", "snic")) == (5, 7, 0, 0)
    assert (spec.role("p1"), spec.role("d0"), spec.role("head")) == ("prefill", "decode", "head")
    addresses = [spec.address(host, nic) for host in spec.hosts for nic in spec.nics(host)]
    assert len(set(addresses)) == len(addresses)
