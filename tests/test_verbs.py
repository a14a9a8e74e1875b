"""The verbs NIC on Soft-RoCE devices, in the machine that `make test-rxe` boots: what only real queue pairs show."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import far_side
import msgspec
import numpy as np
import pytest
from beds import EMULATED, RXE_DEVICES, verbs_nic
from processes import Child

from railwire import (
    ConfigurationError,
    ConnectError,
    LinkError,
    Pages,
    RailwireError,
    RemoteAccessError,
    RemoteRegion,
    TransferEngine,
    TransferError,
    _native,
)

pytestmark = pytest.mark.skipif(not EMULATED, reason="needs RDMA devices: make test-rxe")
Open = Callable[..., TransferEngine]
BOTH = [verbs_nic(0), verbs_nic(1)] if EMULATED else []


def link(device: int, state: str) -> None:
    """Takes the interface under a device up or down."""
    subprocess.run(["ip", "link", "set", f"nic{device}", state], check=True)


@pytest.fixture
def whole() -> Iterator[None]:
    """Both interfaces are up again after the test, and the devices' ports active."""
    yield
    for device in range(len(RXE_DEVICES)):
        link(device, "up")
    end = time.monotonic() + 20
    while any(port["state"] != "ACTIVE" for one in _native.verbs_probe()["devices"] for port in one["ports"]):
        assert time.monotonic() < end
        time.sleep(0.1)


def forged(remote: RemoteRegion) -> RemoteRegion:
    """The same region with keys that the peer never gave."""
    message = remote._message
    keys = tuple(blob[:9] + bytes([blob[9] ^ 0x55]) + blob[10:] for blob in message.keys)  # of the rkey
    return RemoteRegion(
        type(message)(
            message.version, message.incarnation, message.region, message.region_nbytes, 0, message.region_nbytes, keys
        )
    )


# ---- several NICs ----------------------------------------------------------------------------------------------------
def test_writes_are_striped_over_two_devices(open_engine: Open, child: Child, rng: np.random.Generator) -> None:
    engine = open_engine(*BOTH)
    engine.connect(child.call(far_side.open_engine, BOTH))
    nbytes = 8 << 20
    remote = RemoteRegion.from_bytes(child.call(far_side.offer, nbytes))
    source = engine.register(rng.integers(0, 256, nbytes, dtype=np.uint8))
    engine.write(source, remote, imm=3).wait(30)
    child.call(far_side.expect, 3, 1)
    assert child.call(far_side.bytes_of) == source.array.tobytes()
    used = [nic["bytes_written"] for nic in engine.stats()["nics"]]
    assert sum(used) == nbytes and min(used) > nbytes / 4, used


