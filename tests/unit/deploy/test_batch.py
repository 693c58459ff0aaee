from __future__ import annotations

import asyncio
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from deploy import batch as batch_command
from deploy.openai_api import batch
from deploy.openai_api.batch import LineDone, bounded_lines, run_batch
from deploy.openai_api.caller import Caller
from deploy.openai_api.finished_lines import FinishedLines
from deploy.openai_api.service import OpenAIService
from dualpath_ray.errors import OverloadedError
from dualpath_ray.serving.tokenizer import Tokenizer
from tests.unit.deploy.conftest import ANSWER
from tests.unit.deploy.emulation import EmulatedCluster

CHAT = "/v1/chat/completions"
TURN = [{"role": "user", "content": "x"}]


def line(name: Any = "a", **fields: Any) -> bytes:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
    return json.dumps({"custom_id": name, "method": "POST", "url": CHAT, "body": body, **fields}).encode() + b"\n"


async def run(service: OpenAIService, lines: list[bytes], concurrency: int = 3, **options: Any) -> list[dict[str, Any]]:
    results = io.StringIO()
    await run_batch(service, lines, results, concurrency=concurrency, **options)
    return [json.loads(text) for text in results.getvalue().splitlines()]


async def test_every_line_gets_its_result(service: OpenAIService, cluster: EmulatedCluster) -> None:
    done: list[LineDone] = []
    lines = [line(f"id-{index}") for index in range(20)]
    results = await run(service, [*lines, b"\n"], caller=Caller("batch", "acme"), on_done=done.append)
    assert sorted(result["custom_id"] for result in results) == sorted(f"id-{index}" for index in range(20))
    assert len({result["id"] for result in results}) == 20
    for result in results:
        assert result["error"] is None
        assert result["response"]["status_code"] == 200
        assert result["response"]["body"]["choices"][0]["message"]["content"] == ANSWER
    assert {request.tenant for request in cluster.requests} == {"acme"}
    assert sum(item.read_bytes for item in done) == sum(map(len, lines))
    assert not any(item.failed for item in done) and all(item.tokens for item in done)


async def test_no_character_of_a_text_ends_a_line(service: OpenAIService, cluster: EmulatedCluster, tokenizer: Tokenizer) -> None:
    """`str.splitlines` and the lines of many readers end at more characters than the line feed; JSON escapes only some of them."""
    text = "one\x85two\u2028three\u2029\r\n\x0b\x0c\x1c\x1d\x1e."
    cluster.answer = tokenizer.encode(text, special_tokens=False)
    results = await run(service, [line(f"a{text}"), line(url="/v1/rollouts", body={"model": "tiny", "turns": [TURN, TURN]})])
    named = {result["custom_id"]: result["response"]["body"] for result in results}
    assert named[f"a{text}"]["choices"][0]["message"]["content"] == text
    assert [turn["choices"][0]["message"]["content"] for turn in named["a"]["turns"]] == [text, text]


async def test_completions_too(service: OpenAIService) -> None:
    (result,) = await run(service, [line(url="/v1/completions", body={"model": "tiny", "prompt": "x", "max_tokens": 3})])
    assert result["response"]["body"]["object"] == "text_completion"


@pytest.mark.parametrize(
    ("bad", "code", "custom_id"),
    [
        (b"{\n", "invalid_json", None),
        (b"[]\n", "invalid_value", None),
        (line(method="GET"), "invalid_value", "a"),
        (line(url="/v1/embeddings"), "invalid_url", "a"),
        (line(name=3), "invalid_value", None),
        (b'{"custom_id": "b"}\n', "missing_required_parameter", "b"),
        (line(body={"model": "tiny", "stream": True}), "invalid_value", "a"),
    ],
)
async def test_a_line_that_is_no_request_fails_alone(service: OpenAIService, bad: bytes, code: str, custom_id: str | None) -> None:
    done: list[LineDone] = []
    results = await run(service, [bad, line("good")], on_done=done.append)
    failed = next(result for result in results if result["custom_id"] != "good")
    assert (failed["custom_id"], failed["response"], failed["error"]["code"]) == (custom_id, None, code)
    assert failed["error"]["message"]
    assert next(result for result in results if result["custom_id"] == "good")["response"]["status_code"] == 200
    assert sorted(item.failed for item in done) == [False, True]


