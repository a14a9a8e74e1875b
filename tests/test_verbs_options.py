"""What the verbs NIC's options do to the queue pairs, seen from outside: on the wire, and by how long things take."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator

import far_side
import numpy as np
import pytest
from beds import EMULATED, verbs_nic
from processes import Child

from railwire import RailwireError, RemoteRegion, TransferEngine

pytestmark = pytest.mark.skipif(not EMULATED, reason="needs RDMA devices: make test-rxe")
Open = Callable[..., TransferEngine]

ETH_P_ALL = 3
ROCE_PORT = 4791
RC_WRITES = range(0x06, 0x0C)  # first, middle, last and only RDMA WRITE of a reliable connection, with immediate too


@pytest.fixture
def nic1_up() -> Iterator[None]:
    yield
    subprocess.run(["ip", "link", "set", "nic1", "up"], check=True)
    time.sleep(1.0)


def classes_on_the_wire(sniffer: socket.socket) -> set[int]:
    """IPv4 "type of service" of the RDMA writes of reliable connections that have passed."""
    found = set()
    while True:
        try:
            packet = sniffer.recv(9000)
        except BlockingIOError:
            return found
        ip = packet[14:]
        if packet[12:14] != b"\x08\x00" or ip[9] != socket.IPPROTO_UDP:
            continue
        udp = ip[(ip[0] & 15) * 4 :]
        if int.from_bytes(udp[2:4], "big") == ROCE_PORT and udp[8] in RC_WRITES:
            found.add(ip[1])


@pytest.mark.parametrize("traffic_class", [0, 0x68])
def test_the_traffic_class_is_on_every_packet_of_a_write(open_engine: Open, child: Child, traffic_class: int) -> None:
    options = {"traffic_class": str(traffic_class)}
    engine = open_engine(verbs_nic(0), options=options)
    engine.connect(child.call(far_side.open_engine, [verbs_nic(0)], options=options))
    remote = RemoteRegion.from_bytes(child.call(far_side.offer, 1 << 16))
    source = engine.register(np.ones(1 << 16, np.uint8))
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as sniffer:
        sniffer.bind(("nic0", 0))
        sniffer.setblocking(False)
        engine.write(source, remote, imm=1).wait(20)
        child.call(far_side.expect, 1, 1)
        assert classes_on_the_wire(sniffer) == {traffic_class}


def test_retry_count_and_timeout_bound_a_dead_path(nic1_up: None) -> None:
    """2^timeout x 4.096 us to each try: 0.07 s and one, against 0.27 s and five more; Soft-RoCE takes 7 for "for ever".
    The transfer itself outlives the link: it goes through the next one, once the path is whole again."""
    spent = []
    for retries, timeout in (("0", "14"), ("5", "16")):
        options = {"retry_count": retries, "timeout": timeout}
        with (
            TransferEngine(nics=[verbs_nic(0)], options=options, liveness=8.0) as near,
            TransferEngine(nics=[verbs_nic(1)], options=options, liveness=8.0) as far,
        ):
            near.connect(far.address)
            landing, payload = np.zeros(64, np.uint8), np.ones(64, np.uint8)
            region = far.register(landing)
            source = near.register(payload)
            near.write(source, region.descriptor).wait(20)
            payload[:] = 2
            subprocess.run(["ip", "link", "set", "nic1", "down"], check=True)
            begin = time.monotonic()
            transfer = near.write(source, region.descriptor)
            while near.stats()["nics"][0]["errors"] == 0:
                assert time.monotonic() < begin + 7
                time.sleep(0.005)
            spent.append(time.monotonic() - begin)
            subprocess.run(["ip", "link", "set", "nic1", "up"], check=True)
            transfer.wait(20)
            assert (landing == 2).all()
            assert near.stats()["peers"][0]["links_rebuilt"] >= 1
    assert spent[0] < 1.0 < spent[1], spent


def test_a_path_that_stays_dead_is_named(nic1_up: None) -> None:
    options = {"retry_count": "0", "timeout": "14"}
    with (
        TransferEngine(nics=[verbs_nic(0)], options=options, liveness=2.0) as near,
        TransferEngine(nics=[verbs_nic(1)], options=options, liveness=2.0) as far,
    ):
        near.connect(far.address)
        region = far.register(np.zeros(64, np.uint8))
        source = near.register(np.ones(64, np.uint8))
        subprocess.run(["ip", "link", "set", "nic1", "down"], check=True)
        with pytest.raises(RailwireError, match="RETRY_EXC"):
            near.write(source, region.descriptor).wait(20)
