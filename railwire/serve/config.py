"""What the processes are told: by flags, or by environment variables RAILWIRE_*."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from railwire import runner as runners
from railwire.errors import ConfigurationError
from railwire.kvcache.router.membership import Membership
from railwire.runner import Runner

log = logging.getLogger("railwire.serve")


@dataclass(frozen=True)
class ListenConfig:
    """Where a process listens, and how it finds the others.

    Attributes:
        port: 0 takes any free one.
        advertise: URL under which others reach this process; default ``http://host:port``, with the machine's default
            address where ``host`` is every address.
        membership: see :func:`open_membership`.
        secret: shared by all workers and routers: with it the workers' engines, and the registry's records, prove
            themselves.
        ttl: seconds after which a process that says nothing is no member any more.
        drain_timeout: seconds that running requests have to end after SIGTERM.
        log_level: of Python's logging.
    """

    membership: str
    secret: str = ""
    host: str = "127.0.0.1"
    port: int = 0
    advertise: str = ""
    ttl: float = 5.0
    drain_timeout: float = 30.0
    log_level: str = "info"


@dataclass(frozen=True)
class WorkerConfig(ListenConfig):
    """A prefill or decode worker.

    Attributes:
        runner, model, options: for ``railwire.runner.create``.
        model_name: what clients call the model; default: ``model``.
        nics: of the engine, see ``TransferEngine``; empty: those near the device.
        device: of the engine.
        liveness: seconds of silence after which the other side of a transfer counts as dead.
        chunk: tokens that a prefill worker computes at a time.
        max_batch: sequences that a decode worker advances at a time.
        max_waiting: requests that may wait, more are turned away.
        block_timeout: seconds that a prefill waits for free blocks once it is its turn. A decode waits for its turn and
            its blocks as long as its request has time.
        ticket_timeout: seconds that is waited for what the other side has not announced: a request for its tickets, a
            ticket for its request, a decoder for the prefiller's word that it has the request.
        checksum: have the decoder verify every page.
    """

    runner: str = "reference"
    model: str = "smollm2"
    options: dict[str, Any] = field(default_factory=dict)
    model_name: str = ""
    nics: tuple[str, ...] = ()
    device: str = "cpu"
    liveness: float = 5.0
    chunk: int = 256
    max_batch: int = 32
    max_waiting: int = 256
    block_timeout: float = 20.0
    ticket_timeout: float = 30.0
    checksum: bool = False


@dataclass(frozen=True)
class RouterConfig(ListenConfig):
    """The router.

    Attributes:
        runner, model, options: whose tokenizer turns text into tokens.
        max_attempts: attempts per request.
        request_timeout: seconds for a request.
        event_timeout: seconds of a decoder's silence.
        host_store: keep the TCPStore of ``tcpstore://`` here.
        resume: continue elsewhere what broke off after its first token.
        max_body: bytes of a client's request.
        max_active: prompts that are worked on at once; more are turned away with 429.
    """

    runner: str = "reference"
    model: str = "smollm2"
    options: dict[str, Any] = field(default_factory=dict)
    max_attempts: int = 4
    request_timeout: float = 600.0
    event_timeout: float = 15.0
    host_store: bool = True
    resume: bool = True
    max_body: int = 8 << 20
    max_active: int = 1024


def create_runner(runner: str, model: str, options: dict[str, Any]) -> Runner:
    """A runner by name. Raises ConfigurationError, with what to do about it."""
    try:
        return runners.create(runner, model=model, **options)
    except (ValueError, TypeError, FileNotFoundError, ModuleNotFoundError) as error:
        raise ConfigurationError(f"runner {runner!r}, model {model!r}: {error}") from error


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


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """``["layers=8", "dtype=float32"]`` as a dict; whole numbers become ints.

    Raises:
        ConfigurationError: an entry without "=".
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ConfigurationError(f"a runner option is NAME=VALUE, not {pair!r}")
        options[key] = int(value) if value.lstrip("-").isdigit() else value
    return options
