"""What ``kv_connector_extra_config`` may say, and what travels in a request's ``kv_transfer_params``."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from railwire.errors import ConfigurationError


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``kv_connector_extra_config`` of the RailwireConnector.

    Attributes:
        nics: of the transfer engine, see docs/nics.md; empty: those near the device.
        secret: shared by all instances; peers that do not know it get nowhere. Default: the environment variable
            RAILWIRE_SECRET, which is better: everybody on the host can read a command line.
        liveness: seconds of silence after which the other side of a transfer counts as dead.
        ticket_timeout: seconds that is waited for what the other side has not announced: a prefill for its decoder, a
            ticket for its prefill, a decoder for the prefiller's word that it has the request. What stands in a queue
            has been announced: a prefill's queue is waited for as long as both instances live, a decoder's ...
        queue_timeout: ... for so many seconds at most, since the prefill holds its blocks meanwhile: instances whose
            blocks are all held by requests in each other's queues would wait for ever.
        transfer_timeout: seconds until a transfer fails by itself, the time in the prefiller's queue included. It
            ends long before, with its pages, the prefiller's word, or the life of either side; this is for a prefiller
            whose engine stands still while its process lives.
        checksum: have the decoder verify every page before it uses them.
        fingerprint: anything that tells instances with other weights apart (a revision, say); equal ones exchange KV.
        cpus: cores that the transfer engine's thread may run on; empty: all of the machine, not only those that vLLM
            has bound its own threads to.
        membership: registry to join, such as ``tcpstore://127.0.0.1:29600``; empty: none.
        url: under which the router reaches this instance's OpenAI server; needed with ``membership``.
        drain_file: while this file exists the instance is given no new requests; empty: none.
        ttl: seconds after which an instance that says nothing is no member any more.
        trace: file to which each push adds its timeline, one JSON object per line; empty: none.
    """

    nics: tuple[str, ...] = ()
    secret: str = ""
    liveness: float = 5.0
    ticket_timeout: float = 30.0
    queue_timeout: float = 480.0
    transfer_timeout: float = 3600.0
    checksum: bool = False
    fingerprint: str = ""
    cpus: tuple[int, ...] = ()
    membership: str = ""
    url: str = ""
    drain_file: str = ""
    ttl: float = 5.0
    trace: str = ""

    def __post_init__(self) -> None:
        for name in ("liveness", "ticket_timeout", "queue_timeout", "transfer_timeout", "ttl"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive")
        if self.membership and not self.url.startswith(("http://", "https://")):
            raise ValueError(
                "membership needs url: where the router reaches this instance, such as http://10.0.0.7:8000"
            )


def parse_options(extra_config: dict[str, Any]) -> Options:
    """Raises ConfigurationError, naming what is wrong."""
    try:
        return msgspec.convert({"secret": os.environ.get("RAILWIRE_SECRET", ""), **extra_config}, Options, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"kv_connector_extra_config of the RailwireConnector: {error}") from error


class Prefiller(msgspec.Struct, frozen=True):
    """A prefill instance as decoders need it: id of its life, descriptors of all ranks (base64 in JSON)."""

    instance: str
    ranks: tuple[bytes, ...]


class PrefillParams(msgspec.Struct, frozen=True):
    """``kv_transfer_params`` of the prefill leg: push the KV to whoever comes with a ticket for ``transfer_id``."""

    do_remote_decode: bool
    transfer_id: str = ""


class DecodeParams(msgspec.Struct, frozen=True):
    """``kv_transfer_params`` of the decode leg: get the KV from ``prefiller``."""

    do_remote_prefill: bool
    transfer_id: str
    prefiller: Prefiller


def prefill_params(params: dict[str, Any] | None, request_id: str) -> PrefillParams | None:
    """None: the request is none of a prefill leg. ``transfer_id`` is the request's own id where none is given.

    Raises:
        ValueError: parameters that cannot be.
    """
    if not params or not params.get("do_remote_decode"):
        return None
    wanted = msgspec.convert(params, PrefillParams)
    return wanted if wanted.transfer_id else msgspec.structs.replace(wanted, transfer_id=request_id)


def decode_params(params: dict[str, Any] | None) -> DecodeParams | None:
    """None: the request is none of a decode leg. Raises ValueError for parameters that cannot be."""
    if not params or not params.get("do_remote_prefill"):
        return None
    wanted = msgspec.convert(params, DecodeParams)
    if not 1 <= len(wanted.transfer_id) <= 512 or not wanted.prefiller.ranks:
        raise ValueError("a transfer_id of 1 to 512 characters and at least one rank of the prefiller are needed")
    return wanted
