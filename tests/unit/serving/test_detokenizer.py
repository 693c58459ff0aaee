from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualpath_ray.serving.detokenizer import MAX_UNDECODED_TOKENS, REPLACEMENT, Detokenizer
from dualpath_ray.serving.tokenizer import Tokenizer

shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200, derandomize=True)


def pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.finish()]


@pytest.fixture(params=["byte_level", "byte_fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


@shared
@given(text=st.text(max_size=60))
def test_pieces_of_a_text_join_to_it_and_never_hold_part_of_a_character(tokenizer: Tokenizer, text: str) -> None:
    tokens = list(tokenizer.encode(text, special_tokens=False))
    out = pieces(tokenizer, tokens)
    assert "".join(out) == tokenizer.decode(tokens)
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in out)


@shared
@given(data=st.data())
def test_any_byte_level_tokens_join_to_their_decoding(byte_level: Tokenizer, data: st.DataObject) -> None:
    """Random models emit bytes that are no UTF-8."""
    tokens = data.draw(st.lists(st.integers(0, byte_level.vocabulary - 1), max_size=MAX_UNDECODED_TOKENS - 1))
    assert "".join(pieces(byte_level, tokens)) == byte_level.decode(tokens)


@shared
@given(data=st.data())
def test_tokens_pushed_together_give_the_text_that_they_give_one_by_one(tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(st.text(max_size=60))
    tokens = left = tokenizer.encode(text, special_tokens=False)
    detokenizer, out = Detokenizer(tokenizer), []
    while left:
        size = data.draw(st.integers(1, len(left)))
        out.append(detokenizer.push_all(left[:size]))
        left = left[size:]
    out.append(detokenizer.finish())
    assert "".join(out) == "".join(pieces(tokenizer, list(tokens)))
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in out)


def test_a_character_in_several_tokens_comes_with_its_last(tokenizer: Tokenizer) -> None:
    tokens = list(tokenizer.encode("a€b", special_tokens=False))
    out = pieces(tokenizer, tokens)
    assert [piece for piece in out if piece] == ["a", "€", "b"]
    assert len(tokens) >= 5


def test_spaces_between_words_survive(byte_fallback: Tokenizer) -> None:
    tokens = list(byte_fallback.encode("the sun", special_tokens=False))
    assert pieces(byte_fallback, tokens)[-6:] == ["e", " ", "s", "u", "n", ""]


def test_unfinished_character_at_the_end_is_replaced(byte_level: Tokenizer) -> None:
    tokens = list(byte_level.encode("€", special_tokens=False))
    assert len(tokens) == 3
    assert pieces(byte_level, tokens[:2]) == ["", "", REPLACEMENT]


def test_special_tokens_are_silent_however_many(byte_level: Tokenizer) -> None:
    (end,) = byte_level.encode("<|im_end|>", special_tokens=False)
    letter = byte_level.encode("a", special_tokens=False)[0]
    detokenizer = Detokenizer(byte_level)
    assert "".join(detokenizer.push(token) for token in [end] * 500 + [letter]) == "a"
    assert len(detokenizer._window) == 1


def test_endless_garbage_is_given_out_and_the_window_stays_short(byte_level: Tokenizer) -> None:
    stray = byte_level.encode("€", special_tokens=False)[1]
    detokenizer = Detokenizer(byte_level)
    out = "".join(detokenizer.push(stray) for _ in range(1000))
    assert out + detokenizer.finish() == byte_level.decode([stray] * 1000)
    assert len(detokenizer._window) <= 2 * MAX_UNDECODED_TOKENS + 2
