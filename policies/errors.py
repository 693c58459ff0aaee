"""What a policy refuses. The live scheduler translates these to the package's own errors at its border."""

from __future__ import annotations


class PolicyError(Exception):
    """Base of every error a policy raises on purpose."""


class QueueFull(PolicyError):
    """The bounded waiting queue has no room; the same request may be submitted later."""


class Infeasible(PolicyError):
    """No engine of this cluster can ever hold the request; the message says which limit it passes."""
