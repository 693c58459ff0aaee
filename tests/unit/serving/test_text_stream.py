from __future__ import annotations

from collections.abc import Iterable

from dualpath_ray.requests import GenerationDelta, GenerationRequest
from dualpath_ray.serving.text_stream import TextStream
from dualpath_ray.serving.tokenizer import Tokenizer

END = 2


def request(**fields: object) -> GenerationRequest:
    return GenerationRequest(request_id="r", tokens=(5,), max_new_tokens=100, stop_token_ids=(END,), **fields)  # type: ignore[arg-type]


def run(stream: TextStream, deltas: Iterable[GenerationDelta]) -> list[str]:
    out = []
    for delta in deltas:
        out.append(stream.push(delta))
        if stream.finish_reason:
            break
    return out


def one_by_one(tokens: Iterable[int]) -> list[GenerationDelta]:
    return [GenerationDelta((token,)) for token in tokens]


def test_stop_string_across_tokens_ends_the_text(byte_level: Tokenizer) -> None:
    tokens = [*byte_level.encode("one ", special_tokens=False), *byte_level.encode("qZ", special_tokens=False), 70, 71]
    stream = TextStream(byte_level, request(), ["qZ"])
    assert "".join(run(stream, one_by_one(tokens))) == "one "
    assert stream.finish_reason == "stop"
    assert stream.tokens == len(tokens) - 2  # nothing after the stop string is counted


def test_tokens_behind_a_stop_string_in_one_delta_are_dropped(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("xyz", special_tokens=False)
    stream = TextStream(byte_level, request(), ["y"])
    assert stream.push(GenerationDelta((*tokens, END), "stop")) == "x"
    assert (stream.finish_reason, stream.tokens) == ("stop", 2)


def test_what_was_held_back_comes_at_the_end(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("a€S", special_tokens=False)
    stream = TextStream(byte_level, request(), ["STOP"])
    assert stream.push(GenerationDelta(tokens)) == "a€"
    assert stream.push(GenerationDelta((), "length")) == "S"
    assert stream.finish_reason == "length"


def test_end_of_sequence_is_counted_but_not_shown(byte_level: Tokenizer) -> None:
    letter = byte_level.encode("a", special_tokens=False)[0]
    plain_end = byte_level.encode("b", special_tokens=False)[0]  # a token that the tokenizer does not know as special
    stream = TextStream(byte_level, GenerationRequest("r", (5,), 9, stop_token_ids=(plain_end,)))
    assert stream.push(GenerationDelta((letter, plain_end, letter, plain_end), "stop")) == "aba"
    assert (stream.finish_reason, stream.tokens) == ("stop", 4)


def test_stop_strings_wait_for_min_tokens(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("qqqq", special_tokens=False)
    assert len(tokens) == 4
    stream = TextStream(byte_level, request(min_new_tokens=3), ["q"])
    assert "".join(run(stream, one_by_one(tokens))) == "qq"
    assert (stream.finish_reason, stream.tokens) == ("stop", 3)
