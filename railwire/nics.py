"""What an engine says about its NICs, and the names by which they are given to it."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass

from railwire import topology
from railwire.errors import ConfigurationError

_TCP = re.compile(r"(tcp://)(\[[^\]]*\]|[^:/?]*)(.*)", re.DOTALL)


@dataclass(frozen=True)
class NicInfo:
    """One NIC of an engine."""

    name: str
    """As it can be given to ``nics=`` again."""
    kind: str
    """``tcp``, ``shm``, ``efa``, ``verbs``, ``sim``, ...; NICs of one kind can talk to each other."""
    provider: str
    """The implementation behind it, with its version."""
    library: str
    """Path of its library; empty if none."""
    same_host_only: bool
    completion_proves_landing: bool
    """False: a flush on the link proves it, once per burst."""
    closing_fences: bool
    """Closing our half of a link keeps the peer from writing."""
    closing_quiets: bool
    """Closing our half of a link keeps the peer's process from reading our sources."""
    takes_all_memory: bool
    """False: it refuses some, such as a GPU's; with a peer, NICs of another kind carry that."""
    links_per_pair: int
    """Links between it and one NIC of a peer."""
    max_write_bytes: int
    link_depth: int
    """Work requests a link may have outstanding."""
    max_message_bytes: int
    link_gbps: float
    """Nominal speed in Gbit/s; 0 if unknown."""
    warning: str = ""
    """What its user should know, such as that writes are emulated; it is logged, too."""


def reachable(name: str) -> str:
    """The name, with an address that peers can reach in place of ``0.0.0.0`` or ``::``, which only a listener
    understands: the one that this host uses towards the rest of the world, as ``tcp`` does.

    Raises:
        ConfigurationError: ``::`` on a host without a route by IPv6.
    """
    match = _TCP.fullmatch(name)
    if match is None:
        return name
    start, host, rest = match.groups()
    try:
        # inet_aton knows the older ways to write it, such as 0 and 0.0.
        ip = ipaddress.ip_address(host[1:-1] if host[:1] == "[" else socket.inet_ntoa(socket.inet_aton(host)))
    except (OSError, ValueError):
        return name  # a host's name, or no address at all: whoever opens it says so
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    if not (mapped or ip).is_unspecified:
        return name
    if ip.version == 4 or mapped:
        return f"{start}{topology.route_address(4) or topology.LOOPBACK}{rest}"
    address = topology.route_address(6)
    if address is None:
        raise ConfigurationError(
            f"{name}: no peer can reach that address, and this host has no route by IPv6: name the address of an "
            "interface, as in tcp://[fd00::2]"
        )
    return f"{start}[{address}]{rest}"
