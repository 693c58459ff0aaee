"""What each fabric is told, and that a check sees whether it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from dualpath_ray.cli import main
from dualpath_ray.config import Settings
from dualpath_ray.config.traffic import TrafficSettings
from dualpath_ray.traffic import infiniband, linux_tc, roce
from dualpath_ray.traffic.classes import TrafficClass
from dualpath_ray.traffic.finding import Finding

PAPER = TrafficSettings()
SPLIT = Settings.load(overrides=["traffic.kv_write={sl: 3, weight: 16}"], environ={}).traffic


def wrong(findings: list[Finding]) -> list[str]:
    return [finding.what for finding in findings if not finding.ok]


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["qos", *arguments])
    return result.exit_code, result.output


# ---- InfiniBand


def test_opensm_gets_the_papers_table() -> None:
    lines = infiniband.render(PAPER)["opensm.conf"].splitlines()
    assert {"qos_max_vls 4", "qos_high_limit 240"} <= set(lines)
    assert "qos_vlarb_high 0:192,1:192,2:0,3:192" in lines
    assert "qos_vlarb_low 0:192,1:192,2:64,3:192" in lines
    assert "qos_sl2vl 0,1,2,3,0,0,0,0,0,0,0,0,0,0,0,0" in lines


def test_another_split_is_another_table() -> None:
    lines = infiniband.render(SPLIT)["opensm.conf"].splitlines()
    assert "qos_vlarb_high 0:192,1:192,2:0,3:0" in lines
    assert "qos_vlarb_low 0:192,1:192,2:64,3:16" in lines


PORTINFO = """# Port info: Lid 2 port 1
CapMask:.........................0x251486a
OperVLs:.........................VL0-3
VLHighLimit:.....................240
"""
VLARB = """# VLArbitration tables: Lid 2 port 1 LowCap 8 HighCap 8
# Low priority VL Arbitration Table:
VL    : |0x0 |0x1 |0x2 |0x3 |0x0 |0x0 |0x0 |0x0 |
WEIGHT: |0xC0|0xC0|0x40|0xC0|0x0 |0x0 |0x0 |0x0 |
# High priority VL Arbitration Table:
VL    : |0x0 |0x1 |0x2 |0x3 |0x0 |0x0 |0x0 |0x0 |
WEIGHT: |0xC0|0xC0|0x0 |0xC0|0x0 |0x0 |0x0 |0x0 |
"""
SL2VL = """# SL2VL table: Lid 2
#                 SL: | 0| 1| 2| 3| 4| 5| 6| 7| 8| 9|10|11|12|13|14|15|
ports: in  0, out  0: | 0| 1| 2| 3| 0| 0| 0| 0| 0| 0| 0| 0| 0| 0| 0| 0|
"""


def test_a_port_that_is_as_it_should_be() -> None:
    assert not wrong(infiniband.check_port(PORTINFO, PAPER))
    assert not wrong(infiniband.check_arbitration(VLARB, PAPER))
    assert not wrong(infiniband.check_lanes(SL2VL, PAPER))


def test_a_port_that_the_subnet_manager_left_alone() -> None:
    """opensm's defaults: one lane high, all others low, no limit, service levels folded onto two lanes."""
    assert len(wrong(infiniband.check_port(PORTINFO.replace("VL0-3", "VL0").replace("240", "0"), PAPER))) == 2
    assert wrong(infiniband.check_arbitration(VLARB.replace("0x40", "0xC0"), PAPER)) == ["low-priority table"]
    assert wrong(infiniband.check_arbitration(VLARB.replace("|0xC0|0xC0|0x0 |", "|0xC0|0xC0|0x4 |"), PAPER)) == ["high-priority table"]
    folded = SL2VL.replace("0: | 0| 1| 2| 3|", "0: | 0| 1| 0| 1|")
    assert wrong(infiniband.check_lanes(folded, PAPER)) == ["lane of kv_read (service level 2)", "lane of kv_write (service level 2)"]


def test_a_switch_is_right_only_if_all_its_ports_are() -> None:
    other = "ports: in  1, out  1: | 0| 1| 0| 1| 0| 1| 0| 1| 0| 1| 0| 1| 0| 1| 0| 1|\n"
    assert len(wrong(infiniband.check_lanes(SL2VL + other, PAPER))) == 2


@pytest.mark.parametrize("text", ["", "query failed", VLARB])
def test_output_that_does_not_tell_is_no_success(text: str) -> None:
    assert wrong(infiniband.check_lanes(text, PAPER)) and wrong(infiniband.check_port(text, PAPER))


def test_check_reads_outputs_from_files(tmp_path: Path) -> None:
    outputs = {"portinfo": PORTINFO, "vlarb": VLARB, "sl2vl": SL2VL}
    for name, text in outputs.items():
        (tmp_path / name).write_text(text)
    given = [part for name in outputs for part in ("--from", f"{name}={tmp_path / name}")]
    code, output = run("check", "--fabric", "ib", *given)
    assert code == 0 and "8 of 8 are as they should be" in output
    code, output = run("check", "--fabric", "ib", *given, "--set", "traffic.high_limit=100")
    assert code == 1 and "wrong limit of high priority: 240, should be 100" in output


# ---- RoCE


