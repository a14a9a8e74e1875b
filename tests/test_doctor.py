"""`railwire doctor` finds what is there, says what is not and why, and names the pitfalls."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from machines import AMAZON, LOCAL, MELLANOX, NET_CLASS, Machine, eight_by_eight, four_efas_per_gpu, probe, verbs_device
from rich.console import Console
from typer.testing import CliRunner

import railwire
from railwire import topology
from railwire.cli import app
from railwire.cli.doctor import show
from railwire.doctor import Report, examine, limits, pitfalls
from railwire.doctor.examine import kind_of
from railwire.doctor.limits import CrossMemory, HugePages, Limits, SharedMemory

RAILWIRE = Path(sys.executable).with_name("railwire")
GIB = 1 << 30
GOOD = Limits(
    None, CrossMemory(0, True, True, ""), SharedMemory(8 * GIB, 8 * GIB, True), HugePages("madvise", 0), False
)


def report_of(machine: Machine, offered: dict[str, Any], **environ: str) -> Report:
    return examine(machine.root, offered, environ=environ, tcp_host="10.0.0.1")


def whats(found: Any) -> str:
    return "\n".join(f"{pitfall.severity}: {pitfall.what} -> {pitfall.remedy}" for pitfall in found)


# ---- this machine ----------------------------------------------------------------------------------------------------
def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(RAILWIRE), *arguments], capture_output=True, text=True, timeout=60, env={**os.environ, **environ}
    )


def test_json_of_this_machine() -> None:
    result = run("doctor", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert set(document) == {field.name for field in dataclasses.fields(Report)}
    assert document["version"] == railwire.__version__
    assert document["usable"] is True
    assert any(one["loopback"] and "127.0.0.1" in one["addresses"] for one in document["interfaces"])
    library = document["libfabric"]
    assert Path(library["path"]).exists()
    assert [one["found"] for one in library["attempts"]][-1] is True
    assert all(one["error"] for one in library["attempts"][:-1])
    kinds = {one["kind"] for one in library["providers"]}
    assert "tcp" in kinds
    missing = {one["name"]: one["why"] for one in library["missing"]}
    if document["verbs"]["missing"]:
        missing["verbs"] = document["verbs"]["missing"]["why"]
    else:
        kinds.add("verbs")
    assert kinds | set(missing) >= {"tcp", "efa", "verbs"}
    assert all(missing.values())
    assert document["limits"]["shared_memory"]["total_bytes"] > 0
    plan = document["plans"][0]
    assert plan["device"] == "cpu"
    assert plan["nics"] == topology.nics_for_device("cpu")
    assert "shm" not in plan["other_host"]
    assert plan["other_host"]
    if "shm" in plan["nics"]:
        assert plan["same_host"] == plan["same_process"] == ["shm"]


def test_tables_of_this_machine() -> None:
    result = run("doctor", COLUMNS="160")
    assert result.returncode == 0, result.stderr
    for title in (
        "Network interfaces",
        "RDMA devices",
        "libfabric",
        "Providers",
        "GPUs",
        "Limits",
        "peer in this process",
    ):
        assert title in result.stdout


def test_without_libfabric_tcp_is_usable(tmp_path: Path) -> None:
    """Our own NICs need no library."""
    result = run("doctor", "--json", RAILWIRE_LIBFABRIC=str(tmp_path / "none.so"))
    assert result.returncode == 0
    document = json.loads(result.stdout)
    assert document["usable"] is True
    assert any(nic.startswith("tcp://") for nic in document["plans"][0]["nics"])
    assert document["pitfalls"][0]["severity"] == "note" and "libfabric" in document["pitfalls"][0]["what"]
    assert "none.so" in document["libfabric"]["attempts"][0]["error"]
    assert {one["why"] for one in document["libfabric"]["missing"]} == {"no libfabric could be opened"}


def test_cross_memory_is_really_tried() -> None:
    found = limits.cross_memory()
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    assert found.ptrace_scope == (int(scope.read_text()) if scope.exists() else None)
    assert found.works == (found.error == "")
    if found.ptrace_scope in (None, 0, 1):
        assert found.parent_reads_child or found.error


# ---- other machines --------------------------------------------------------------------------------------------------
def test_gpus_and_nics_are_paired(tmp_path: Path) -> None:
    machine, offered = eight_by_eight(tmp_path)
    report = report_of(machine, offered)
    assert [gpu.device for gpu in report.gpus] == [f"cuda:{number}" for number in range(8)]
    assert [gpu.numa for gpu in report.gpus] == [0] * 4 + [1] * 4
    distances = {pair.nic: pair.distance for pair in report.pairings if pair.gpu == report.gpus[5].address}
    assert distances["mlx5_5"] == "switch"
    assert distances["mlx5_4"] == distances["mlx5_9"] == "numa"
    assert distances["mlx5_0"] == distances["mlx5_8"] == "far"
    plans = {plan.device: plan for plan in report.plans}
    assert list(plans) == ["cpu", *(f"cuda:{number}" for number in range(8))]
    assert plans["cuda:5"].nics == ("verbs:mlx5_5", "shm")
    assert plans["cuda:5"].other_host == ("verbs:mlx5_5",)
    assert plans["cuda:5"].same_host == plans["cuda:5"].same_process == ("shm",)


def test_hidden_gpus_are_listed_as_such(tmp_path: Path) -> None:
    machine, offered = eight_by_eight(tmp_path)
    report = report_of(machine, offered, CUDA_VISIBLE_DEVICES="2")
    assert [gpu.device for gpu in report.gpus] == ["", "", "cuda:0", "", "", "", "", ""]
    assert [plan.device for plan in report.plans] == ["cpu", "cuda:0"]


def test_efa_machine(tmp_path: Path) -> None:
    machine, offered = four_efas_per_gpu(tmp_path)
    report = report_of(machine, offered)
    (efa,) = [one for one in report.libfabric.providers if one.name == "efa"]
    assert len(efa.domains) == 32
    assert report.libfabric.missing == ()
    assert report.verbs.missing is not None
    assert len(report.plans[1].nics) == 5
    assert len(report.plans[1].other_host) == 4
    assert "not been run on EFA hardware" in whats(report.pitfalls)


def test_machine_without_anything(tmp_path: Path) -> None:
    report = report_of(Machine(tmp_path), probe(*LOCAL))
    assert report.usable
    assert not report.gpus
    assert not report.rdma_devices
    why = {one.name: one.why for one in report.libfabric.missing}
    assert why == {"efa": "this machine has no EFA device"}
    assert report.verbs.missing is not None
    assert report.verbs.missing.why == "this machine has no RDMA device"


@pytest.mark.parametrize("make", [eight_by_eight, four_efas_per_gpu])
def test_every_machine_can_be_shown(tmp_path: Path, make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    machine, offered = make(tmp_path)
    show(report_of(machine, offered), Console(width=160))
    text = capsys.readouterr().out
    assert "switch: " in text
    assert "cuda:7" in text
    assert "NVIDIA H100" in text


def test_verbs_devices_are_shown_with_their_ports_and_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine, offered = eight_by_eight(tmp_path)
    offered["verbs"]["devices"][2] = verbs_device("mlx5_2", error="NIC verbs:mlx5_2: port 1 is DOWN; ip link set it up")
    report = report_of(machine, offered)
    assert report.verbs.missing is None
    assert "warning: NIC verbs:mlx5_2: port 1 is DOWN -> ip link set it up" in whats(report.pitfalls)
    show(report, Console(width=160))
    text = capsys.readouterr().out
    assert "mlx5_3" in text and "*3: ::ffff:10.0.0.1 RoCE v2" in text and "dma-buf" in text


# ---- why a provider is missing ---------------------------------------------------------------------------------------
def why_missing(machine: Machine, name: str, **environ: str) -> str:
    report = report_of(machine, probe(*LOCAL), **environ)
    missing = (*report.libfabric.missing, *([report.verbs.missing] if report.verbs.missing else []))
    (found,) = [one for one in missing if one.name == name]
    return f"{found.why} -> {found.remedy}"


def test_devices_without_their_drivers(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.pci("pci0000:00", "0000:00:06.0", numa=0, vendor=AMAZON, device=0xEFA2, pci_class=NET_CLASS)
    machine.pci("pci0000:00", "0000:00:07.0", numa=0, vendor=MELLANOX, device=0x1021, pci_class=NET_CLASS)
    assert "kernel module efa" in why_missing(machine, "efa")
    assert "modprobe mlx5_ib" in why_missing(machine, "verbs")


def test_a_container_without_the_devices(tmp_path: Path) -> None:
    machine, _ = eight_by_eight(tmp_path)
    assert "--device=/dev/infiniband" in why_missing(machine, "verbs")


def test_ports_that_are_all_down(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.rdma("mlx5_0", "pci0000:00", "0000:00:07.0", numa=0, active=False)
    assert "no RDMA device has an active port" in why_missing(machine, "verbs")


def test_fi_provider_may_hide_it(tmp_path: Path) -> None:
    assert "FI_PROVIDER=tcp may hide it" in why_missing(Machine(tmp_path), "efa", FI_PROVIDER="tcp")


# ---- pitfalls --------------------------------------------------------------------------------------------------------
def test_a_good_machine_has_none(tmp_path: Path) -> None:
    assert not whats(pitfalls.machine(GOOD, tmp_path, {}))
    machine, offered = eight_by_eight(tmp_path)
    report = report_of(machine, offered)
    assert not whats(pitfalls.rdma(report.rdma_devices, GOOD))
    assert not whats(pitfalls.gpus(report.gpus, report.gpu_paths, report.rdma_devices, report.pairings, tmp_path))
    assert not whats(pitfalls.library(report.libfabric))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"cross_memory": CrossMemory(1, True, False, "Operation not permitted")}, "warning: processes may not copy"),
        ({"cross_memory": CrossMemory(1, True, True, "")}, "note: kernel.yama.ptrace_scope is 1"),
        ({"cross_memory": CrossMemory(None, False, False, "Function not implemented")}, "Function not implemented"),
        ({"huge_pages": HugePages("never", 0)}, "huge pages are off"),
    ],
)
def test_limits_that_hurt(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    found = list(pitfalls.machine(dataclasses.replace(GOOD, **change), tmp_path, {}))
    assert len(found) == 1
    assert expected in whats(found)
    assert found[0].remedy


def test_few_open_files_are_a_note(tmp_path: Path) -> None:
    few = dataclasses.replace(GOOD, open_files=1024)
    assert "note: a process may have 1024 open files" in whats(pitfalls.machine(few, tmp_path, {}))
    for enough in (65536, None):
        assert not whats(pitfalls.machine(dataclasses.replace(GOOD, open_files=enough), tmp_path, {}))


def test_low_memlock_hurts_rdma_alone(tmp_path: Path) -> None:
    low = dataclasses.replace(GOOD, memlock_bytes=8 << 20)
    machine, offered = eight_by_eight(tmp_path)
    assert "memlock=-1" in whats(pitfalls.rdma(report_of(machine, offered).rdma_devices, low))
    assert not whats(pitfalls.rdma([], low))


def test_gpu_memory_out_of_reach(tmp_path: Path) -> None:
    machine, offered = eight_by_eight(tmp_path)
    machine.write("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.0")
    assert "nvidia_peermem" in whats(report_of(machine, offered).pitfalls)
    machine.write("sys/module/nvidia_peermem/refcnt", "0")
    assert "nvidia_peermem" not in whats(report_of(machine, offered).pitfalls)


def test_gpu_memory_out_of_reach_of_efa(tmp_path: Path) -> None:
    machine, offered = four_efas_per_gpu(tmp_path)
    machine.write("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.0")
    machine.write("sys/module/nvidia_peermem/refcnt", "0")  # which EFA does not use
    assert "efa_nv_peermem" in whats(report_of(machine, offered).pitfalls)
    machine.write("sys/module/efa_nv_peermem/refcnt", "0")
    assert "peermem" not in whats(report_of(machine, offered).pitfalls)


def test_gpus_far_from_every_nic(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.gpu("pci0000:80", "0000:80:01.0", numa=1)
    assert "pinned memory and tcp" in whats(report_of(machine, probe(*LOCAL)).pitfalls)
    machine.rdma("mlx5_0", "pci0000:00", "0000:00:07.0", numa=0)
    assert "crosses sockets" in whats(report_of(machine, probe(*LOCAL, ("verbs", "mlx5_0"))).pitfalls)


def test_old_library_and_environment(tmp_path: Path) -> None:
    found = whats(report_of(Machine(tmp_path), probe(*LOCAL, version="1.17"), FI_PROVIDER="tcp").pitfalls)
    assert "libfabric 1.17 is old" in found
    assert "unset FI_PROVIDER" in found


def test_network(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert "no default route" in whats(report_of(machine, probe(*LOCAL)).pitfalls)
    machine.write("sys/class/net/eth0/mtu", 1500)
    machine.write("sys/class/net/eth0/flags", "0x1003")
    machine.write("proc/net/if_inet6", "fd000000000000000000000000000002 04 40 00 82     eth0")
    report = examine(tmp_path, probe(*LOCAL), environ={}, tcp_host="fd00::2")
    assert report.interfaces[0].addresses == ("fd00::2",)
    assert "MTU 1500 on eth0" in whats(report.pitfalls)


# ---- the command -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tcp://127.0.0.1:80", "tcp"),
        ("shm", "shm"),
        ("libfabric:shm", "libfabric-shm"),
        ("efa:rdmap0s6-rdm", "efa"),
        ("libfabric:verbs;ofi_rxm:mlx5_0", "verbs-ofi"),
        ("verbs:mlx5_0:1", "verbs"),
        ("libfabric:efa-direct:rdmap0s6-rdm", "efa-direct"),
    ],
)
def test_kinds_of_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_version_and_help() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"railwire {railwire.__version__}\n"
    text = CliRunner().invoke(app, ["--help"]).output
    for command in ("doctor", "demo", "bench"):
        assert command in text


def test_help_is_quick() -> None:
    """Processor time, so that a busy machine does not fail it."""
    before = os.times()
    assert run("--help").returncode == 0
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 1.0
