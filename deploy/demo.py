"""`dualpath demo`: a scripted coding agent on a real cluster on this machine, every turn through the OpenAI API.

Nothing is faked: a model, Ray actors, NIXL transfers, a block store on disk and HTTP. In the middle all engines and gateways are killed,
so that later turns find their KV-Cache in storage or nowhere. Each prompt is also served to a tenant that has nothing cached, which is
what recomputing costs; at the end transformers' own `generate()` says what the text should have been.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live

from deploy.stop_signals import INTERRUPTED, ending_with_ray, raise_on_signals
from dualpath_ray.commands.options import with_settings
from dualpath_ray.config import Settings
from dualpath_ray.environment import set_ray_defaults
from dualpath_ray.errors import ConfigError

RESTART_AFTER = 3  # turns
MAX_TOKENS = 24
SETTLE_TIMEOUT_S = 60.0


@click.command()
@with_settings
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output; the live view goes to standard error.")
def command(settings: Settings, as_json: bool) -> None:
    """Play a coding agent's turns and show where its KV-Cache comes from."""
    if settings.model.kv_dtype is not None:
        raise ConfigError("the demo compares its text with that of unquantised KV: leave model.kv_dtype unset")
    console = Console(file=sys.stderr if as_json else sys.stdout)
    set_ray_defaults(settings.cluster.address)
    raise_on_signals()
    try:
        report = _run(settings, console)
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
        raise SystemExit(INTERRUPTED) from None
    if as_json:
        click.echo(json.dumps(report.document(), indent=2))
    else:
        from deploy.demo_report import summary

        summary(report, console)
    if not report.identical_to_reference or report.leaked_slots:
        raise SystemExit(1)


