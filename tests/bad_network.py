"""A network that misbehaves: two namespaces, a TUN device in each, and a thread that carries packets between them with
delay, loss, reordering, or not at all. As `tc netem`, which not every kernel has, and its moments are ours to choose.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_MTU = 9000
_MOST_WAITING = 4000  # packets a direction, as a router has: what is beyond is lost


class NoNetwork(Exception):
    """Namespaces or TUN devices cannot be made here; the text says why."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


class BadNetwork:
    """``a`` and ``b`` are the namespaces, with the addresses 10.78.0.1 and 10.78.0.2.

    ``delay`` (seconds, each way), ``loss``, ``late`` (shares of the packets that are lost, or held back for another
    delay and so come out of order) and ``cut`` (nothing passes) may be changed at any time.
    """

    ADDRESSES = ("10.78.0.1", "10.78.0.2")

    def __init__(self, seed: int) -> None:
        self.delay, self.loss, self.late, self.cut = 0.0, 0.0, 0.0, False
        self.carried = self.lost = self.reordered = 0
        self._random = random.Random(seed)
        self.names = f"rw{os.getpid()}ta", f"rw{os.getpid()}tb"
        self._fds: list[int] = []
        self._stop = os.eventfd(0)
        self._thread = threading.Thread(target=self._carry, name="bad network", daemon=True)
        try:
            for side, name in enumerate(self.names):
                ip("netns", "add", name)
                device = f"rwt{os.getpid() % 100000}{'ab'[side]}"
                fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
                self._fds.append(fd)
                fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
                ip("link", "set", device, "netns", name)
                ip("-n", name, "link", "set", device, "name", "rw0")
                ip("-n", name, "addr", "add", f"{self.ADDRESSES[side]}/24", "dev", "rw0")
                ip("-n", name, "link", "set", "rw0", "mtu", str(_MTU), "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            self._remove()
            why = getattr(error, "stderr", b"") or str(error).encode()
            raise NoNetwork(why.decode().strip()) from None
        self._thread.start()

    def prefix(self, side: int) -> list[str]:
        """What to put before a command of that side."""
        return ["ip", "netns", "exec", self.names[side]]

    def down(self, side: int) -> None:
        """The interface is taken down: its routes go, too."""
        ip("-n", self.names[side], "link", "set", "rw0", "down")

    def up(self, side: int) -> None:
        ip("-n", self.names[side], "link", "set", "rw0", "up")

    def _carry(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []
        number = 0
        while True:
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, _, to, packet = heapq.heappop(waiting)
                try:
                    os.write(self._fds[to], packet)
                except OSError:  # the interface is down
                    self.lost += 1
            left = max(0.0, waiting[0][0] - now) if waiting else None
            readable, _, _ = select.select([*self._fds, self._stop], [], [], left)
            if self._stop in readable:
                return
            for side, fd in enumerate(self._fds):
                if fd not in readable:
                    continue
                for _ in range(64):
                    try:
                        packet = os.read(fd, 65536)
                    except OSError:  # nothing more, or the interface is down
                        break
                    if self.cut or len(waiting) >= _MOST_WAITING or self._random.random() < self.loss:
                        self.lost += 1
                        continue
                    due = time.monotonic() + self.delay
                    if self._random.random() < self.late:
                        due += self.delay or 0.005
                        self.reordered += 1
                    number += 1
                    self.carried += 1
                    heapq.heappush(waiting, (due, number, 1 - side, packet))

    def close(self) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join(10)
        self._remove()

    def _remove(self) -> None:
        for fd in self._fds:
            os.close(fd)
        os.close(self._stop)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=20)
