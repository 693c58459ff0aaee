"""The testbed's own error."""

from __future__ import annotations


class TestbedError(Exception):
    """The testbed cannot be had here, or one of its parts failed; the message says what to do."""

    __test__ = False
