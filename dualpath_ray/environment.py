"""Environment variables that must be right before Ray is imported. (`transfer/nixl_api.py` does this for NIXL and UCX.)"""

from __future__ import annotations

import os


def set_ray_defaults(address: str) -> None:
    """Call before importing ray, with `cluster.address`; what the user has set wins.

    A cluster of our own on this machine runs without token authentication: Ray's default would write a token into the home
    directory, and every later Ray command there would then need it. A cluster that we join decides for itself.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # These are answers that nobody waits for any more, as of requests that were given up; Ray would print a stack trace for each.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    if address == "local":
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        # Ray's default, 15, starves the engines on a machine that does anything else.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Serve kills a proxy that is not there within 5 s, which is less than a process takes to start on a busy machine.
        os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
