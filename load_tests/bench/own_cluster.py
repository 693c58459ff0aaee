"""A cluster for the time of a benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dualpath_ray.config import Settings


@contextmanager
def own_cluster(settings: Settings) -> Iterator[None]:
    """Started for the block and stopped after it; so is Ray, unless it was there (`connect_ray`)."""
    import ray

    from actors.cluster import Cluster, connect_ray

    own_ray = connect_ray(settings)
    cluster = Cluster.start(settings)
    try:
        yield
    finally:
        cluster.stop()
        if own_ray:
            ray.shutdown()