async def test_a_refused_request_has_its_status(service: OpenAIService) -> None:
    (result,) = await run(service, [line(body={"model": "tiny", "prompt": 3})])
    assert (result["response"]["status_code"], result["error"]) == (400, None)
    assert result["response"]["body"]["error"]["code"] == "missing_required_parameter"


async def test_overload_is_waited_out(service: OpenAIService, cluster: EmulatedCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(batch, "LONGEST_PAUSE_S", 0.001)
    cluster.failure = OverloadedError("full")
    (result,) = await run(service, [line()])
    assert result["response"]["status_code"] == 429
    assert len(cluster.requests) == batch.ATTEMPTS

    cluster.requests.clear()
    recovered = asyncio.create_task(run(service, [line()]))
    while len(cluster.requests) < 2:
        await asyncio.sleep(0)
    cluster.failure = None
    (result,) = await recovered
    assert result["response"]["status_code"] == 200


async def test_no_more_requests_than_allowed_are_read_or_run(service: OpenAIService, cluster: EmulatedCluster) -> None:
    cluster.stall_at = 1
    taken = 0

    def lines() -> Any:
        nonlocal taken
        for index in range(100):
            taken += 1
            yield line(str(index))

    job = asyncio.create_task(run_batch(service, lines(), io.StringIO(), concurrency=2))
    while len(cluster.running) < 2:
        await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)
    assert (len(cluster.running), taken) == (2, 3)
    job.cancel()
    await asyncio.gather(job, return_exceptions=True)
    assert not cluster.running


async def test_results_that_cannot_be_written_stop_the_job(service: OpenAIService, cluster: EmulatedCluster) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        await run_batch(service, [line()] * 10, Full(), concurrency=2)
    assert not cluster.running


def test_lines_are_bounded() -> None:
    file = io.BytesIO(b"ab\n" + b"x" * 25 + b"\n" + b"123456789\ncd")
    assert list(bounded_lines(file, 10)) == [b"ab\n", b"x" * 10, b"123456789\n", b"cd"]


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\x1f\x8b\x08", b"[1]\n", "directory"])
def test_unusable_input_is_one_line_and_exit_status_2(tmp_path: Path, content: bytes | str | None) -> None:
    source = tmp_path / "in.jsonl"
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content:
        source.mkdir()
    outcome = CliRunner().invoke(batch_command.command, [str(source), str(tmp_path / "out.jsonl")])
    assert outcome.exit_code == 2
    assert len(outcome.stderr.strip().splitlines()) == 1
    assert str(source) in outcome.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_results_are_not_overwritten_by_accident(tmp_path: Path) -> None:
    source, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(line())
    results.write_text("precious")
    for arguments in ([str(source), str(results)], [str(source), str(source), "--overwrite"]):
        outcome = CliRunner().invoke(batch_command.command, arguments)
        assert (outcome.exit_code, "exists already" in outcome.stderr) == (2, True)
    assert results.read_text() == "precious"