def _run(settings: Settings, console: Console) -> Any:
    # Ray prints to the driver's standard streams when a worker dies, which the demo makes them do; the view must stay readable.
    with (
        tempfile.TemporaryDirectory(prefix="dualpath-demo-", ignore_cleanup_errors=True) as store,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        return _play(_demo_settings(settings, Path(store)), console)


def _demo_settings(settings: Settings, store: Path) -> Settings:
    """The given settings with what the demo needs: an empty store, a free port, reads from it on both sides, a context for the script."""
    return settings.model_copy(
        update={
            "model": settings.model.model_copy(
                update={
                    "max_context": settings.model.max_context or 4096,
                    "threads": settings.model.threads or max(1, (os.cpu_count() or 2) // 2),
                }
            ),
            "storage": settings.storage.model_copy(update={"path": store}),
            "staging": settings.staging.model_copy(update={"resident_share": 0.0}),
            "serving": settings.serving.model_copy(update={"port": 0}),
            "scheduling": settings.scheduling.model_copy(update={"min_split_blocks": 2}),
        }
    )


def _play(settings: Settings, console: Console) -> Any:
    from openai import APIStatusError

    from deploy.demo_report import LiveView, Report
    from deploy.running_service import running_service

    def leave() -> None:
        console.show_cursor()
        shutil.rmtree(settings.storage.path, ignore_errors=True)

    started = time.monotonic()
    view = LiveView(Report(settings.model.name))
    with Live(view, console=console, refresh_per_second=8, transient=True, redirect_stdout=False, redirect_stderr=False):
        view.status = "starting Ray, a prefill and a decode node with their gateways, the scheduler and the HTTP server ..."
        with ending_with_ray(INTERRUPTED, leave), running_service(settings) as address:
            try:
                prompts = asyncio.run(_Demo(settings, address, view).run())
            except APIStatusError as error:
                raise ConfigError(f"the service refused a turn of the demo: {error.message}") from error
        view.status = "asking transformers what the text should be ..."
        _compare(settings, prompts, view)
        view.report.elapsed_s = time.monotonic() - started
        view.status = view.text = ""
    return view.report


class _Demo:
    """One run against a running service."""

    def __init__(self, settings: Settings, address: str, view: Any) -> None:
        from openai import AsyncOpenAI

        from actors.client import ClusterClient

        self._openai = AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300.0)
        self._cluster = ClusterClient.connect(settings.cluster.namespace)
        self._model, self._view = settings.model.name, view
        self._restart_timeout_s = settings.cluster.start_timeout_s

    async def run(self) -> list[list[Any]]:
        """All turns; returns each turn's messages."""
        from actors.object_store import created_bytes
        from deploy.demo_report import Turn
        from deploy.demo_script import STEPS, next_message, opening

        messages, prompts = opening(), []
        created = created_bytes()
        for number in range(len(STEPS)):
            if number:
                messages.append(next_message(number))
            if number == RESTART_AFTER:
                await self._restart_engines()
            turn = Turn(after_restart=number >= RESTART_AFTER)
            self._view.report.turns.append(turn)
            self._view.status = f"turn {number + 1}: prefill ..."
            await self._ask(messages, turn, tenant="agent", show=True)
            prompts.append(list(messages))
            messages.append({"role": "assistant", "content": turn.text})
            self._view.status = f"turn {number + 1}: the same prompt with nothing cached ..."
            cold = Turn()
            await self._ask(prompts[-1], cold, tenant=f"recompute-{number}", max_tokens=1)
            turn.ttft_recompute_s = cold.ttft_s
        states = await self._settled()
        report = self._view.report
        report.leaked_slots = sum(state["total_slots"] - state["free_slots"] for state in states.values() if "free_slots" in state)
        report.object_store_created_bytes = created_bytes() - created
        smallest = (await self._cluster.facts()).geometry.token_layer_bytes
        report.object_store_bytes = report.object_store_created_bytes // smallest * smallest
        return prompts

    async def _ask(self, messages: list[Any], turn: Any, tenant: str, show: bool = False, max_tokens: int = MAX_TOKENS) -> None:
        """One streamed request; fills in `turn`."""
        start = time.monotonic()
        first = last = 0.0
        stream = await self._openai.chat.completions.create(
            model=self._model,
            messages=messages,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers={"X-Tenant": tenant},
        )
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                last = time.monotonic()
                first = first or last
                turn.text += chunk.choices[0].delta.content
                if show:
                    self._view.text, self._view.status = turn.text, "decoding ..."
            if chunk.usage is not None:
                usage: Any = chunk.usage
                turn.prompt_tokens = usage.prompt_tokens
                turn.cached_tokens = usage.prompt_tokens_details.cached_tokens
                turn.computed_tokens = usage.dualpath["computed_tokens"]
                turn.read_bytes |= usage.dualpath["read_bytes"]
                turn.ttft_s = (first or time.monotonic()) - start
                turn.tpot_s = (last - first) / max(1, usage.completion_tokens - 1)

    async def _settled(self) -> dict[str, dict[str, Any]]:
        """Wait until nothing is under way (blocks are being written after the last token)."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while True:
            states = await self._cluster.inspect()
            if all(state["idle"] for state in states.values()) or time.monotonic() > deadline:
                return states
            await asyncio.sleep(0.05)

    async def _restart_engines(self) -> None:
        """Kill every engine and gateway: their memory is gone, what they had made durable is not."""
        self._view.status = "killing all engines and gateways ..."
        await self._settled()
        before = (await self._cluster.status())["processes"]
        for process in before.values():
            os.kill(process["pid"], signal.SIGKILL)
        self._view.status = "waiting for Ray to start them again ..."
        deadline = time.monotonic() + self._restart_timeout_s
        while True:
            now = (await self._cluster.status())["processes"]  # without those that are dead and not yet replaced
            missing = [name for name, process in before.items() if name not in now or now[name]["agent"] == process["agent"]]
            if not missing:
                return
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{', '.join(missing)} did not come back within {self._restart_timeout_s:.0f} s; the machine may be too small or too"
                    " busy (cluster.start_timeout_s)"
                )
            await asyncio.sleep(0.1)


def _compare(settings: Settings, prompts: list[list[Any]], view: Any) -> None:
    """Greedy text of each turn by transformers' own model and generate(), from the whole prompt every time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dualpath_ray.models.resolve import resolve_model

    path = resolve_model(settings.model.spec)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, settings.model.dtype))
    for number, (messages, turn) in enumerate(zip(prompts, view.report.turns, strict=True), 1):
        view.status = f"asking transformers what the text should be: turn {number} of {len(prompts)} ..."
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        with torch.inference_mode():
            out = model.generate(torch.tensor([tokens]), max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0)
        turn.identical_to_reference = tokenizer.decode(out[0, len(tokens) :], skip_special_tokens=True) == turn.text