@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_one_device_taken_down_under_load(
    open_engine: Open, child: Child, whole: None, rng: np.random.Generator, side: str
) -> None:
    """Every transfer succeeds, every arrival is counted once, every byte is right; then the device comes back."""
    # 0.13 s to each try. Soft-RoCE, when it has to repeat a part of a long message, may end it as an "invalid request":
    # so a time-out that a slow machine runs into by itself (12: 16 ms) fails writes of devices that nobody took down.
    options = {"timeout": "15"}
    engine = open_engine(*BOTH, options=options, liveness=4.0)
    peer = engine.connect(child.call(far_side.open_engine, BOTH, options=options, liveness=4.0))
    page_bytes, pages, rounds = 4096, 512, 24
    remote = RemoteRegion.from_bytes(child.call(far_side.offer, pages * page_bytes))
    source = engine.register(rng.integers(0, 256, pages * page_bytes, dtype=np.uint8))
    take, put = (Pages(rng.permutation(pages), page_bytes) for _ in range(2))
    child.call(far_side.begin_expect, 7, pages * rounds, 120.0)
    before = engine.stats()["nics"]
    transfers = [engine.write_pages(source, take, remote, put, page_bytes, imm=7) for _ in range(rounds)]
    while engine.stats()["nics"][1]["completions"] - before[1]["completions"] < 200:
        time.sleep(0.001)
    victim = 1 if side == "ours" else 3  # the second link joins rxe1 and rxe3
    link(victim, "down")
    for transfer in transfers:
        transfer.wait(60)
    assert child.call(far_side.outcome_of_expect, 7, timeout=60) == ("done", pytest.approx(0, abs=60))
    assert child.call(far_side.counter_value, 7) == 0
    expected = np.zeros((pages, page_bytes), np.uint8)
    expected[put.indices] = source.array.reshape(pages, page_bytes)[take.indices]
    assert child.call(far_side.bytes_of) == expected.tobytes()
    assert peer.state == "connected"
    (facts,) = engine.stats()["peers"]
    assert facts["work_requests_resent"] > 0, facts
    # Traffic goes on over the other, and over both when it is back.
    engine.write(source, remote, imm=8).wait(30)
    link(victim, "up")
    end = time.monotonic() + 40
    while engine.stats()["peers"][0]["links_rebuilt"] == facts["links_rebuilt"]:
        assert time.monotonic() < end, engine.stats()["peers"]
        time.sleep(0.05)
    begin = [nic["bytes_written"] for nic in engine.stats()["nics"]]
    for _ in range(4):
        engine.write(source, remote, imm=8).wait(30)
    used = [nic["bytes_written"] - was for nic, was in zip(engine.stats()["nics"], begin, strict=True)]
    assert min(used) > 0, used
    child.call(far_side.expect, 8, 5)
    assert child.call(far_side.counter_value, 8) == 0


# ---- one NIC ---------------------------------------------------------------------------------------------------------
def test_a_queue_pair_in_error_fails_what_used_it_and_is_made_anew(open_engine: Open, child: Child) -> None:
    engine = open_engine(BOTH[0])
    peer = engine.connect(child.call(far_side.open_engine, [BOTH[0]]))
    remote = RemoteRegion.from_bytes(child.call(far_side.offer, 1 << 16))
    source = engine.register(np.ones(1 << 16, np.uint8))
    for number in range(3):
        with pytest.raises(RemoteAccessError) as refused:
            engine.write(source, forged(remote)).wait(10)
        assert "IBV_WC_REM_ACCESS_ERR" in str(refused.value)
        assert refused.value.peer == "far"
        assert BOTH[0] in refused.value.nic
        engine.write(source, remote, imm=1).wait(10)
        assert peer.state == "connected"
        assert engine.stats()["peers"][0]["links_rebuilt"] == number + 1
    child.call(far_side.expect, 1, 3)
    assert child.call(far_side.counter_value, 1) == 0


def test_a_region_that_was_revoked_is_under_a_new_key(open_engine: Open) -> None:
    near, far = open_engine(BOTH[0]), open_engine(BOTH[1])
    near.connect(far.address)
    region = far.register(np.zeros(4096, np.uint8))
    old = region.descriptor
    source = near.register(np.ones(4096, np.uint8))
    near.write(source, old).wait(10)
    region.revoke()
    assert {blob[8:] for blob in region.descriptor._message.keys}.isdisjoint(blob[8:] for blob in old._message.keys)
    region.array[:] = 0
    with pytest.raises(RailwireError):
        near.write(source, old).wait(10)
    assert not region.array.any()
    near.write(source, region.descriptor).wait(10)
    assert region.array.all()


def test_many_peers_share_one_device(open_engine: Open) -> None:
    """More links than the first completion queue was made for, all at once."""
    hub = open_engine(BOTH[0], liveness=20.0)
    region = hub.register(np.zeros(24 * 64, np.uint8))
    spokes = [open_engine(BOTH[1], liveness=20.0) for _ in range(24)]
    transfers = []
    for number, spoke in enumerate(spokes):
        spoke.connect(hub.address)
        source = spoke.register(np.full(64, number + 1, np.uint8))
        transfers.append(spoke.write(source, region.descriptor[number * 64 : number * 64 + 64], imm=5))
    for transfer in transfers:
        transfer.wait(20)
    hub.counter(5).expect(24, timeout=20).wait()
    assert (region.array.reshape(24, 64) == np.arange(1, 25, dtype=np.uint8)[:, None]).all()


