"""`dualpath store`, as people and scripts call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dualpath_ray import cli
from dualpath_ray.kv.keys import ROOT_TAG
from dualpath_ray.stores.base import BlockBuffer
from dualpath_ray.stores.directory import DirectoryStore
from dualpath_ray.stores.directory_inventory import LOCK, DirectoryInventory
from tests.unit.stores.conftest import FINGERPRINT, PAGED, block_path, make_blocks


@pytest.fixture
def blocks(tmp_path: Path) -> list[BlockBuffer]:
    """A chain of eight in the directory `store`."""
    made = make_blocks(PAGED, 8)
    made[0] = BlockBuffer(made[0].key, ROOT_TAG + made[0].parent[4:], made[0].data)
    store = DirectoryStore(tmp_path / "store", PAGED, FINGERPRINT)
    assert store.write(made).result(10) == [None] * 8
    store.close()
    return made


def call(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["store", *arguments, "--set", f"storage.path={folder / 'store'}"])


def test_ls(blocks: list[BlockBuffer], tmp_path: Path) -> None:
    document = json.loads(call(tmp_path, "ls", "--json", "--limit", "0").stdout)
    assert {row["key"] for row in document["shown"]} == {block.key.hex() for block in blocks}
    assert sum(row["first"] for row in document["shown"]) == 1
    text = call(tmp_path, "ls", "--limit", "3").stdout
    assert "3 of 8 blocks" in text and FINGERPRINT in text


def test_stats(blocks: list[BlockBuffer], tmp_path: Path) -> None:
    block_path(tmp_path / "store", blocks[5].key).unlink()
    document = json.loads(call(tmp_path, "stats", "--json").stdout)
    ((model, row),) = document["models"].items()
    assert model.startswith(FINGERPRINT)
    assert (row["blocks"], row["first_blocks"], row["leaves"], row["orphans"]) == (7, 1, 2, 2)
    assert "7 blocks" in call(tmp_path, "stats").stdout


def test_verify_says_what_is_damaged_and_repairs(blocks: list[BlockBuffer], tmp_path: Path) -> None:
    assert call(tmp_path, "verify").exit_code == 0
    path = block_path(tmp_path / "store", blocks[3].key)
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)
    found = call(tmp_path, "verify", "--json")
    assert found.exit_code == 1
    assert blocks[3].key.hex() in json.loads(found.stdout)["problems"][0]
    assert call(tmp_path, "verify", "--repair").exit_code == 1
    assert not path.exists() and list((tmp_path / "store" / "quarantine").iterdir())
    assert call(tmp_path, "verify").exit_code == 0


def test_gc_makes_room_and_can_only_say_so(blocks: list[BlockBuffer], tmp_path: Path) -> None:
    room = ("--set", "storage.capacity_bytes=1MiB")
    assert json.loads(call(tmp_path, "gc", "--json", *room).stdout)["evicted_blocks"] == 0
    bytes_of_one = block_path(tmp_path / "store", blocks[0].key).stat().st_size
    more = DirectoryStore(tmp_path / "store", PAGED, FINGERPRINT)
    count = (2 << 20) // bytes_of_one
    assert more.write(make_blocks(PAGED, count, seed=5)).result(20) == [None] * count
    more.close()
    (tmp_path / "store" / LOCK).unlink()
    before = sorted(tmp_path.rglob("*"))
    said = json.loads(call(tmp_path, "gc", "--json", "--dry-run", *room).stdout)
    assert said["evicted_blocks"] > 0
    assert sorted(tmp_path.rglob("*")) == before
    done = json.loads(call(tmp_path, "gc", "--json", *room).stdout)
    assert done["evicted_blocks"] == said["evicted_blocks"]
    assert json.loads(call(tmp_path, "stats", "--json").stdout)["bytes"] <= 1 << 20
    assert "leftovers swept" in call(tmp_path, "gc").stdout


def test_gc_beside_another_collector(blocks: list[BlockBuffer], tmp_path: Path) -> None:
    with DirectoryInventory(tmp_path / "store").collecting():
        busy = call(tmp_path, "gc")
        assert call(tmp_path, "gc", "--dry-run").exit_code == 0
    assert busy.exit_code == 3
    assert "another process is collecting" in busy.stdout


@pytest.mark.parametrize("verb", ["ls", "stats", "verify", "gc"])
def test_a_directory_that_is_not_there(tmp_path: Path, verb: str) -> None:
    failed = call(tmp_path, verb)
    assert failed.exit_code == 2
    assert "storage directory" in failed.stderr and len(failed.stderr.splitlines()) == 1
    assert not (tmp_path / "store").exists(), "a look must not make a directory"


def test_an_s3_service_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    settings = ("storage.kind=s3", "storage.s3.bucket=b", "storage.s3.endpoint=http://127.0.0.1:9", "storage.s3.request_timeout_s=0.5")
    failed = call(tmp_path, "ls", *[part for setting in settings for part in ("--set", setting)], "--set", "storage.s3.anonymous=true")
    assert failed.exit_code == 2
    assert "127.0.0.1:9" in failed.stderr
