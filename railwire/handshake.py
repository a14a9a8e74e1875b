"""How two engines become peers.

::

    initiator                                     acceptor
      HELLO  (whom I want, who I am, nonce)  -->
                                             <--  CHALLENGE (nonce, proof)
      REQUEST (proof, my link halves)        -->
                                             <--  ACCEPT (its link halves)

A proof is HMAC-SHA256 under the shared secret over everything said before (an empty secret if none is set), so an
engine with a secret accepts nobody without it, and no link exists before that is shown. Any message may be lost: the
initiator repeats its last one until the answer comes or the time is over, and repeated messages get the same answer.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from railwire import _native, host, wire
from railwire.errors import (
    AuthenticationError,
    ConfigurationError,
    ConnectError,
    ConnectTimeout,
    DescriptorError,
    StaleAddressError,
)

log = logging.getLogger("railwire")

_RESEND_SECONDS = 0.2
_RETRY_SECONDS = 0.001  # while the NIC is not ready to send
_MOST_PENDING = 1024  # connections that strangers may have half open
_PENDING_SECONDS = 30.0
# Kinds that can link two engines, best first. The first is for one host alone.
_PREFERENCE = ("shm", "verbs", "efa", "efa-direct", "cxi", "verbs-ofi", "tcp", "sim", "libfabric-shm", "libfabric-tcp")

Pair = tuple[int, int]


def plan_pairs(ours: wire.Address, theirs: wire.Address, without: frozenset[str] = frozenset()) -> list[Pair]:
    """Which of our NICs is linked with which of theirs: all NICs of the best kind both sides have, round robin.
    ``without``: kinds that have been tried in vain.

    Raises:
        ConfigurationError: there is no such kind.
    """
    common = ({nic.kind for nic in ours.nics} & {nic.kind for nic in theirs.nics}) - without
    same_host = ours.host == theirs.host
    same_process = same_host and ours.pid == theirs.pid
    if same_process and common == {"libfabric-shm"}:
        # libfabric's shm shares one mapping among the engines of a process, and crashes when one of them closes first.
        raise ConfigurationError(
            f"{ours.name} and {theirs.name} are in one process, where libfabric:shm is not "
            "used: give both a tcp NIC, too"
        )
    if not same_host:
        common.discard("shm")
    if not same_host or same_process:
        common.discard("libfabric-shm")
    if not common:
        raise ConfigurationError(
            f"no NIC in common: {ours.name} has {[nic.name for nic in ours.nics]}, "
            f"{theirs.name} has {[nic.name for nic in theirs.nics]}"
        )

    def rank(kind: str) -> tuple[int, str]:
        return (_PREFERENCE.index(kind) if kind in _PREFERENCE else len(_PREFERENCE), kind)

    best = min(common, key=rank)
    own = [i for i, nic in enumerate(ours.nics) if nic.kind == best]
    other = [i for i, nic in enumerate(theirs.nics) if nic.kind == best]
    return [(own[k % len(own)], other[k % len(other)]) for k in range(max(len(own), len(other)))]


@dataclass
class _Outgoing:
    """A connect() under way."""

    target: wire.Address
    pairs: list[Pair]
    hello: wire.Hello
    frame: bytes
    peer: _native.Peer | None = None
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)


@dataclass
class _Incoming:
    """Somebody else's connect()."""

    hello: wire.Hello
    nonce: bytes
    answer: bytes
    since: float
    accepted: bool = False