def test_connecting_survives_lost_packets(open_engine: Open) -> None:
    """One packet in three of either direction never arrives."""
    near, far = (open_engine(nic, liveness=30.0) for nic in BOTH)
    command = ["tc", "qdisc", "add", "dev", "port0", "root", "netem", "loss", "30%"]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("this kernel has no netem")
    try:
        for _ in range(3):
            near.connect(far.address, timeout=30).close()
    finally:
        subprocess.run(["tc", "qdisc", "del", "dev", "port0", "root"], check=True)


# ---- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("verbs:mlx5_9", {}, "no RDMA device mlx5_9; this machine has rxe0"),
        ("verbs:rxe0:2", {}, "there is no port 2"),
        ("verbs:rxe0", {"gid_index": "99"}, "gid_index 99 of rxe0"),
        ("verbs:rxe0", {"gid_index": "5000"}, "0 to 1023"),
        ("verbs:rxe0", {"mtu": "1234"}, "256, 512, 1024, 2048 or 4096"),
        ("verbs:rxe0", {"pkey_index": "77"}, "pkey_index 77"),
        ("verbs:rxe0", {"link_depth": "65536", "recv_depth": "65536"}, "link_depth"),
    ],
)
def test_what_is_wrong_is_said(name: str, options: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        TransferEngine(nics=[name], options=options)


def test_a_port_that_is_down_is_named_with_the_remedy(whole: None) -> None:
    link(1, "down")
    with pytest.raises(ConfigurationError, match=r"port 1 of rxe1 is DOWN; .*ip link set nic1 up"):
        TransferEngine(nics=[BOTH[1]])
    (error,) = (one["error"] for one in _native.verbs_probe()["devices"] if one["name"] == "rxe1")
    assert "port 1 of rxe1 is DOWN" in error


def test_too_small_a_memlock_limit_is_named_with_the_remedy(child: Child) -> None:
    assert "ulimit -l unlimited" in child.call(register_with_little_memory, BOTH[0])


def register_with_little_memory(state: far_side.State, nic: str) -> str:
    """Without the capability that makes root exempt."""
    import ctypes
    import os
    import resource

    resource.setrlimit(resource.RLIMIT_MEMLOCK, (24 << 20, 24 << 20))
    ctypes.CDLL(None).prctl(24, 14)  # PR_CAPBSET_DROP, CAP_IPC_LOCK
    os.chmod("/dev/infiniband", 0o755)
    for entry in os.scandir("/dev/infiniband"):
        os.chmod(entry.path, 0o666)
    os.setresuid(65534, 65534, 65534)
    try:
        with TransferEngine(nics=[nic]) as engine:
            engine.register(np.zeros(64 << 20, np.uint8))
    except RailwireError as error:
        return str(error)
    return "nothing was wrong"


@pytest.mark.parametrize(("ours", "theirs"), [("4096", "1024"), ("256", "4096")])
def test_ports_of_different_mtu_use_the_smaller_one(open_engine: Open, ours: str, theirs: str) -> None:
    """Forced on one side, it is an error that names both; otherwise the smaller one is used."""
    near, far = open_engine(BOTH[0]), open_engine(BOTH[1], options={"mtu": min(ours, theirs, key=int)})
    near.connect(far.address)
    region = far.register(np.zeros(100_000, np.uint8))
    near.write(near.register(np.ones(100_000, np.uint8)), region.descriptor).wait(10)
    assert region.array.all()
    forced = open_engine(BOTH[0], options={"mtu": "4096"})
    begin = time.monotonic()
    with pytest.raises(ConnectError, match="option mtu is 4096, but the peer's port carries"):
        forced.connect(far.address)
    assert time.monotonic() - begin < 2


def test_a_peer_of_another_link_layer_is_refused_by_name(open_engine: Open) -> None:
    near, far = open_engine(BOTH[0]), open_engine(BOTH[1])
    address = far.address
    message = address._message
    (nic,) = message.nics
    control = bytearray(nic.control)
    control[1] = 0  # as if its port were InfiniBand
    strange = type(address)(
        msgspec.structs.replace(message, nics=(msgspec.structs.replace(nic, control=bytes(control)),))
    )
    with pytest.raises(ConnectError, match=r"rxe0 is Ethernet .*, the peer's is InfiniBand"):
        near.connect(strange)


# ---- tools -----------------------------------------------------------------------------------------------------------
def railwire(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from railwire.cli import app; app()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110)


def test_doctor_shows_the_devices() -> None:
    result = railwire("doctor", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)["verbs"]
    assert found["path"] and found["missing"] is None
    assert [one["name"] for one in found["devices"]] == list(RXE_DEVICES)
    for number, device in enumerate(found["devices"]):
        assert not device["hardware"] and not device["error"]
        (port,) = device["ports"]
        assert (port["state"], port["link_layer"], port["mtu"]) == ("ACTIVE", "Ethernet", 4096)
        taken = {gid["index"]: gid for gid in port["gids"]}[port["chosen_gid"]]
        assert (taken["gid"], taken["type"], taken["netdev"]) == (
            f"::ffff:192.0.2.{number + 1}",
            "RoCE v2",
            f"nic{number}",
        )


def test_bench_measures_perftest_beside_ours() -> None:
    if shutil.which("ib_write_bw") is None:
        pytest.skip("perftest is not installed")
    options = ["--op", "write", "--page-bytes", "65536", "--window", "16", "--repeats", "1", "--seconds", "0.2"]
    result = railwire("bench", "p2p", "--nic", BOTH[0], "--against", "perftest", *options, "--json")
    assert result.returncode == 0, result.stderr
    rows = {row["contender"]: row for row in map(json.loads, result.stdout.splitlines())}
    assert rows["railwire"]["verified"] is True and rows["railwire"]["gbytes_per_s"] > 0
    assert rows["perftest"]["gbytes_per_s"] > 0, rows["perftest"]
    assert rows["perftest"]["verified"] is None  # it checks nothing


# ---- load ------------------------------------------------------------------------------------------------------------
def test_links_that_break_again_and_again_under_load(open_engine: Open, child: Child) -> None:
    """Refused writes break one queue pair after the other while others write: those end well or say why, and the count
    is of those that ended well, plus at most those that failed."""
    engine = open_engine(*BOTH, liveness=10.0)
    engine.connect(child.call(far_side.open_engine, BOTH, liveness=10.0))
    remote = RemoteRegion.from_bytes(child.call(far_side.offer, 1 << 16))
    bad = forged(remote)
    source = engine.register(np.ones(1 << 16, np.uint8))
    stop = threading.Event()

    def vandalise() -> None:
        while not stop.is_set():
            try:
                engine.write(source[:64], bad[:64]).wait(10)
            except (RemoteAccessError, LinkError, TransferError):
                pass
            time.sleep(0.1)

    vandal = threading.Thread(target=vandalise)
    vandal.start()
    done = failed = 0
    try:
        end = time.monotonic() + 60
        while engine.stats()["peers"][0]["links_rebuilt"] < 4:
            assert time.monotonic() < end
            try:
                engine.write(source[:4000], remote[:4000], imm=5).wait(20)
                done += 1
            except (RemoteAccessError, LinkError, TransferError):
                failed += 1
    finally:
        stop.set()
        vandal.join()
    assert done > 0
    end = time.monotonic() + 10
    while child.call(far_side.counter_value, 5) < done:
        assert time.monotonic() < end
    assert done <= child.call(far_side.counter_value, 5) <= done + failed
