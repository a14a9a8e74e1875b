"""How two engines become peers.

::

    initiator                                     acceptor
      HELLO  (whom I want, who I am, nonce)  -->
                                             <--  CHALLENGE (nonce, proof)
      REQUEST (HELLO, nonce, proof, my halves) -->
                                             <--  ACCEPT (its link halves)

A proof is HMAC-SHA256 under the shared secret over everything said before (an empty secret if none is set), so an
engine with a secret accepts nobody without it, and no link exists before that is shown. Any message may be lost: the
initiator repeats its last one until the answer comes or the time is over, and repeated messages get the same answer.

The acceptor keeps nothing of a HELLO: its nonce is a keyed hash of it and of the time, so that a REQUEST shows by
itself that it answers a challenge of ours, and of lately (as the SYN cookies of RFC 4987 do). So strangers, however
many, leave nothing behind.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from railwire import _native, host, wire
from railwire.errors import (
    AuthenticationError,
    ConfigurationError,
    ConnectError,
    ConnectTimeout,
    DescriptorError,
    StaleAddressError,
)

if TYPE_CHECKING:
    from railwire.peer import Peer

log = logging.getLogger("railwire")

_RESEND_SECONDS = 0.2
_RETRY_SECONDS = 0.001  # while the NIC is not ready to send
_COOKIE_SECONDS = 15  # a challenge can be answered for one to two times this long
_ANSWERS_SECONDS = 60.0  # how long the answer to a REQUEST is kept for repetitions: longer than it can be made anew
_PATIENCE_SECONDS = 0.05  # for the NIC to have room for an answer
_MOST_PATIENT = 256  # answers that wait for room
# Kinds that can link two engines, best first. The first is for one host alone.
_PREFERENCE = ("shm", "verbs", "efa", "efa-direct", "cxi", "verbs-ofi", "tcp", "sim", "libfabric-shm", "libfabric-tcp")

Pair = tuple[int, int]


def plan_pairs(ours: wire.Address, theirs: wire.Address, without: frozenset[str] = frozenset()) -> list[Pair]:
    """Which of our NICs is linked with which of theirs: all NICs of the best kind both sides have, round robin. If one
    of these refuses some memory (a GPU's), the pairs of the best kind that takes all of it follow.
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

    pairs: list[Pair] = []
    for kind in sorted(common, key=rank):
        own = [i for i, nic in enumerate(ours.nics) if nic.kind == kind]
        other = [i for i, nic in enumerate(theirs.nics) if nic.kind == kind]
        nics = [*(ours.nics[i] for i in own), *(theirs.nics[i] for i in other)]
        # Over tcp a side's own memory is all that its NIC has to take: whoever has no GPU has host memory alone.
        takes_all = (any if kind == "tcp" else all)(nic.takes_all_memory for nic in nics)
        if pairs and not takes_all:
            continue
        links = max(nic.links for nic in nics)
        count = max(len(own), len(other))
        pairs += [(own[k % len(own)], other[k % len(other)]) for k in range(count) for _ in range(links)]
        if takes_all:
            break
    return pairs[:64]


@dataclass
class _Outgoing:
    """A connect() under way."""

    target: wire.Address
    pairs: list[Pair]
    hello: wire.Hello
    frame: bytes
    peer: _native.Peer | None = None
    links: tuple[wire.LinkHalf, ...] = ()
    made: Peer | None = None
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)


