"""The version protocol, walked: every order of messages and losses, up to a depth, of one lead, two trainers and two
receivers that do what their machines say. Whatever happens: every update ends, nothing is served that is no whole
version, and after a decision nobody stays behind who lives.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from typing import Any

import pytest

from railwire.weights import lead_machine as lm
from railwire.weights import messages as msg
from railwire.weights import receiver_machine as rm

DIGEST = b"d" * 16


class World:
    """All machines, and what is on the wire: one queue per direction and pair."""

    def __init__(self, in_place: bool) -> None:
        self.lead = lm.Lead({0: "t0", 1: "t1"})
        self.receivers = {name: rm.ReceiverMachine(DIGEST, in_place=in_place) for name in "ab"}
        for name in "ab":
            self.lead.join(name, DIGEST, {"t0": 1, "t1": 1})
        self.wires: dict[tuple[str, str], deque[Any]] = {}
        self.alive = {"a", "b", 0, 1, "lead"}
        self.memory: dict[str, set[int]] = {"a": set(), "b": set()}  # trainers whose bytes of this attempt have landed
        self.shadow: dict[str, tuple[int, ...]] = {"a": (), "b": ()}
        self.landing: dict[tuple[int, str], int] = {}  # writes under way: (trainer, receiver) -> attempt
        self.attempt_of: dict[str, int] = {"a": -1, "b": -1}
        self.decision = ""
        self.served: dict[str, Any] = {"a": None, "b": None}
        self.ended = 0
        self.stopped: set[int] = set()
        self.dismissed: set[str] = set()
        self.lead_do(self.lead.start(1))

    # ---- actions
    def lead_do(self, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case lm.ToReceiver(name, message):
                    self.put("lead", name, message)
                case lm.ToTrainer(rank, message):
                    self.put("lead", rank, message)
                case lm.Decide():
                    self.decision = "published"
                    self.lead_do(self.lead.decided(True))
                case lm.Dismiss(name):
                    for wire in ((name, "lead"), ("lead", name)):
                        self.wires.pop(wire, None)
                    self.dismissed.add(name)
                    if name in self.alive:
                        self.receiver_do(name, self.receivers[name].lead_lost())
                case lm.Done():
                    self.ended += 1

    def receiver_do(self, name: str, actions: list[Any]) -> None:
        machine = self.receivers[name]
        for action in actions:
            match action:
                case rm.Reply(message):
                    self.put(name, "lead", message)
                case rm.Expect(attempt, _):
                    self.memory[name], self.attempt_of[name] = set(), attempt
                    if machine.in_place:
                        self.served[name] = None
                    self.put(name, "lead", msg.Ready(attempt, 7))
                case rm.Apply(version):
                    assert self.memory[name] == {0, 1}, "a version that is not whole is served"
                    assert self.decision == "published"
                    self.served[name] = version
                case rm.Drop(_, cut):
                    for rank in (0, 1):
                        if cut is None or f"t{rank}" in cut:
                            self.landing.pop((rank, name), None)
                    self.memory[name] = set()
                    assert not [k for k in self.landing if k[1] == name], "dropped while something may still land"
                    self.receiver_do(name, machine.dropped())
                case rm.Ask():
                    self.receiver_do(name, machine.verdict(self.decision == "published"))

    def put(self, src: Any, dst: Any, message: Any) -> None:
        if "lead" in (src, dst) and self.dismissed & {src, dst}:
            return  # that connection is closed
        if src in self.alive and dst in self.alive:
            self.wires.setdefault((src, dst), deque()).append(message)

    # ---- what may happen next
    def moves(self, losses: int) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = [("deliver", wire) for wire in sorted(self.wires, key=str) if self.wires[wire]]
        found += [("land", key) for key in sorted(self.landing, key=str)]
        if losses:
            found += [("kill", who) for who in sorted(self.alive, key=str)]
            found += [("fail", key) for key in sorted(self.landing, key=str)]
            if "lead" in self.alive and self.lead.phase != "idle":
                found.append(("late", "lead"))
        return found

    def move(self, kind: str, what: Any) -> None:
        if kind == "deliver":
            self.deliver(*what, self.wires[what].popleft())
        elif kind == "land":
            self.land(*what)
        elif kind == "fail":
            self.landing.pop(what)
            self.finish_writing(what[0], {what[1]: "failed"})
            self.receiver_do(what[1], self.receivers[what[1]].broken(self.attempt_of[what[1]], "writer failed"))
        elif kind == "late":
            self.lead_do(self.lead.timed_out())
        else:
            self.kill(what)

    def land(self, rank: int, name: str) -> None:
        attempt = self.landing.pop((rank, name))
        if name in self.alive:
            assert attempt == self.attempt_of[name]
            self.memory[name].add(rank)
            if self.memory[name] == {0, 1}:
                self.receiver_do(name, self.receivers[name].landed(attempt))
        self.finish_writing(rank, {})

    def finish_writing(self, rank: int, failed: dict[str, str]) -> None:
        if not [key for key in self.landing if key[0] == rank]:
            self.put(rank, "lead", msg.Wrote(self.lead.attempt, failed))

    def deliver(self, src: Any, dst: Any, message: Any) -> None:
        if dst == "lead":
            match message:
                case msg.Ready(attempt, imm):
                    self.lead_do(self.lead.ready(src, attempt, imm))
                case msg.Refused(attempt, why) | msg.Broken(attempt, why):
                    self.lead_do(self.lead.refused(src, attempt, why))
                case msg.Landed(attempt):
                    self.lead_do(self.lead.landed(src, attempt))
                case msg.Published(attempt):
                    self.lead_do(self.lead.published_by(src, attempt))
                case msg.Aborted(attempt):
                    self.lead_do(self.lead.aborted(src, attempt))
                case msg.Arrived(version, attempt):
                    self.lead_do(self.lead.arrived(src, version, attempt))
                case msg.Wrote():
                    self.lead_do(self.lead.wrote(src, message))
        elif dst in self.receivers:
            machine = self.receivers[dst]
            actions = {msg.Begin: machine.begin, msg.Publish: machine.publish, msg.Abort: machine.abort}[type(message)](
                message
            )
            self.receiver_do(dst, actions)
        else:
            match message:
                case msg.Prepare(version, attempt, _):
                    self.put(dst, "lead", msg.Arrived(version, attempt))
                case msg.Go(_, attempt, imms):
                    for name in imms:
                        if name in self.alive:
                            self.landing[dst, name] = attempt
                    self.finish_writing(dst, {})
                case msg.Stop(attempt):
                    if [key for key in self.landing if key[0] == dst]:
                        for name in "ab":
                            self.landing.pop((dst, name), None)  # cancelled, and confirmed
                        self.put(dst, "lead", msg.Wrote(attempt, {"": "stopped"}))

    def kill(self, who: Any) -> None:
        self.alive.discard(who)
        for wire in self.wires:
            if who in wire:
                self.wires[wire].clear()
        if who == "lead":
            for name, machine in self.receivers.items():
                if name in self.alive:
                    self.receiver_do(name, machine.lead_lost())
        elif who in self.receivers:
            for rank in (0, 1):
                if self.landing.pop((rank, who), None) is not None and rank in self.alive:
                    self.finish_writing(rank, {who: "lost"})
            if "lead" in self.alive:
                self.lead_do(self.lead.receiver_lost(who))
        else:
            broken = [name for rank, name in self.landing if rank == who]
            if "lead" in self.alive:
                self.lead_do(self.lead.trainer_lost(who, "killed"))
            for name in broken:
                # What it has posted may still land until the receiver cuts it off; the counter fails at once.
                self.receiver_do(name, self.receivers[name].broken(self.attempt_of[name], "writer lost"))

    # ---- what must hold at the end
    def finish(self) -> None:
        """Without further losses everything comes to its end."""
        for _ in range(1000):
            moves = [m for m in self.moves(0) if m[0] == "deliver" or m[1][0] in self.alive]
            if not moves:
                break
            self.move(*moves[0])
        if "lead" in self.alive:
            assert self.lead.phase == "idle" and self.ended == 1
            served = {self.served[name] for name in "ab" if name in self.alive}
            assert len(served) <= 1 or served == {None}
            if self.lead.published == 1:
                assert served <= {1}
            else:
                assert served <= {None}
        for name in "ab":
            if name in self.alive:
                assert self.receivers[name].state == "idle", self.receivers[name].state
                assert (self.served[name] == 1) == (self.receivers[name].version == 1)


@pytest.mark.parametrize("in_place", [False, True])
def test_every_moment_at_which_one_dies(in_place: bool) -> None:
    """Each party is killed before each step of each of many orders."""
    walked = 0
    for seed in range(40):
        rng = random.Random(seed)
        world = World(in_place)
        while world.moves(0):
            for loss in [m for m in world.moves(1) if m[0] in ("kill", "fail", "late")]:
                branch = copy.deepcopy(world)
                branch.move(*loss)
                branch.finish()
                walked += 1
            world.move(*rng.choice(world.moves(0)))
        world.finish()
        assert world.lead.published == 1
    assert walked > 5000


def test_random_orders_and_several_losses(request: pytest.FixtureRequest) -> None:
    for case in range(1500):
        rng = random.Random(request.config.option.seed + case)
        world = World(rng.random() < 0.5)
        losses = rng.randint(0, 3)
        while moves := world.moves(losses and rng.random() < 0.15):
            kind, what = rng.choice(moves)
            losses -= kind in ("kill", "fail", "late")
            world.move(kind, what)
            if losses <= 0 and not world.moves(0):
                break
        world.finish()


def test_time_outs_name_whom_they_waited_for() -> None:
    lead = lm.Lead({0: "t0", 1: "t1"})
    lead.join("a", DIGEST, {"t0": 1, "t1": 1})
    lead.start(1)
    lead.arrived(0, 1, 1)
    assert "trainer rank 1 did not call update()" in lead.timed_out()[-1].problems  # type: ignore[union-attr]
    lead.start(1)
    for rank in (0, 1):
        lead.arrived(rank, 1, 2)
    assert lm.Dismiss("a") in lead.timed_out()  # "a" does not answer: it is dropped, and told so
    assert lead.phase == "idle" and not lead.receivers
    lead.join("a", DIGEST, {"t0": 1, "t1": 1})
    lead.start(1)
    for rank in (0, 1):
        lead.arrived(rank, 1, 3)
    lead.ready("a", 3, 5)
    lead.wrote(0, msg.Wrote(3, {}))
    actions = lead.timed_out()
    assert lead.phase == "stopping" and lm.ToTrainer(1, msg.Stop(3)) in actions
    actions = lead.timed_out()
    assert lm.ToReceiver("a", msg.Abort(3, ("t1",))) in actions  # rank 1 never said that it is quiet
    done = lead.aborted("a", 3)[-1]
    assert isinstance(done, lm.Done) and any("rank 1" in text for text in done.problems)


def test_messages_from_elsewhere() -> None:
    for message in (
        msg.Begin(1, 2, DIGEST, {"a": 3}),
        msg.Wrote(1, {"": "x"}),
        msg.End(1, 2, ("x",)),
        msg.Abort(3, ()),
    ):
        assert msg.decode(msg.encode(message)) == message
    for garbage in (b"", b"RWW1", b"RWW1\xc1", b"xxxx" + msg.encode(msg.Stop(1))[4:], msg.encode(msg.Stop(1))[:-1]):
        with pytest.raises(ValueError):
            msg.decode(garbage)
    machine = rm.ReceiverMachine(DIGEST, in_place=False)
    for actions in (machine.publish(msg.Publish(1, 1)), machine.landed(1), machine.dropped(), machine.verdict(True)):
        assert actions == []
    assert machine.abort(msg.Abort(5, ())) == [rm.Reply(msg.Aborted(5))]
    machine.begin(msg.Begin(4, 1, DIGEST, {}))
    again = machine.begin(msg.Begin(5, 2, DIGEST, {}))
    assert "is receiving version 4" in again[0].message.reason  # type: ignore[union-attr]