def test_every_class_is_lossless_and_kv_keeps_a_little() -> None:
    assert roce.priorities(PAPER) == {
        1: [TrafficClass.KV_WRITE],
        2: [TrafficClass.KV_READ],
        3: [TrafficClass.MODEL],
        4: [TrafficClass.CONTROL],
    }
    shares = roce.shares(PAPER)
    assert sum(shares.values()) == 100
    assert shares[1] == shares[2] == 1 and shares[3] > 40


def test_cards_and_switches_are_told_the_same() -> None:
    files = roce.render(PAPER, "eth2")
    switch = json.loads(files["switch.json"])
    for each in TrafficClass:
        marking = PAPER.of(each).marking
        assert f"{marking.dscp}:{marking.priority}" in files["nic.sh"]
        assert switch["DSCP_TO_TC_MAP"]["DUALPATH"][str(marking.dscp)] == str(marking.priority)
    assert switch["PORT_QOS_MAP"]["Ethernet0"]["pfc_enable"] == "1,2,3,4"
    assert "NCCL_IB_TC=106" in files["model.env"]


def test_a_card_that_is_as_it_should_be_and_one_that_is_not() -> None:
    app = "dscp-prio AF11:1 AF21:2 26:3 AF41:4\n"
    pfc = "pfc-cap 8 macsec-bypass off delay 0\nprio-pfc 0:off 1:on 2:on 3:on 4:on 5:off 6:off 7:off\n"
    ets = (
        "willing off ets-cap 8 cbs off\ntc-bw 0:1 1:1 2:1 3:47 4:47 5:1 6:1 7:1\ntc-tsa 0:ets 1:ets\n"
        "prio-tc 0:0 1:1 2:2 3:3 4:4 5:5 6:6 7:7\n"
    )
    assert not wrong(roce.check_app(app, PAPER)) and not wrong(roce.check_pfc(pfc, PAPER)) and not wrong(roce.check_ets(ets, PAPER))
    assert wrong(roce.check_app("dscp-prio 26:3\n", PAPER)) == [
        "priority of DSCP 34 (control)",
        "priority of DSCP 18 (kv_read)",
        "priority of DSCP 10 (kv_write)",
    ]
    assert wrong(roce.check_pfc(pfc.replace("2:on", "2:off"), PAPER)) == ["flow control of priority 2"]
    assert wrong(roce.check_ets(ets.replace("2:1 3:47", "2:48 3:1"), PAPER)) == ["share of traffic class 2", "share of traffic class 3"]
    assert wrong(roce.check_ets("", PAPER))


# ---- Linux


def test_what_the_kernel_was_told_is_what_the_check_reads() -> None:
    """In a network namespace of its own, with the kernel's own output."""
    if os.geteuid() or not (shutil.which("tc") and shutil.which("unshare")):
        pytest.skip("needs root, tc and unshare")
    script = linux_tc.render(PAPER, "v0", 1e9)["tc.sh"]
    setup = "ip link add v0 type veth peer name v1\n" + script + "echo ----\ntc class show dev v0\necho ----\ntc filter show dev v0\n"
    done = subprocess.run(["unshare", "-n", "sh", "-c", setup], capture_output=True, text=True, timeout=60, check=False)
    if "Operation not permitted" in done.stderr:
        pytest.skip("no right to make network namespaces")
    assert done.returncode == 0, done.stderr
    _, classes, filters = done.stdout.split("----\n")
    assert not wrong(linux_tc.check_classes(classes, PAPER, 1e9)) and not wrong(linux_tc.check_filters(filters, PAPER))
    assert wrong(linux_tc.check_classes(classes, PAPER, 2e9)) == [f"ceiling of class 1:{number}" for number in (10, 20, 30)]
    other = Settings.load(overrides=["traffic.kv_read.dscp=16"], environ={}).traffic
    assert wrong(linux_tc.check_filters(filters, other)) == ["class of DSCP 16 (kv_read)"]
    assert len(wrong(linux_tc.check_classes("", PAPER, None))) == 3


def test_one_class_for_one_dscp() -> None:
    same = Settings.load(overrides=["traffic.kv_write.dscp=18"], environ={}).traffic
    assert set(linux_tc.htb_classes(same).values()) == {20}


# ---- the command


def test_render_writes_files(tmp_path: Path) -> None:
    code, output = run("render", "--fabric", "roce", "--out", str(tmp_path / "out"), "--device", "eth7")
    assert code == 0 and output.count("\n") == 3
    assert "device=${1:-eth7}" in (tmp_path / "out" / "nic.sh").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["render", "--fabric", "linux-tc", "--rate", "fast"], "write it like 100gbit"),
        (["check", "--fabric", "roce", "--from", "nothing=x"], "with one of app, pfc, ets"),
        (["check", "--fabric", "roce", "--from", "app=/nowhere"], "No such file"),
        (["check", "--fabric", "ib", "--device", "nothing0"], "give --lid"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], words: str) -> None:
    code, output = run(*arguments)
    assert code == 2 and words in output and "Traceback" not in output


def test_a_tool_that_is_missing_is_named_with_the_way_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    code, output = run("check", "--fabric", "roce", "--device", "eth0")
    assert code == 2 and "there is no dcb here: run `dcb app show dev eth0`" in output and "--from app=FILE" in output