class _Outbox:
    """Answers that the NIC had no room for, tried again for a moment by a thread of their own: the thread that takes
    the frames in must not stand still for a stranger's sake."""

    def __init__(self, send: Callable[[int, bytes, bytes], bool]) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._waiting: deque[tuple[float, int, bytes, bytes]] = deque()
        self._runs = False

    def send(self, nic: int, control: bytes, frame: bytes) -> None:
        """Now if it can be, else a little later; dropped if there is no room soon, or too many wait for some."""
        if self._send(nic, control, frame):
            return
        with self._lock:
            if len(self._waiting) >= _MOST_PATIENT:
                return  # whoever asked asks again
            self._waiting.append((time.monotonic() + _PATIENCE_SECONDS, nic, control, frame))
            if self._runs:
                return
            self._runs = True
        threading.Thread(target=self._run, name="railwire-answers", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(_RETRY_SECONDS)
            with self._lock:
                waiting, self._waiting = self._waiting, deque()
            now = time.monotonic()
            left = [item for item in waiting if not self._send(*item[1:]) and item[0] > now]
            with self._lock:
                self._waiting.extendleft(reversed(left))
                if not self._waiting:
                    self._runs = False
                    return


class Connector:
    """Makes the connections of one engine, in both directions."""

    def __init__(
        self,
        native: _native.Engine,
        address: wire.Address,
        secret: bytes,
        new_peer: Callable[[_native.Peer, wire.Address, list[Pair], bool], Peer],
    ) -> None:
        self._native = native
        self._address = address
        self._secret = secret
        self._new_peer = new_peer
        self._lock = threading.RLock()
        self._outgoing: dict[int, _Outgoing] = {}
        self._cookie_key = secrets.token_bytes(32)
        self._answers: dict[int, tuple[float, bytes]] = {}  # by connection, oldest first: when, and the ACCEPT
        self._outbox = _Outbox(self._send)

    # ---- initiator ---------------------------------------------------------------------------------------------------
    def connect(self, target: wire.Address, timeout: float) -> Peer:
        """Blocks until the connection stands; the peer that it returns may be lost again already.

        Raises:
            ConnectError and its kin, ConfigurationError.
        """
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
                    with self._lock:  # what is being done for it just now is done, or never will be
                        if pending.done.is_set():
                            break
                        self._outgoing.pop(connection, None)
                    raise ConnectTimeout(
                        f"{target.name} at {', '.join(nic.name for nic in target.nics)} did not answer within "
                        f"{timeout:g} s: is it running, and reachable from {self._address.nics[pairs[0][0]].name}?"
                    )
                own, other = pairs[attempt % len(pairs)]
                try:
                    taken = self._native.send_handshake(own, target.nics[other].control, pending.frame)
                    refusals = 0
                except _native.NativeError as error:
                    # Our own NIC cannot reach that address at all. If none of them can, waiting changes nothing, and
                    # where shm cannot, no link of it will stand.
                    taken, refusals = True, refusals + 1
                    if refusals >= len(pairs) or self._address.nics[own].kind == "shm":
                        pairs = pending.pairs = self._instead_of_shm(target, pairs, error)
                        refusals = 0
                    attempt += 1
                    continue
                pending.done.wait(min(left, _RESEND_SECONDS if taken else _RETRY_SECONDS))
                attempt += 1
            if pending.error is not None:
                raise pending.error
            assert pending.made is not None
            return pending.made
        except BaseException:
            with self._lock:
                self._outgoing.pop(connection, None)
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
        if not hmac.compare_digest(message.proof, self._proof(b"acceptor", pending.hello, message.nonce)):
            if pending.peer is not None:
                return  # not of the engine that has been asked for links
            text = "the two engines have different secrets"
            self._refuse(0, pending.target, pending.pairs, message.connection, "authentication", text)
            pending.error = AuthenticationError(f"{pending.target.name}: {text}")
            pending.done.set()
            return
        if pending.peer is None:
            pending.peer, pending.made = self._create(message.connection, True, pending.target, pending.pairs)
            pending.links = self._halves(pending.peer, pending.pairs)
        # Also to a second challenge: our answer to the first came too late.
        proof = self._proof(b"initiator", pending.hello, message.nonce)
        request = wire.Request(message.connection, pending.hello, message.nonce, proof, pending.links)
        pending.frame = wire.encode(request)
        own, other = pending.pairs[0]
        self._outbox.send(own, pending.target.nics[other].control, pending.frame)

    def _accepted(self, pending: _Outgoing, message: wire.Accept) -> None:
        if pending.peer is None or pending.done.is_set():
            return
        if [(half.other_nic, half.own_nic) for half in message.links] != pending.pairs:
            raise DescriptorError(f"{pending.target.name} accepts other links than were offered")
        self._activate(pending.peer, message.links, pending.target)
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
        pairs = self._check_hello(nic, message)
        if pairs is None:
            return
        nonce = self._cookie(message)
        proof = self._proof(b"acceptor", message, nonce)
        self._reply(nic, message.source, wire.encode(wire.Challenge(message.connection, nonce, proof)))

    def _check_hello(self, nic: int, message: wire.Hello) -> list[Pair] | None:
        """The pairs of NICs; None if it has been refused."""
        try:
            if message.version != wire.VERSION:
                raise DescriptorError(f"protocol version {message.version} instead of {wire.VERSION}")
            if problem := host.files_problem(self._address.name):
                raise ConfigurationError(problem)
            pairs = plan_pairs(self._address, message.source)
        except (DescriptorError, ConfigurationError) as error:
            self._refuse(nic, message.source, None, message.connection, "incompatible", str(error))
            return None
        if message.target != self._address.incarnation:
            text = (
                f"address of incarnation {message.target.hex()[:8]}, but {self._address.name} is now "
                f"{self._address.incarnation.hex()[:8]}: the process has restarted, get its new address"
            )
            self._refuse(nic, message.source, pairs, message.connection, "stale_address", text)
            return None
        return pairs

    def _cookie(self, hello: wire.Hello, ago: int = 0) -> bytes:
        when = int(time.monotonic() / _COOKIE_SECONDS) - ago
        said = when.to_bytes(8, "little", signed=True) + wire.encode(hello)
        return hmac.new(self._cookie_key, said, hashlib.sha256).digest()[:16]

    def _request(self, nic: int, message: wire.Request) -> None:
        hello, source = message.hello, message.hello.source
        if hello.connection != message.connection or self._check_hello(nic, hello) is None:
            return
        if not any(hmac.compare_digest(message.nonce, self._cookie(hello, ago)) for ago in (0, 1)):
            self._hello(nic, hello)  # it answers a challenge of long ago, or none of ours
            return
        if not hmac.compare_digest(message.proof, self._proof(b"initiator", hello, message.nonce)):
            text = "the two engines have different secrets"
            self._refuse(nic, source, None, message.connection, "authentication", text)
            return
        self._forget_old_answers()
        if (known := self._answers.get(message.connection)) is not None:
            self._reply(nic, source, known[1])
            return
        pairs = [(half.other_nic, half.own_nic) for half in message.links]
        try:
            for own, other in pairs:
                if own >= len(self._address.nics) or other >= len(source.nics):
                    raise DescriptorError("a link between NICs that do not exist")
                if self._address.nics[own].kind != source.nics[other].kind:
                    raise DescriptorError("a link between NICs of different kinds")
            peer, _ = self._create(message.connection, False, source, pairs)
            try:
                halves = self._halves(peer, pairs)
                self._activate(peer, message.links, source)
            except Exception:
                self._native.abandon_peer(peer, "the connection could not be set up")
                raise
        except (DescriptorError, _native.NativeError, OverflowError, TypeError, ValueError) as error:
            self._refuse(nic, source, None, message.connection, "incompatible", str(error))
            return
        answer = wire.encode(wire.Accept(message.connection, halves))
        self._answers[message.connection] = (time.monotonic(), answer)
        self._reply(nic, source, answer)

    def _forget_old_answers(self) -> None:
        limit = time.monotonic() - _ANSWERS_SECONDS
        while self._answers:
            connection, (since, _) = next(iter(self._answers.items()))
            if since > limit:
                return
            del self._answers[connection]

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

    def _create(
        self, connection: int, initiator: bool, other_side: wire.Address, pairs: list[Pair]
    ) -> tuple[_native.Peer, Peer]:
        """A peer that is being connected. It is known to the engine before anything can come of it."""
        plan = [(own, other, other_side.nics[other].control) for own, other in pairs]
        native = self._native.create_peer(connection, initiator, other_side.name, plan)
        try:
            if other_side.host == self._address.host:
                self._native.watch_process(native, other_side.pid, other_side.pid_start)
            return native, self._new_peer(native, other_side, pairs, initiator)
        except BaseException:
            self._native.abandon_peer(native, "the connection could not be set up")
            raise

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
            self._outbox.send(pairs[0][0], to.nics[pairs[0][1]].control, frame)
        else:
            self._reply(nic, to, frame)

    def _reply(self, nic: int, to: wire.Address, frame: bytes) -> None:
        kind = self._address.nics[nic].kind
        same = [i for i, other in enumerate(to.nics) if other.kind == kind]
        if same:
            self._outbox.send(nic, to.nics[same[nic % len(same)] if len(same) > 1 else same[0]].control, frame)

    def _send(self, nic: int, control: bytes, frame: bytes) -> bool:
        try:
            return self._native.send_handshake(nic, control, frame)
        except _native.NativeError as error:
            log.debug("railwire: cannot send a handshake frame: %s", error)
            return True
