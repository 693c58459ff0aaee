"""The indexed heap against a plain dictionary."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from policies.indexed_heap import IndexedHeap

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["set", "discard", "pop", "smallest"]), st.sampled_from("abcdef"), st.integers(0, 5)), max_size=80
)


@given(OPERATIONS)
def test_behaves_like_a_sorted_dictionary(operations: list[tuple[str, str, int]]) -> None:
    heap, model = IndexedHeap(), dict[str, int]()
    for verb, name, key in operations:
        ordered = sorted(model, key=lambda n: (model[n], n))
        if verb == "set":
            heap.set(name, key)
            model[name] = key
        elif verb == "discard":
            heap.discard(name)
            model.pop(name, None)
        elif verb == "pop":
            assert heap.pop() == (ordered[0] if ordered else None)
            model.pop(ordered[0], None) if ordered else None
        else:
            assert list(heap.smallest(key)) == ordered[:key]
        ordered = sorted(model, key=lambda n: (model[n], n))
        assert heap.peek() == (ordered[0] if ordered else None)
        assert len(heap) == len(model)
        assert (name in heap) == (name in model)
