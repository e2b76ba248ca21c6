"""Ports for servers that run side by side."""

import random
import socket

# Below the kernel's ephemeral range, from which an outgoing connection could take the port before the server binds it;
# and low enough for the gRPC port, which SGLang 0.5.12 puts at port + 10000 and refuses above 65535.
_PORTS = range(15000, 32000)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now, all different. Random, so that test runs beside each other rarely meet."""
    found: list[int] = []
    for port in random.sample(_PORTS, k=len(_PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"no {count} free ports between {_PORTS.start} and {_PORTS.stop}")
