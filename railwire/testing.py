"""A network in memory that misbehaves on purpose, for tests of Railwire and of what is built on it.

::

    with SimulatedFabric(seed=7, reorder=True, max_delay_us=200) as fabric:
        a = TransferEngine(nics=[fabric.nic("a0"), fabric.nic("a1")])
        b = TransferEngine(nics=[fabric.nic("b0")])
        ...
        fabric.kill("a1")
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

from railwire import _native

_numbers = itertools.count(1)

Fault = Literal["remote_access", "unreachable", "local", "other"]


class SimulatedFabric:
    """Joins simulated NICs of one process.

    Args:
        name: unique in the process; made up if None.
        seed: of all randomness. The engines' threads still run as they like, so a seed makes a run alike, not equal.
        reorder: everything (bytes, immediates, completions, messages) may overtake everything else.
        max_delay_us: each event takes a random time up to this many microseconds.
        write_failure_rate: share of work requests that fail; a random part of their bytes lands, no immediate.
        link_break_rate: share of work requests at which the connection breaks.
        message_loss_rate: share of control messages that are lost (and reported lost to the sender).
        completion_proves_landing: False: a work request completes when handed over and lands later, as on tcp.
        closing_fences: False: closing a link does not keep the peer out, as on shm.
        closing_quiets: False: the peer copies out of our memory when it lands, closed or not, as on libfabric's shm.
        kind: of its NICs; NICs of different kinds are rails of their own.
        refuse_above: memory of more bytes is not registered; 0: all is.
        links_per_pair: links that two NICs make.
        resumable: as RC queue pairs: links land in order, any error breaks them, both ends count what landed, and the
            engine fails over and makes them anew. Not with reorder.
        discard: work requests complete at once and go nowhere: a NIC of unlimited speed.
        max_write_bytes: longest single work request.
        link_depth: work requests a link may have outstanding.
        max_message_bytes: longest control message, about 40 bytes of which are the engine's own.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        seed: int = 0,
        reorder: bool = False,
        max_delay_us: float = 0.0,
        write_failure_rate: float = 0.0,
        link_break_rate: float = 0.0,
        message_loss_rate: float = 0.0,
        completion_proves_landing: bool = True,
        closing_fences: bool = True,
        closing_quiets: bool = True,
        kind: str = "sim",
        refuse_above: int = 0,
        links_per_pair: int = 1,
        resumable: bool = False,
        discard: bool = False,
        max_write_bytes: int = 1 << 40,
        link_depth: int = 256,
        max_message_bytes: int = 64 * 1024,
    ) -> None:
        self.name = name or f"fabric{next(_numbers)}"
        self._settings = _native.SimulatedSettings()
        self._apply(
            {
                "seed": seed,
                "reorder": reorder,
                "max_delay_us": max_delay_us,
                "write_failure_rate": write_failure_rate,
                "link_break_rate": link_break_rate,
                "message_loss_rate": message_loss_rate,
                "completion_proves_landing": completion_proves_landing,
                "closing_fences": closing_fences,
                "closing_quiets": closing_quiets,
                "kind": kind,
                "refuse_above": refuse_above,
                "links_per_pair": links_per_pair,
                "resumable": resumable,
                "discard": discard,
                "max_write_bytes": max_write_bytes,
                "link_depth": link_depth,
                "max_message_bytes": max_message_bytes,
            }
        )
        self._native = _native.SimulatedFabric(self.name, self._settings)

    def _apply(self, settings: dict[str, Any]) -> None:
        for key, value in settings.items():
            if not hasattr(self._settings, key):
                raise TypeError(f"no such setting: {key}")
            setattr(self._settings, key, value)

    def nic(self, name: str) -> str:
        """The name by which an engine opens a NIC on this fabric."""
        return f"sim://{self.name}/{name}"

    def set(self, **settings: Any) -> None:
        """Changes settings from now on. Link depth and the like hold for NICs made later."""
        self._apply(settings)
        self._native.configure(self._settings)

    def kill(self, nic: str) -> None:
        """The NIC dies: its connections break, and messages to it are lost."""
        self._native.kill(nic)

    def break_links(self, nic: str) -> None:
        """All connections of the NIC break; new ones can be made."""
        self._native.break_links(nic)

    def freeze(self, nic: str) -> None:
        """As if its process were stopped: nothing goes in or out, nothing breaks."""
        self._native.freeze(nic, True)

    def thaw(self, nic: str) -> None:
        """Undoes freeze()."""
        self._native.freeze(nic, False)

    def partition(self, a: str, b: str) -> None:
        """Nothing passes between two NICs; what is on its way waits."""
        self._native.partition(a, b, True)

    def heal(self, a: str, b: str) -> None:
        """Undoes partition()."""
        self._native.partition(a, b, False)

    def fail_next(self, nic: str, count: int = 1, status: Fault = "other") -> None:
        """The next ``count`` work requests posted on the NIC fail with this status; ``unreachable`` breaks the link."""
        self._native.fail_next(nic, count, status)

    def hold(self) -> None:
        """Nothing is delivered from now on, but by deliver_one()."""
        self._native.hold(True)

    def release(self) -> None:
        """Undoes hold()."""
        self._native.hold(False)

    def deliver_one(self) -> bool:
        """While held: delivers one thing, chosen at random. False if there is nothing."""
        return self._native.deliver_one()

    def audit(self) -> dict[str, int]:
        """What happened on the wire: posted, landed, failed, refused_after_close, refused_access, ..."""
        return dict(self._native.audit())

    def close(self) -> None:
        """Forgets the name; NICs that are open keep working among themselves."""
        self._native.remove()

    def __enter__(self) -> SimulatedFabric:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SimulatedFabric {self.name} seed={self._settings.seed}>"
