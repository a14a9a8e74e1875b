"""What the processes are told: by flags, or by environment variables RAILWIRE_*."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from railwire import runner as runners
from railwire.errors import ConfigurationError
from railwire.runner import Runner


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
