"""The simulator: a model's real shapes, never faster than physics, and as slow as what is slowest."""

from __future__ import annotations

import pytest

from railwire.bench.weights_bench import Figures, predict
from railwire.bench.weights_child import shapes
from railwire.weights.models import MODELS, default_layout, receiver_tables, tensors, trainer_tables
from railwire.weights.plan import Plan, compute
from railwire.weights.simulate import Costs, simulate

SMALL = MODELS["kimi-k2"]._replace(layers=3, experts=16, hidden=1024, vocab=2048, intermediate=2048, heads=8)
FREE = Costs(0, 0, 0, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def plan() -> Plan:
    layout = default_layout(SMALL, 16, 8)
    return compute(trainer_tables(SMALL, layout), receiver_tables(SMALL, layout, fp8=True))


def test_published_models_have_their_published_sizes() -> None:
    """Parameters in billions, as the models' cards say."""
    for name, billions in (("kimi-k2", 1026), ("deepseek-v3", 671), ("qwen3-235b", 235)):
        total = sum(t.shape[0] * (t.shape[1] if len(t.shape) > 1 else 1) for t in tensors(MODELS[name]))
        assert total / 1e9 == pytest.approx(billions, rel=0.01), name


def test_no_faster_than_physics_and_close_to_it(plan: Plan) -> None:
    found = simulate(plan, nic_gbps=1.0, costs=FREE, step=1e-4)
    sent, received = plan.nbytes().sum(axis=1), plan.nbytes().sum(axis=0)
    assert found.ideal == pytest.approx(max(sent.max(), received.max()) / 125e6)
    assert found.ideal <= found.seconds <= 1.25 * found.ideal
    assert found.nbytes == int(plan.nbytes().sum())
    twice = simulate(plan, nic_gbps=1.0, nics_per_gpu=2, costs=FREE, step=1e-4)
    assert twice.seconds == pytest.approx(found.seconds / 2, rel=0.05)


def test_the_slowest_stage_decides(plan: Plan) -> None:
    slow = simulate(plan, nic_gbps=1000.0, costs=Costs(h2d=0, gather=0.02, fuse=0, quantise=0.001, submit=0), step=1e-3)
    assert slow.stages["gather"] <= slow.seconds
    assert slow.seconds == pytest.approx(slow.made, rel=0.1)
    tight = simulate(plan, nic_gbps=1.0, costs=FREE, watermark=1, step=1e-4)
    assert tight.seconds >= simulate(plan, nic_gbps=1.0, costs=FREE, step=1e-4).seconds


def test_two_levels_of_receivers_get_equal_loads(plan: Plan) -> None:
    sent, received = plan.imbalance()
    assert received <= 1.05
    assert sent < 2  # sixteen experts over sixteen ranks, three layers: too few to be even
    with pytest.raises(ValueError, match="must be positive"):
        simulate(plan, nic_gbps=0)


def test_the_prediction_beside_a_measurement_is_physics_and_overheads() -> None:
    """`railwire bench weights` compares with this: the engine's own bandwidth, as many bytes, then what is on top."""
    nbytes = 2 * sum(rows * columns for rows, columns in shapes(50).values())
    engine = Figures("engine", (0.1, 0.2, 0.3), nbytes)
    for trainers, receivers in ((2, 2), (4, 2), (2, 1)):
        seconds = predict(engine, trainers=trainers, receivers=receivers, megabytes=50)
        assert 0.2 < seconds < 0.23
