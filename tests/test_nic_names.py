"""Names of NICs as they are given to an engine: an address that only a listener understands is replaced."""

from __future__ import annotations

import pytest

from railwire import ConfigurationError, TransferEngine, topology
from railwire.nics import reachable


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> dict[int, str | None]:
    table: dict[int, str | None] = {4: "10.1.2.3", 6: "fd00::7"}
    monkeypatch.setattr(topology, "route_address", lambda version: table[version])
    return table


@pytest.mark.usefixtures("routes")
@pytest.mark.parametrize("port", ["", ":7000"])
def test_an_address_for_listeners_is_replaced(port: str) -> None:
    for host in ("0.0.0.0", "0", "0.0", "[::ffff:0.0.0.0]"):
        assert reachable(f"tcp://{host}{port}") == f"tcp://10.1.2.3{port}"
    for host in ("[::]", "[::0]", "[0:0:0:0:0:0:0:0]"):
        assert reachable(f"tcp://{host}{port}") == f"tcp://[fd00::7]{port}"


@pytest.mark.usefixtures("routes")
def test_all_other_names_stay_as_they_are() -> None:
    for name in ("tcp", "shm", "tcp://127.0.0.1", "tcp://[::1]:7", "tcp://node7:1", "tcp://", "tcp://[", "sim://0.0.0.0/a",
                 "verbs:mlx5_0"):  # fmt: skip
        assert reachable(name) == name


def test_without_a_route(routes: dict[int, str | None]) -> None:
    routes.update({4: None, 6: None})
    assert reachable("tcp://0.0.0.0:5") == "tcp://127.0.0.1:5"
    with pytest.raises(ConfigurationError, match="no route by IPv6"):
        reachable("tcp://[::]")


def test_peers_reach_an_engine_that_listens_anywhere() -> None:
    with TransferEngine(nics=["tcp://0.0.0.0"]) as a, TransferEngine(nics=["tcp"]) as b:
        assert "0.0.0.0" not in "".join(a.address.nics)
        assert b.connect(a.address).state == "connected"
        assert a.name != b.name