class Connector:
    """Makes the connections of one engine, in both directions."""

    def __init__(
        self,
        native: _native.Engine,
        address: wire.Address,
        secret: bytes,
        on_peer: Callable[[_native.Peer, wire.Address, list[Pair], bool], None],
    ) -> None:
        self._native = native
        self._address = address
        self._secret = secret
        self._on_peer = on_peer
        self._lock = threading.RLock()
        self._outgoing: dict[int, _Outgoing] = {}
        self._incoming: dict[int, _Incoming] = {}

    # ---- initiator ---------------------------------------------------------------------------------------------------
    def connect(self, target: wire.Address, timeout: float) -> _native.Peer:
        """Blocks until the connection stands. Raises ConnectError and its kin, ConfigurationError."""
        pairs = plan_pairs(self._address, target)
        connection = secrets.randbits(64)
        hello = wire.Hello(wire.VERSION, connection, target.incarnation, self._address, secrets.token_bytes(16))
        pending = _Outgoing(target, pairs, hello, wire.encode(hello))
        with self._lock:
            self._outgoing[connection] = pending
        deadline = time.monotonic() + timeout
        attempt = 0
        refusals = 0
        try:
            while not pending.done.is_set():
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ConnectTimeout(
                        f"{target.name} at {', '.join(nic.name for nic in target.nics)} did not answer within "
                        f"{timeout:g} s: is it running, and reachable from {self._address.nics[pairs[0][0]].name}?"
                    )
                own, other = pairs[attempt % len(pairs)]
                try:
                    taken = self._native.send_handshake(own, target.nics[other].control, pending.frame)
                    refusals = 0
                except _native.NativeError as error:
                    # Our own NIC cannot reach that address at all. If none of them can, waiting changes nothing.
                    taken, refusals = True, refusals + 1
                    if refusals >= len(pairs):
                        pairs = pending.pairs = self._instead_of_shm(target, pairs, error)
                        refusals = 0
                    attempt += 1
                    continue
                pending.done.wait(min(left, _RESEND_SECONDS if taken else _RETRY_SECONDS))
                attempt += 1
            if pending.error is not None:
                raise pending.error
            assert pending.peer is not None
            return pending.peer
        except BaseException:
            if pending.peer is not None:
                self._native.abandon_peer(pending.peer, "the connection was not completed")
            raise
        finally:
            with self._lock:
                self._outgoing.pop(connection, None)

    def _instead_of_shm(self, target: wire.Address, pairs: list[Pair], error: Exception) -> list[Pair]:
        """Pairs of another kind where shm does not reach a peer of this host (containers, a ptrace policy)."""
        if self._address.nics[pairs[0][0]].kind == "shm":
            try:
                others = plan_pairs(self._address, target, frozenset({"shm"}))
            except ConfigurationError:
                pass
            else:
                names = ", ".join(self._address.nics[own].name for own, _ in others)
                log.warning("railwire: %s is on this host, but shm does not reach it (%s); using %s instead",
                            target.name, error, names)  # fmt: skip
                return others
        raise ConnectError(f"{target.name}: {error}") from error

    def _challenged(self, pending: _Outgoing, message: wire.Challenge) -> None:
        if pending.peer is not None:
            return  # a repetition
        if not hmac.compare_digest(message.proof, self._proof(b"acceptor", pending.hello, message.nonce)):
            text = "the two engines have different secrets"
            self._refuse(0, pending.target, pending.pairs, message.connection, "authentication", text)
            pending.error = AuthenticationError(f"{pending.target.name}: {text}")
            pending.done.set()
            return
        plan = [(own, other, pending.target.nics[other].control) for own, other in pending.pairs]
        pending.peer = self._native.create_peer(message.connection, True, pending.target.name, plan)
        links = self._halves(pending.peer, pending.pairs)
        proof = self._proof(b"initiator", pending.hello, message.nonce)
        pending.frame = wire.encode(wire.Request(message.connection, proof, links))
        own, other = pending.pairs[0]
        self._send_patiently(own, pending.target.nics[other].control, pending.frame)

    def _accepted(self, pending: _Outgoing, message: wire.Accept) -> None:
        if pending.peer is None or pending.done.is_set():
            return
        if [(half.other_nic, half.own_nic) for half in message.links] != pending.pairs:
            raise DescriptorError(f"{pending.target.name} accepts other links than were offered")
        self._activate(pending.peer, message.links, pending.target)
        self._on_peer(pending.peer, pending.target, pending.pairs, True)
        pending.done.set()

    def _refused(self, pending: _Outgoing, message: wire.Refuse) -> None:
        kinds: dict[str, type[Exception]] = {
            "stale_address": StaleAddressError,
            "authentication": AuthenticationError,
        }
        pending.error = kinds.get(message.reason, ConnectError)(f"{pending.target.name} refuses: {message.text}")
        pending.done.set()

    # ---- acceptor ----------------------------------------------------------------------------------------------------
    def _hello(self, nic: int, message: wire.Hello) -> None:
        known = self._incoming.get(message.connection)
        if known is not None:
            if known.hello == message and not known.accepted:
                self._reply(nic, known.hello.source, known.answer)
            return
        try:
            if message.version != wire.VERSION:
                raise DescriptorError(f"protocol version {message.version} instead of {wire.VERSION}")
            if problem := host.files_problem(self._address.name):
                raise ConfigurationError(problem)
            pairs = plan_pairs(self._address, message.source)
        except (DescriptorError, ConfigurationError) as error:
            self._refuse(nic, message.source, None, message.connection, "incompatible", str(error))
            return
        if message.target != self._address.incarnation:
            text = (
                f"address of incarnation {message.target.hex()[:8]}, but {self._address.name} is now "
                f"{self._address.incarnation.hex()[:8]}: the process has restarted, get its new address"
            )
            self._refuse(nic, message.source, pairs, message.connection, "stale_address", text)
            return
        self._forget_old()
        if len(self._incoming) >= _MOST_PENDING:
            log.warning("railwire: too many half-open connections; dropping one from %s", message.source.name)
            return
        nonce = secrets.token_bytes(16)
        proof = self._proof(b"acceptor", message, nonce)
        answer = wire.encode(wire.Challenge(message.connection, nonce, proof))
        self._incoming[message.connection] = _Incoming(message, nonce, answer, time.monotonic())
        self._reply(nic, message.source, answer)

    def _request(self, nic: int, message: wire.Request) -> None:
        pending = self._incoming.get(message.connection)
        if pending is None:
            return
        if pending.accepted:
            self._reply(nic, pending.hello.source, pending.answer)
            return
        source = pending.hello.source
        if not hmac.compare_digest(message.proof, self._proof(b"initiator", pending.hello, pending.nonce)):
            text = "the two engines have different secrets"
            self._refuse(nic, source, None, message.connection, "authentication", text)
            del self._incoming[message.connection]
            return
        pairs = [(half.other_nic, half.own_nic) for half in message.links]
        try:
            for own, other in pairs:
                if own >= len(self._address.nics) or other >= len(source.nics):
                    raise DescriptorError("a link between NICs that do not exist")
                if self._address.nics[own].kind != source.nics[other].kind:
                    raise DescriptorError("a link between NICs of different kinds")
            plan = [(own, other, source.nics[other].control) for own, other in pairs]
            peer = self._native.create_peer(message.connection, False, source.name, plan)
            try:
                halves = self._halves(peer, pairs)
                self._activate(peer, message.links, source)
            except Exception:
                self._native.abandon_peer(peer, "the connection could not be set up")
                raise
        except (DescriptorError, _native.NativeError, OverflowError, TypeError, ValueError) as error:
            self._refuse(nic, source, None, message.connection, "incompatible", str(error))
            del self._incoming[message.connection]
            return
        pending.accepted = True
        pending.answer = wire.encode(wire.Accept(message.connection, halves))
        self._on_peer(peer, source, pairs, False)
        self._reply(nic, source, pending.answer)

    def _forget_old(self) -> None:
        limit = time.monotonic() - _PENDING_SECONDS
        for connection in [c for c, pending in self._incoming.items() if pending.since < limit]:
            del self._incoming[connection]

    # ---- both --------------------------------------------------------------------------------------------------------
    def on_frame(self, nic: int, frame: bytes) -> None:
        """One handshake frame off NIC ``nic``; whatever it holds, nothing is raised."""
        try:
            message = wire.decode_handshake(frame)
        except DescriptorError as error:
            log.debug("railwire: dropped a handshake frame: %s", error)
            return
        with self._lock:
            if isinstance(message, wire.Hello):
                self._hello(nic, message)
                return
            if isinstance(message, wire.Request):
                self._request(nic, message)
                return
            pending = self._outgoing.get(message.connection)
            if pending is None:
                return
            try:
                if isinstance(message, wire.Challenge):
                    self._challenged(pending, message)
                elif isinstance(message, wire.Accept):
                    self._accepted(pending, message)
                else:
                    self._refused(pending, message)
            except (DescriptorError, _native.NativeError, OverflowError, TypeError, ValueError) as error:
                pending.error = ConnectError(f"{pending.target.name}: {error}")
                pending.done.set()

    def _proof(self, role: bytes, hello: wire.Hello, nonce: bytes) -> bytes:
        said = b"railwire-1|" + role + b"|" + nonce + wire.encode(hello)
        return hmac.new(self._secret, said, hashlib.sha256).digest()

    def _halves(self, peer: _native.Peer, pairs: list[Pair]) -> tuple[wire.LinkHalf, ...]:
        halves = self._native.link_halves(peer)
        return tuple(
            wire.LinkHalf(own, other, address, pad) for (own, other), (address, pad) in zip(pairs, halves, strict=True)
        )

    def _activate(self, peer: _native.Peer, links: tuple[wire.LinkHalf, ...], source: wire.Address) -> None:
        same_host = source.host == self._address.host
        self._native.activate_peer(
            peer,
            [(half.address, half.pad) for half in links],
            source.pid if same_host else 0,
            source.pid_start if same_host else 0,
        )

    def _refuse(
        self, nic: int, to: wire.Address, pairs: list[Pair] | None, connection: int, reason: str, text: str
    ) -> None:
        frame = wire.encode(wire.Refuse(connection, reason, text[:500]))
        if pairs is not None:
            self._send_patiently(pairs[0][0], to.nics[pairs[0][1]].control, frame)
        else:
            self._reply(nic, to, frame)

    def _reply(self, nic: int, to: wire.Address, frame: bytes) -> None:
        kind = self._address.nics[nic].kind
        same = [i for i, other in enumerate(to.nics) if other.kind == kind]
        if same:
            self._send_patiently(nic, to.nics[same[nic % len(same)] if len(same) > 1 else same[0]].control, frame)

    def _send(self, nic: int, control: bytes, frame: bytes) -> bool:
        try:
            return self._native.send_handshake(nic, control, frame)
        except _native.NativeError as error:
            log.debug("railwire: cannot send a handshake frame: %s", error)
            return True

    def _send_patiently(self, nic: int, control: bytes, frame: bytes) -> None:
        """For answers: nobody repeats them before the other side asks again."""
        for _ in range(50):
            if self._send(nic, control, frame):
                return
            time.sleep(_RETRY_SECONDS)
