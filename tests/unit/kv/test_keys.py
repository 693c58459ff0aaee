"""Chained keys: equal keys mean equal KV, and nothing else has them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.kv.keys import KEY_BYTES, block_keys, is_root, root_key

GEOMETRY = KVGeometry(layers=4, kv_heads=2, head_dim=8, block_tokens=4)
ROOT = root_key("model", "tenant", GEOMETRY)
token_lists = st.lists(st.integers(0, 2**31 - 1), max_size=40)


@settings(max_examples=25, deadline=None)
@given(token_lists, st.integers(1, 9))
def test_only_complete_blocks_have_keys_and_all_keys_differ(tokens: list[int], block_tokens: int) -> None:
    keys = block_keys(ROOT, tokens, block_tokens)
    assert len(keys) == len(tokens) // block_tokens
    assert len({ROOT, *keys}) == len(keys) + 1
    assert all(len(key) == KEY_BYTES for key in keys)


@settings(max_examples=25, deadline=None)
@given(token_lists, token_lists)
def test_keys_of_a_prefix_are_a_prefix_of_the_keys(prefix: list[int], more: list[int]) -> None:
    whole = block_keys(ROOT, prefix + more, 4)
    short = block_keys(ROOT, prefix, 4)
    assert whole[: len(short)] == short


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_changed_token_changes_its_block_and_all_later_ones_only(data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=4, max_size=40))
    position = data.draw(st.integers(0, len(tokens) - 1))
    other = data.draw(st.integers(0, 2**31 - 1).filter(lambda token: token != tokens[position]))
    before = block_keys(ROOT, tokens, 4)
    after = block_keys(ROOT, [*tokens[:position], other, *tokens[position + 1 :]], 4)
    block = position // 4
    assert after[:block] == before[:block]
    assert not set(after[block:]) & set(before)


@settings(max_examples=25, deadline=None)
@given(token_lists, st.integers(0, 10))
def test_a_chain_can_be_continued_from_any_of_its_keys(tokens: list[int], blocks: int) -> None:
    keys = block_keys(ROOT, tokens, 4)
    blocks = min(blocks, len(keys))
    parent = keys[blocks - 1] if blocks else ROOT
    assert block_keys(parent, tokens[4 * blocks :], 4) == keys[blocks:]


def test_every_part_of_the_root_changes_all_keys() -> None:
    tokens = list(range(12))
    roots = [
        root_key("model", "tenant", GEOMETRY),
        root_key("model2", "tenant", GEOMETRY),
        root_key("model", "tenant2", GEOMETRY),
        root_key("model", "", GEOMETRY),
        root_key("", "model", GEOMETRY),
        root_key("modelt", "enant", GEOMETRY),  # parts are delimited: moving a letter from one to the next is a change
        *(
            root_key("model", "tenant", replace(GEOMETRY, **change))
            for change in (
                {"layers": 5},
                {"kv_heads": 1},
                {"head_dim": 4},
                {"dtype": "bfloat16"},
                {"dtype": "float16"},
                {"block_tokens": 2},
            )
        ),
    ]
    keys = [key for root in roots for key in block_keys(root, tokens, 4)]
    assert len(set(keys)) == 3 * len(roots)


def test_keys_do_not_depend_on_how_tokens_are_held() -> None:
    tokens = [5, 70_000, 2**31 - 1, 0, 1, 2, 3, 4]
    expected = block_keys(ROOT, tokens, 4)
    for held in (tuple(tokens), np.array(tokens, dtype=np.int32), np.array(tokens, dtype=np.int64), np.repeat(tokens, 2)[::2]):
        assert block_keys(ROOT, held, 4) == expected


def test_keys_are_the_same_for_ever() -> None:
    """Stores outlive releases: a change of these values makes every stored block unreadable and must be deliberate."""
    assert ROOT.hex() == "726f6f74fe41fd017824b9494d6c3761"
    assert [key.hex() for key in block_keys(ROOT, range(8), 4)] == ["a0a34a16c39fc479bbb6a4aca91a2c04", "77b7600ca61371f25a0723d302118890"]


def test_only_roots_look_like_roots() -> None:
    assert is_root(ROOT) and is_root(root_key("other", "", GEOMETRY))
    assert not any(is_root(key) for key in block_keys(ROOT, range(4000), 4))


@pytest.mark.parametrize("change", [{"layers": 0}, {"kv_heads": 0}, {"head_dim": -1}, {"block_tokens": 0}, {"dtype": "int4"}])
def test_a_geometry_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(GEOMETRY, **change)


def test_sizes_of_a_geometry() -> None:
    assert GEOMETRY.token_layer_bytes == 2 * 2 * 8 * 4
    assert GEOMETRY.token_bytes == 4 * GEOMETRY.token_layer_bytes
    assert GEOMETRY.layer_block_bytes == 4 * GEOMETRY.token_layer_bytes
    assert GEOMETRY.full_block_bytes == 4 * GEOMETRY.layer_block_bytes == 4 * GEOMETRY.token_bytes
    assert [GEOMETRY.blocks_for(tokens) for tokens in (0, 1, 4, 5)] == [0, 1, 1, 2]
