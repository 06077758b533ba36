"""`python -m swarm_protocol.gossip SOCKET`: the gossip process. `supervisor` starts it; its orders come over the socket."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import trio

from swarm_protocol.errors import SwarmError


def main() -> int:
    """Serve until told to stop, or until the client is gone; returns the exit code."""
    from swarm_protocol.gossip.serving import serve

    # py-libp2p installs handlers of its own and is loud about strangers.
    for handler in list(logging.getLogger().handlers):
        logging.getLogger().removeHandler(handler)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="gossip: %(levelname)s %(message)s")
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    try:
        trio.run(serve, Path(sys.argv[1]))
    except SwarmError as error:
        sys.stderr.write(f"gossip: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
