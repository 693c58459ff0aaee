"""A peer in a process of its own, to be killed. Prints its address; prints its memory's CRC-32 for every LayerLanded it gets."""

from __future__ import annotations

import base64
import pickle
import sys
import zlib

from dualpath_ray.transfer.messages import LayerLanded
from tests.unit.transfer.site import Site


def main() -> None:
    site = Site(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

    def tell(sender: str, message: LayerLanded) -> None:
        print(zlib.crc32(site.memory), flush=True)

    site.endpoint.on(LayerLanded, tell)
    print(base64.b64encode(pickle.dumps(site.endpoint.info)).decode(), flush=True)
    sys.stdin.read()  # until the parent closes the pipe, or dies
    site.endpoint.close()


if __name__ == "__main__":
    main()
