from __future__ import annotations

import numpy as np
import pytest
import torch

from dualpath_ray.engine import attention as attention_module
from dualpath_ray.engine.prefill import PrefillChunk, PrefillRunner
from dualpath_ray.engine.window import LayerWindow
from dualpath_ray.errors import InvalidRequestError, TransferError
from dualpath_ray.requests import Drawn, SamplingParams

from .conftest import Pair
from .driver import StreamingGate, make_chunks, prefill, random_prompt, turn


class OpenGate:
    """A gate whose hit KV is there; `fail_enter` and `fail_leave` name the layer where it breaks."""

    def __init__(self, window: LayerWindow, fail_enter: int | None = None, fail_leave: int | None = None) -> None:
        self.window = window
        self.calls: list[tuple[str, int]] = []
        self._fail_enter = fail_enter
        self._fail_leave = fail_leave

    def enter(self, layer: int) -> torch.Tensor:
        self.calls.append(("enter", layer))
        if layer == self._fail_enter:
            raise TransferError("the peer died")
        return self.window.view(layer % self.window.layers_resident)

    def leave(self, layer: int) -> None:
        self.calls.append(("leave", layer))
        if layer == self._fail_leave:
            raise TransferError("the receiver died")


def chunk(tokens: list[int], cached: int = 0, first_row: int = 0, sampling: SamplingParams | None = None, **more: object) -> PrefillChunk:
    return PrefillChunk("r", np.array(tokens, dtype=np.int32), cached, first_row, sampling, **more)  # type: ignore[arg-type]


def test_each_layer_is_entered_then_left_before_the_next(llama: Pair) -> None:
    gate = OpenGate(LayerWindow(llama.model.geometry(16), 1, 32))
    PrefillRunner(llama.model).run([chunk([5, 6, 7])], gate)
    assert gate.calls == [(verb, layer) for layer in range(4) for verb in ("enter", "leave")]


def test_only_the_last_chunk_of_a_prompt_yields_a_token(llama: Pair) -> None:
    gate = OpenGate(LayerWindow(llama.model.geometry(16), 1, 64))
    greedy = SamplingParams()
    first = PrefillRunner(llama.model).run([chunk([5, 6]), chunk([5, 6, 7], first_row=16, sampling=greedy), chunk([9], first_row=32)], gate)
    assert first == [None, Drawn(llama.generate([5, 6, 7], 1)[0]), None]
    assert PrefillRunner(llama.model).run([chunk([5, 6])], gate) == [None]


def test_forbidden_tokens_are_not_drawn(llama: Pair) -> None:
    gate = OpenGate(LayerWindow(llama.model.geometry(16), 1, 16))
    runner = PrefillRunner(llama.model)
    (best,) = runner.run([chunk([5, 6, 7], sampling=SamplingParams())], gate)
    assert best is not None
    (second,) = runner.run([chunk([5, 6, 7], sampling=SamplingParams(), forbidden_ids=(best.token, 99_999, -1))], gate)
    assert second not in (best, None)


def test_attention_reads_the_window_and_no_other_memory(llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The window is all the KV memory prefill has: keys and values reach the kernel as views of it, history or not."""
    model, storages = llama.model, set()
    real = attention_module.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **more: object) -> torch.Tensor:
        storages.update((key.untyped_storage().data_ptr(), value.untyped_storage().data_ptr()))
        return real(query, key, value, **more)

    monkeypatch.setattr(attention_module, "scaled_dot_product_attention", spy)
    turns = [turn(model, "a", random_prompt(1, 100)), turn(model, "b", random_prompt(2, 30))]
    prefill(model, turns[1:], budget=16)
    storages.clear()
    window = LayerWindow(model.geometry(16), 1, 256)
    chunks = make_chunks([turns[0]], 64, 16)
    gate = StreamingGate(window, turns[:1], chunks)
    PrefillRunner(model).run(chunks, gate)
    gate.finish()
    chunks = make_chunks([turns[0]], 64, 16)
    gate = StreamingGate(window, turns[:1], chunks)
    PrefillRunner(model).run(chunks, gate)
    assert storages == {window.data_ptr}


@pytest.mark.parametrize("where", ["fail_enter", "fail_leave"])
def test_what_the_gate_raises_comes_out_and_the_runner_lives_on(llama: Pair, where: str) -> None:
    window = LayerWindow(llama.model.geometry(16), 2, 16)
    runner = PrefillRunner(llama.model)
    gate = OpenGate(window, **{where: 2})
    with pytest.raises(TransferError, match="died"):
        runner.run([chunk([5, 6, 7], sampling=SamplingParams())], gate)
    assert max(layer for _, layer in gate.calls) == 2
    assert runner.run([chunk([5, 6, 7], sampling=SamplingParams())], OpenGate(window)) == [Drawn(*llama.generate([5, 6, 7], 1))]


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(chunk([]), id="nothing to compute"),
        pytest.param(chunk([5], cached=-1), id="negative position"),
        pytest.param(chunk([512]), id="beyond the vocabulary"),
        pytest.param(chunk([-1]), id="negative token"),
        pytest.param(chunk([5], cached=4096), id="beyond the context"),
    ],
)
def test_impossible_chunks_are_refused_before_the_gate_is_asked(llama: Pair, bad: PrefillChunk) -> None:
    gate = OpenGate(LayerWindow(llama.model.geometry(16), 1, 16))
    with pytest.raises(InvalidRequestError, match="request r"):
        PrefillRunner(llama.model).run([chunk([5]), bad], gate)
    assert gate.calls == []


def test_a_window_too_small_for_the_batch_is_an_error(llama: Pair) -> None:
    gate = OpenGate(LayerWindow(llama.model.geometry(16), 1, 16))
    with pytest.raises(ValueError, match="17 window rows"):
        PrefillRunner(llama.model).run([chunk([5], cached=16)], gate)
