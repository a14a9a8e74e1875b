"""A registry of workers by its URL."""

from __future__ import annotations

import logging
import os
from urllib.parse import unquote, urlsplit

from railwire.errors import ConfigurationError
from railwire.kvcache.router.membership import Membership

log = logging.getLogger("railwire.kvcache")


def open_membership(url: str, *, server: bool = False, secret: str = "") -> Membership:
    """A registry by URL: ``tcpstore://HOST:PORT[/PREFIX]``, or
    ``etcd://[USER[:PASSWORD]@]HOST:PORT[,HOST:PORT...][/PREFIX]``, or the same with ``etcds://`` for TLS.

    Args:
        server: this process keeps the TCPStore, at this address alone.
        secret: records that are not signed with it do not count; empty: all do.

    The password of etcd may stand in the environment variable RAILWIRE_ETCD_PASSWORD instead, and the user in
    RAILWIRE_ETCD_USER: everybody on the host can read a command line.

    Raises:
        ConfigurationError: no such URL.
    """
    scheme, _, rest = url.partition("://")
    hosts, _, prefix = rest.partition("/")
    if not secret and not _local(hosts):
        log.warning(
            "railwire: the registry at %s can be reached from other hosts, and there is no --secret: whoever reaches "
            "it can have prompts sent to himself. Give all workers and routers the same RAILWIRE_SECRET",
            hosts.rpartition("@")[2],
        )
    if scheme == "tcpstore":
        from railwire.kvcache.router.tcpstore import TCPStoreMembership

        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        if not host or not port:
            raise ConfigurationError(f"a TCPStore needs a host and a port: tcpstore://HOST:PORT, not {url!r}")
        return TCPStoreMembership(host, port, server=server, secret=secret or None, prefix=prefix or "railwire/kv")
    credentials, _, hosts = hosts.rpartition("@")
    if scheme in ("etcd", "etcds") and hosts:
        from railwire.kvcache.router.etcd import EtcdMembership

        user, colon, password = credentials.partition(":")
        return EtcdMembership(
            [f"{'https' if scheme == 'etcds' else 'http'}://{host}" for host in hosts.split(",")],
            user=unquote(user) or os.environ.get("RAILWIRE_ETCD_USER", ""),
            password=unquote(password) if colon else os.environ.get("RAILWIRE_ETCD_PASSWORD", ""),
            secret=secret or None,
            prefix=f"/{prefix or 'railwire/kv'}/",
        )
    raise ConfigurationError(f"membership is tcpstore://HOST:PORT or etcd://HOST:PORT, not {without_password(url)!r}")


def without_password(url: str) -> str:
    """The same registry, but for what everybody may not read."""
    scheme, separator, rest = url.partition("://")
    hosts, slash, prefix = rest.partition("/")
    return f"{scheme}{separator}{hosts.rpartition('@')[2]}{slash}{prefix}"


def etcd_credentials(url: str) -> dict[str, str]:
    """Those that stand in the URL, as environment variables."""
    credentials, at, _ = url.partition("://")[2].partition("/")[0].rpartition("@")
    user, colon, password = credentials.partition(":")
    found = {"RAILWIRE_ETCD_USER": unquote(user)} if at else {}
    return found | ({"RAILWIRE_ETCD_PASSWORD": unquote(password)} if colon else {})


def _local(hosts: str) -> bool:
    """Whether all of these are reached on this machine alone."""
    names = [urlsplit(f"//{host}").hostname or "" for host in hosts.rpartition("@")[2].split(",")]
    return all(name == "localhost" or name == "::1" or name.startswith("127.") for name in names)