def test_a_wrong_setting_is_one_line_too(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(batch_command.command, [str(tmp_path), str(tmp_path), "--set", "serving.prot=1"])
    assert (outcome.exit_code, "did you mean serving.port" in outcome.stderr) == (2, True)


def rollout(name: str, turns: list[list[dict[str, str]]], **fields: Any) -> bytes:
    return line(name, url="/v1/rollouts", body={"model": "tiny", "max_tokens": 3, "turns": turns, **fields})


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def test_a_rollout_is_a_conversation(service: OpenAIService, cluster: EmulatedCluster, tokenizer: Tokenizer) -> None:
    done: list[LineDone] = []
    (result,) = await run(service, [rollout("r", [say("one"), say("two"), say("three")])], on_done=done.append)
    turns = result["response"]["body"]["turns"]
    assert (result["response"]["status_code"], len(turns)) == (200, 3)
    said = turns[0]["choices"][0]["message"]["content"]
    last = tokenizer.decode(cluster.requests[2].tokens)
    assert last.index("one") < last.index(said) < last.index("two") < last.index("three")
    assert len({request.session for request in cluster.requests}) == 1
    assert done[0].tokens == sum(turn["usage"]["total_tokens"] for turn in turns)


@pytest.mark.parametrize(
    ("bad", "status"),
    [(rollout("r", [say("one"), say("x" * 1000)]), 400), (rollout("r", []), 400), (rollout("r", [say("a")], messages=say("b")), 400)],
)
async def test_a_refused_turn_ends_its_rollout(service: OpenAIService, bad: bytes, status: int) -> None:
    (result,) = await run(service, [bad])
    body = result["response"]["body"]
    assert (result["response"]["status_code"], bool(body["error"]["message"])) == (status, True)
    if "turns" in body:
        assert len(body["turns"]) == 1


def finished_of(path: Path) -> FinishedLines:
    finished = FinishedLines()
    finished.add_results([path])
    return finished


async def test_a_killed_job_goes_on(service: OpenAIService, cluster: EmulatedCluster, tmp_path: Path) -> None:
    """Whatever is left of the results file when the process dies: no finished line is asked again, none is lost."""
    lines = [line(f"id-{index}") for index in range(12)] + [b"{broken\n", line("odd", url="/v1/x")]
    whole = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in await run(service, lines))
    path = tmp_path / "out.jsonl"
    for kept in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1, len(whole)):
        path.write_text(whole[:kept], encoding="utf-8")
        complete = whole[:kept].count("\n")
        cluster.requests.clear()
        finished = finished_of(path)
        assert len(finished) == complete
        done: list[LineDone] = []
        with path.open("a", encoding="utf-8") as results:
            await run_batch(service, lines, results, concurrency=3, finished=finished, on_done=done.append)
        found = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
        assert sorted(str(result["custom_id"]) for result in found) == sorted([f"id-{index}" for index in range(12)] + ["None", "odd"])
        assert sum(item.skipped for item in done) == complete and len(done) == 14
        assert len(cluster.requests) == 12 - sum(
            result["custom_id"].startswith("id-") for result in found[:complete] if result["custom_id"]
        )


async def test_equal_names_are_an_error(service: OpenAIService, cluster: EmulatedCluster) -> None:
    results = await run(service, [line("a"), line("a"), b"{\n", b"{\n"])
    assert sorted(str((result["error"] or {}).get("code")) for result in results) == ["None", "duplicate_custom_id", *["invalid_json"] * 2]
    assert len(cluster.requests) == 1


def test_a_finished_line_costs_little_memory() -> None:
    count = 100_000
    tracemalloc.start()
    finished = FinishedLines()
    for index in range(count):
        finished.add(f"{index}-" + "x" * 200)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(finished) == count and held / count < 120


def test_a_file_of_something_else_is_not_taken_for_results(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(line())
    for content in ("precious\n", "{}\n", '["x"]\n'):
        (tmp_path / "out.jsonl").write_text(content)
        outcome = CliRunner().invoke(batch_command.command, [str(source), str(tmp_path / "out.jsonl"), "--resume"])
        assert (outcome.exit_code, "line 1 of" in outcome.stderr) == (2, True)
        assert (tmp_path / "out.jsonl").read_text() == content


async def test_failures_have_a_file_of_their_own_if_wanted(service: OpenAIService) -> None:
    errors = io.StringIO()
    results = await run(service, [line("good"), line("bad", body={}), b"{\n"], errors=errors)
    assert [result["custom_id"] for result in results] == ["good"]
    assert sorted(str(json.loads(text)["custom_id"]) for text in errors.getvalue().splitlines()) == ["None", "bad"]
