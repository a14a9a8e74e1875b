"""checkpoint-engine's ``P2PStore`` over Railwire instead of Mooncake: the same methods, any NIC.

    import railwire.integrations.checkpoint_engine as twin
    twin.install()  # before ParameterServer is made

An address is the engine's, in base64. A reader asks the owner once which memory it has registered, and again when it
meets a pointer that it does not know. For checkpoint-engine 0.4.
"""

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Sequence
from typing import Any

import msgspec

from railwire.engine import TransferEngine
from railwire.errors import DescriptorError, RailwireError
from railwire.memory import MemoryRegion, RemoteRegion
from railwire.peer import Peer

_ASK, _TELL = b"RWP1?", b"RWP1!"
_TIMEOUT = 60.0
_MAX_REGIONS = 1 << 16


class _Area(msgspec.Struct, frozen=True, array_like=True):
    """Registered memory of a rank."""

    begin: int
    nbytes: int
    descriptor: bytes


class P2PStore:
    """Registers named tensors, which others read by address.

    Args:
        device_manager: checkpoint-engine's; only its device module is asked, for the GPU that RANK has. None: host
            memory.
        nics: as for :class:`railwire.TransferEngine`.
        secret: shared by all ranks; default: the environment's RAILWIRE_SECRET.
    """

    def __init__(self, device_manager: Any = None, *, nics: Any = "auto", secret: str | None = None) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        count = int(device_manager.device_module.device_count()) if device_manager is not None else 0
        self.device = f"cuda:{self.rank % count}" if count else "cpu"
        secret = os.environ.get("RAILWIRE_SECRET", "") if secret is None else secret
        self.engine = TransferEngine(self.device, nics, secret=secret)
        self.named_tensors: dict[str, Any] = {}
        self._regions: dict[str, MemoryRegion] = {}
        self._known: dict[bytes, list[_Area]] = {}
        self._answered = threading.Condition()
        self._answers: dict[bytes, int] = {}
        self.engine.on_message(self._on_message)

    @property
    def addr(self) -> str:
        """What others pass as ``target_hostname``."""
        return base64.urlsafe_b64encode(bytes(self.engine.address)).decode()

    def register_named_tensors(self, named_tensors: dict[str, Any]) -> None:
        """Raises ValueError for a name that is registered, and what ``engine.register`` raises; then none is."""
        twice = [name for name in named_tensors if name in self._regions]
        if twice:
            raise ValueError(f"{twice[0]} is registered already")
        made: dict[str, MemoryRegion] = {}
        try:
            for name, tensor in named_tensors.items():
                made[name] = self.engine.register(tensor)
        except BaseException:
            for region in made.values():
                region.close()
            raise
        self._regions |= made
        self.named_tensors |= named_tensors

    def unregister_named_tensors(self, names: list[str]) -> int:
        """Returns how many; nobody reads them any more afterwards. Raises KeyError for a name that is not there."""
        for name in names:
            if name not in self._regions:
                raise KeyError(name)
        for name in names:
            self._regions.pop(name).close()
            del self.named_tensors[name]
        return len(names)

    def batch_transfer_sync_read(
        self, target_hostname: str, buf_ptrs: Sequence[int], remote_ptrs: Sequence[int], lens: Sequence[int]
    ) -> None:
        """Reads ``lens[i]`` bytes at ``remote_ptrs[i]`` of the target to ``buf_ptrs[i]``, which are registered here.

        Raises:
            DescriptorError: memory that is not registered, on either side. TransferError: a read failed.
        """
        if not len(buf_ptrs) == len(remote_ptrs) == len(lens):
            raise ValueError("as many buffers as remote pointers and lengths are needed")
        try:
            address = base64.urlsafe_b64decode(target_hostname.encode())
        except ValueError as error:
            raise DescriptorError(f"{target_hostname!r} is no address of a P2PStore") from error
        peer = self.engine.connect(address)
        mine = [_Area(r.address, r.nbytes, name.encode()) for name, r in self._regions.items()]
        reads = []
        for buffer, remote, nbytes in zip(buf_ptrs, remote_ptrs, lens, strict=True):
            area = _find(mine, buffer, nbytes)
            if area is None:
                raise DescriptorError(f"{nbytes} bytes at {buffer:#x} are not registered here")
            theirs = self._remote(peer, remote, nbytes)
            local = self._regions[area.descriptor.decode()]
            source = RemoteRegion.from_bytes(theirs.descriptor)
            begin, at = remote - theirs.begin, buffer - area.begin
            reads.append((source[begin : begin + nbytes], local[at : at + nbytes]))
        transfers = [self.engine.read(source, into) for source, into in reads]
        for transfer in transfers:
            transfer.wait()

    def close(self) -> None:
        self.engine.close()

    def _remote(self, peer: Peer, pointer: int, nbytes: int) -> _Area:
        area = _find(self._known.get(peer.incarnation, []), pointer, nbytes)
        if area is None:
            self._ask(peer)
            area = _find(self._known.get(peer.incarnation, []), pointer, nbytes)
        if area is None:
            raise DescriptorError(f"peer {peer.name} has not registered {nbytes} bytes at {pointer:#x}")
        return area

    def _ask(self, peer: Peer) -> None:
        with self._answered:
            before = self._answers.get(peer.incarnation, 0)
            self.engine.send(peer, _ASK).wait(_TIMEOUT)
            if not self._answered.wait_for(lambda: self._answers.get(peer.incarnation, 0) > before, _TIMEOUT):
                raise DescriptorError(f"peer {peer.name} does not say which memory it has registered")

    def _on_message(self, peer: Peer, message: bytes) -> None:
        if message == _ASK:
            areas = [_Area(r.address, r.nbytes, bytes(r.descriptor)) for r in list(self._regions.values())]
            for begin in range(0, max(1, len(areas)), 100):  # a message is bounded; the last one says so
                part = areas[begin : begin + 100]
                last = begin + 100 >= len(areas)
                try:
                    self.engine.send(peer, _TELL + msgspec.msgpack.encode((begin == 0, last, part)))
                except RailwireError:
                    return
        elif message.startswith(_TELL):
            try:
                first, last, part = msgspec.msgpack.decode(message[len(_TELL) :], type=tuple[bool, bool, list[_Area]])
            except (msgspec.DecodeError, msgspec.ValidationError):
                return
            with self._answered:
                known = [] if first else self._known.get(peer.incarnation, [])
                self._known[peer.incarnation] = (known + part)[:_MAX_REGIONS]
                if last:
                    self._answers[peer.incarnation] = self._answers.get(peer.incarnation, 0) + 1
                    self._answered.notify_all()


def _find(areas: Sequence[_Area], pointer: int, nbytes: int) -> _Area | None:
    for area in areas:
        if area.begin <= pointer and pointer + nbytes <= area.begin + area.nbytes:
            return area
    return None


def install() -> None:
    """Puts this store where checkpoint-engine looks for its own."""
    import checkpoint_engine.p2p_store
    import checkpoint_engine.ps

    checkpoint_engine.p2p_store.P2PStore = P2PStore
    checkpoint_engine.ps.P2PStore = P2PStore
