"""The twin of checkpoint-engine's P2PStore: reads by address, between two stores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from railwire.errors import DescriptorError
from railwire.integrations.checkpoint_engine import P2PStore

NIC = ["tcp://127.0.0.1"]


@pytest.fixture
def stores() -> Iterator[tuple[P2PStore, P2PStore]]:
    pair = P2PStore(nics=NIC, secret="s"), P2PStore(nics=NIC, secret="s")
    yield pair
    for store in pair:
        store.close()


def test_reads_by_address(stores: tuple[P2PStore, P2PStore]) -> None:
    owner, reader = stores
    held = {f"bucket {i}": torch.arange(1000 + i, dtype=torch.int32) * (i + 1) for i in range(250)}
    owner.register_named_tensors(held)
    into = torch.zeros(4000, dtype=torch.int32)
    reader.register_named_tensors({"into": into})
    first, last = held["bucket 0"], held["bucket 249"]
    ours = into.data_ptr()
    remote = [first.data_ptr() + 40, last.data_ptr()]
    reader.batch_transfer_sync_read(owner.addr, [ours, ours + 400], remote, [400, last.nbytes])
    assert torch.equal(into[:100], first[10:110])
    assert torch.equal(into[100 : 100 + len(last)], last)
    late = torch.full((16,), 7, dtype=torch.int32)
    owner.register_named_tensors({"late": late})  # a pointer that the reader has not heard of yet
    reader.batch_transfer_sync_read(owner.addr, [ours], [late.data_ptr()], [64])
    assert torch.equal(into[:16], late)
    assert owner.unregister_named_tensors(["late", "bucket 0"]) == 2
    assert len(owner.named_tensors) == 249


def test_bad_calls_change_nothing(stores: tuple[P2PStore, P2PStore]) -> None:
    owner, reader = stores
    tensor, into = torch.arange(64), torch.zeros(64, dtype=torch.int64)
    owner.register_named_tensors({"a": tensor})
    reader.register_named_tensors({"into": into})
    with pytest.raises(ValueError, match="a is registered already"):
        owner.register_named_tensors({"b": torch.zeros(4), "a": tensor})
    assert set(owner.named_tensors) == {"a"}
    with pytest.raises(KeyError):
        owner.unregister_named_tensors(["a", "c"])
    with pytest.raises(DescriptorError, match="not registered here"):
        reader.batch_transfer_sync_read(owner.addr, [tensor.data_ptr()], [tensor.data_ptr()], [8])
    with pytest.raises(DescriptorError, match="has not registered"):
        reader.batch_transfer_sync_read(owner.addr, [into.data_ptr()], [tensor.data_ptr() + 8], [512])
    with pytest.raises(DescriptorError):
        reader.batch_transfer_sync_read("10.0.0.1:99", [into.data_ptr()], [tensor.data_ptr()], [8])
    with pytest.raises(ValueError, match="as many buffers"):
        reader.batch_transfer_sync_read(owner.addr, [into.data_ptr()], [], [8])
    assert not into.any()
    reader.batch_transfer_sync_read(owner.addr, [into.data_ptr()], [tensor.data_ptr()], [512])
    assert torch.equal(into, tensor)


def test_it_has_the_methods_of_the_original() -> None:
    """Where checkpoint-engine is installed: its own class, method by method."""
    original = pytest.importorskip("checkpoint_engine.p2p_store").P2PStore
    import inspect

    for name, method in inspect.getmembers(original, inspect.isfunction):
        if not name.startswith("_"):
            ours = inspect.signature(getattr(P2PStore, name)).parameters
            assert list(ours) == list(inspect.signature(method).parameters), name
    assert isinstance(P2PStore.addr, property)
