"""Which NICs an engine chooses by itself, on machines with and without GPUs, RDMA NICs and NUMA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from machines import AMAZON, GPU_CLASS, LOCAL, NVIDIA, Machine, eight_by_eight, four_efas_per_gpu, probe, verbs_device

from railwire import ConfigurationError, TransferEngine, topology
from railwire.topology import gpus, select, sysfs
from railwire.topology.select import Distance

VERBS = "verbs:"
ALL_CORES = frozenset(range(8))


def plan(machine: Machine, offered: dict[str, Any], device: str, **options: Any) -> list[str]:
    options = {"environ": {}, "driver_order": None, "cores": ALL_CORES} | options
    return topology.plan(device, offered, machine.root, "10.0.0.1", **options)


# ---- one GPU, one NIC ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", range(8))
def test_each_gpu_gets_the_nic_behind_its_switch(tmp_path: Path, number: int) -> None:
    machine, offered = eight_by_eight(tmp_path)
    assert plan(machine, offered, f"cuda:{number}") == [f"{VERBS}mlx5_{number}", "shm"]


def test_a_dead_port_makes_the_gpu_use_all_others_of_its_socket(tmp_path: Path) -> None:
    machine, offered = eight_by_eight(tmp_path)
    machine.write("sys/class/infiniband/mlx5_1/ports/1/state", "1: DOWN")
    names = plan(machine, offered, "cuda:1")
    assert names == [f"{VERBS}mlx5_{number}" for number in (0, 2, 3)] + ["shm"]  # not mlx5_8, which is slower


def test_a_nic_that_no_library_offers_is_not_chosen(tmp_path: Path) -> None:
    machine, offered = eight_by_eight(tmp_path)
    assert plan(machine, probe(*LOCAL), "cuda:1") == ["tcp://10.0.0.1", "shm"]
    # libfabric's way to the same device is only taken where it is named.
    assert plan(machine, probe(*LOCAL, ("verbs;ofi_rxm", "mlx5_1")), "cuda:1") == ["tcp://10.0.0.1", "shm"]
    offered["verbs"]["devices"][1] = verbs_device("mlx5_1", error="device mlx5_1 cannot be opened")
    assert f"{VERBS}mlx5_1" not in plan(machine, offered, "cuda:1")


def test_a_process_without_gpu_gets_the_fastest_nics_of_its_sockets(tmp_path: Path) -> None:
    machine, offered = eight_by_eight(tmp_path)
    of_socket_1 = [f"{VERBS}mlx5_{number}" for number in range(4, 8)]
    assert plan(machine, offered, "cpu", cores=frozenset({5})) == [*of_socket_1, "shm"]
    assert plan(machine, offered, "cpu") == [f"{VERBS}mlx5_{number}" for number in range(8)] + ["shm"]


# ---- EFA -------------------------------------------------------------------------------------------------------------
def test_each_gpu_gets_its_four_efas(tmp_path: Path) -> None:
    machine, offered = four_efas_per_gpu(tmp_path)
    seen = set()
    for number in range(8):
        names = plan(machine, offered, f"cuda:{number}")
        gpu = gpus.gpus(tmp_path)[number]
        first = int(gpu.address[5:7], 16) - 4
        assert names == [f"efa:rdmap{first + offset}s0-rdm" for offset in range(4)] + ["shm"]
        seen.update(names)
    assert len(seen) == 33


def test_efa_comes_before_verbs(tmp_path: Path) -> None:
    machine, offered = four_efas_per_gpu(tmp_path)
    machine.rdma("mlx5_0", "pci0000:f0", "0000:f0:00.0", numa=0)
    offered["verbs"] = probe(("verbs", "mlx5_0"), ("verbs", "rdmap79s0"))["verbs"]
    assert all(name.startswith("efa:") for name in plan(machine, offered, "cuda:0")[:-1])
    # Where libfabric has no EFA, its devices are not taken for verbs NICs either.
    assert plan(machine, probe(*LOCAL, ("verbs", "rdmap79s0")), "cuda:0") == ["tcp://10.0.0.1", "shm"]


def test_at_most_sixteen_nics_spread_over_the_machine(tmp_path: Path) -> None:
    machine, offered = four_efas_per_gpu(tmp_path)
    names = plan(machine, offered, "cpu")
    assert len(names) == select.MAX_RDMA_NICS + 1
    devices = {device.name: device for device in sysfs.rdma_devices(tmp_path)}
    nodes = [devices[name[4:-4]].pci.numa for name in names[:-1]]  # type: ignore[union-attr]
    assert nodes.count(0) == nodes.count(1)


def test_without_numa_or_switches_all_are_equally_near(tmp_path: Path) -> None:
    """As in many virtual machines: one flat bus."""
    machine = Machine(tmp_path)
    machine.gpu("pci0000:00", "0000:00:06.0", numa=-1)
    for slot in (4, 5):
        machine.rdma(f"rdmap0s{slot}", "pci0000:00", f"0000:00:0{slot}.0", numa=-1, vendor=AMAZON, device=0xEFA1)
    offered = probe(*LOCAL, ("efa", "rdmap0s5-rdm"), ("efa", "rdmap0s4-rdm"))
    for device in ("cuda:0", "cpu"):
        assert plan(machine, offered, device) == ["efa:rdmap0s4-rdm", "efa:rdmap0s5-rdm", "shm"]


# ---- nothing special -------------------------------------------------------------------------------------------------
def test_without_rdma_one_tcp_nic_and_shm(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert plan(machine, probe(*LOCAL), "cpu") == ["tcp://10.0.0.1", "shm"]


def test_an_ipv6_address_is_written_in_brackets() -> None:
    assert select.choose([], probe(*LOCAL), "fd00::2") == ["tcp://[fd00::2]", "shm"]


def test_where_shm_does_not_work_it_is_left_out(tmp_path: Path) -> None:
    offered = {**probe(*LOCAL), "shm": "shm: this sandbox has no process_vm_readv"}
    assert plan(Machine(tmp_path), offered, "cpu") == ["tcp://10.0.0.1"]


def test_software_rdma_must_be_asked_for(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.soft_roce("rxe0")
    assert plan(machine, probe(*LOCAL, ("verbs", "rxe0")), "cpu") == ["tcp://10.0.0.1", "shm"]


def test_an_empty_tree_is_no_error(tmp_path: Path) -> None:
    assert topology.plan("cpu", probe(*LOCAL), tmp_path, "10.0.0.1") == ["tcp://10.0.0.1", "shm"]
    assert sysfs.net_interfaces(tmp_path) == []
    assert sysfs.numa_nodes(tmp_path) == {}


# ---- devices ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "device", ["", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:x", "cuda:1 ", "CPU", "cuda:٣", "cuda:99999"]
)
def test_other_devices_are_refused(device: str) -> None:
    with pytest.raises(ConfigurationError, match="cuda:N"):
        topology.nics_for_device(device)


def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path) -> None:
    machine, offered = eight_by_eight(tmp_path)
    with pytest.raises(ConfigurationError, match="8 GPUs are visible"):
        plan(machine, offered, "cuda:8")
    with pytest.raises(ConfigurationError, match="no GPU is visible"):
        plan(machine, offered, "cuda:0", environ={"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("3", [3]),
        ("5,1", [5, 1]),
        ("1,9,2", [1]),
        ("1,1", [1]),
        ("-1", []),
        ("GPU-000043", [3]),
        ("GPU-", []),
        ("0, 2", [0, 2]),
    ],
)
def test_cuda_visible_devices_decides_what_cuda_0_is(tmp_path: Path, visible: str, expected: list[int]) -> None:
    eight_by_eight(tmp_path)
    known = gpus.gpus(tmp_path)
    assert gpus.cuda_order(known, {"CUDA_VISIBLE_DEVICES": visible}) == [known[number] for number in expected]


def test_the_drivers_order_counts_before_all(tmp_path: Path) -> None:
    machine, offered = eight_by_eight(tmp_path)
    order = [gpus.gpus(tmp_path)[number].address for number in (6, 2)]
    names = plan(machine, offered, "cuda:1", driver_order=lambda: order, environ={"CUDA_VISIBLE_DEVICES": "0"})
    assert names[0] == f"{VERBS}mlx5_2"


def test_without_driver_gpus_are_found_on_the_bus(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.pci("pci0000:00", "0000:00:06.0", numa=-1, vendor=NVIDIA, device=0x2330, pci_class=GPU_CLASS)
    machine.pci("pci0000:00", "0000:00:06.1", numa=-1, vendor=NVIDIA, device=0x2331, pci_class=0x040300)  # its audio
    assert [gpu.address for gpu in gpus.gpus(tmp_path)] == ["0000:00:06.0"]


@pytest.mark.parametrize("text", ["00000000:1B:00.0", "0000:1b:00.0", " 0000:1B:00.0\n"])
def test_addresses_of_the_driver_are_those_of_sysfs(text: str) -> None:
    assert gpus.normal_address(text) == "0000:1b:00.0"


# ---- distance --------------------------------------------------------------------------------------------------------
def device(path: str, numa: int = -1) -> sysfs.PciDevice:
    parts = tuple(path.split("/"))
    return sysfs.PciDevice(parts[-1], parts, numa, 0, 0, 0, "")


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (device("pci0/port/switch/a"), device("pci0/port/switch/b"), Distance.SWITCH),
        (device("pci0/port/a"), device("pci0/port/bridge/b"), Distance.SWITCH),
        (device("pci0/a"), device("pci0/b"), Distance.HOST_BRIDGE),
        (device("pci0/a", 0), device("pci0/b", 1), Distance.FAR),  # a flat virtual bus that knows its nodes
        (device("pci0/a", 1), device("pci1/b", 1), Distance.NUMA),
        (device("pci0/a", 0), device("pci1/b", 1), Distance.FAR),
        (device("pci0/a"), device("pci1/b"), Distance.FAR),
        (device("pci0/a"), None, Distance.FAR),
    ],
)
def test_distance(one: sysfs.PciDevice, other: sysfs.PciDevice | None, expected: Distance) -> None:
    assert select.distance(one, other)[0] is expected
    assert select.distance(other, one)[0] is expected


def test_an_inner_switch_is_nearer_than_an_outer_one() -> None:
    gpu = device("pci0/port/outer/inner/gpu")
    assert select.distance(gpu, device("pci0/port/outer/inner/bridge/nic")) < select.distance(
        gpu, device("pci0/port/outer/nic")
    )


def test_cpu_lists() -> None:
    assert sysfs.parse_cpu_list("0-3,8") == {0, 1, 2, 3, 8}
    assert sysfs.parse_cpu_list("") == frozenset()


# ---- this machine ----------------------------------------------------------------------------------------------------
def test_an_engine_opens_what_was_chosen_here() -> None:
    names = topology.nics_for_device("cpu")
    with TransferEngine() as engine:
        assert len(engine.nics) == len(names)
        for chosen, opened in zip(names, engine.nics, strict=True):
            assert opened.name.startswith(chosen)


def test_the_default_address_belongs_to_this_machine() -> None:
    ours = [address for one in sysfs.net_interfaces() for address in one.addresses]
    assert topology.default_address() in ours
