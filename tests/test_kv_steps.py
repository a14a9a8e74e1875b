"""Forward passes and their layers: what a pass saves, in any order, is pushed once; what it does not save fails."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kv_bed import Decoder, Prefiller, same, settle, sim_nics

from railwire.kvcache import LayerWatcher, PushAborted, TicketFailed, paged_instance
from railwire.kvcache.steps import Step, fail_missing
from railwire.testing import SimulatedFabric

LAYERS = 3


@pytest.fixture
def pair() -> Iterator[tuple[Prefiller, Decoder]]:
    shape = paged_instance(stages=[range(LAYERS)], model="m", kv_heads=2, head_bytes=32, num_blocks=12, block_tokens=4)
    with SimulatedFabric(reorder=True, max_delay_us=100) as fabric:
        prefiller = Prefiller(shape, sim_nics(fabric, "p", 1))
        decoder = Decoder(shape, sim_nics(fabric, "d", 1))
        yield prefiller, decoder
        decoder.close()
        prefiller.close()


def test_a_step_says_what_counts_and_what_is_missing() -> None:
    step = Step([], [3, 4, 5])
    assert [step.save(layer) for layer in (4, 9, 4, 3)] == [True, False, False, True]
    assert step.saved == [4, 3] and step.end() == [5]
    assert not step.save(5)  # too late: it has been said to be missing


@pytest.mark.parametrize("stride", [1, 2, 10])
def test_a_kernels_counts_follow_what_was_saved_not_what_was_expected(
    pair: tuple[Prefiller, Decoder], stride: int
) -> None:
    prefiller, decoder = pair
    names, blocks = ("a", "b"), {"a": [0, 1, 2], "b": [3, 4, 5]}
    tickets = {name: decoder.prepare(prefiller, name, blocks[name], 12)[0] for name in names}
    pushes = {name: prefiller.open(name, 12, blocks[name])[0] for name in names}
    watcher = LayerWatcher(prefiller.senders[0])
    try:
        first, second = Step([(pushes["a"], 12)], range(LAYERS)), Step([(pushes["b"], 12)], range(LAYERS))
        watcher.begin_step(first)
        for layer in (2, 0, 0):  # another order, one twice, one not at all
            first.save(layer)
        assert fail_missing(first) == [1]
        watcher.begin_step(second)
        for layer in (1, 2, 0):
            assert second.save(layer)
        assert fail_missing(second) == []
        for count in range(0, 5, stride):
            watcher.watcher.word[0] = min(count + stride, 5)
        tickets["b"].wait(5)
        assert same(prefiller, decoder, blocks["b"], blocks["b"], range(12))
        with pytest.raises(TicketFailed, match=r"did not save layers \[1\]"):
            tickets["a"].wait(5)
        with pytest.raises(PushAborted):
            pushes["a"].done.wait(5)
        pushes["b"].done.wait(5)
        assert settle(lambda: watcher.pending_steps == 0) and watcher.lost_counts == 0
    finally:
        watcher.close()
