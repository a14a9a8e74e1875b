"""Catching up, walked: one receiver's machine, two holders and a lead, whose events come in any order. Whatever is
served has landed as a whole; no update begins while a holder may still write; every Begin is answered.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from railwire.weights import lead_machine as lm
from railwire.weights import messages as msg
from railwire.weights import receiver_machine as rm

DIGEST = b"d" * 16
HOLDERS = frozenset({"x", "y"})


class World:
    """The receiver's memory has three parts: of the holders x and y, which together are everything, or of trainer t."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.machine = rm.ReceiverMachine(DIGEST, in_place=rng.random() < 0.5)
        self.published = 1  # what holders serve
        self.version = 1  # the lead's
        self.attempt = 0
        self.memory: dict[str, int] = {}  # who wrote here -> of which version
        self.served: int | None = None
        self.gifts: dict[str, int] = {}  # writes of holders that may still land -> version when they began
        self.spoilt: set[str] = set()  # holders whose memory has changed since
        self.done: set[str] = set()
        self.catching = 0
        self.update: str = ""  # "", begun, ready, decided
        self.asked: set[int] = set()  # attempts of updates that wait for an answer
        self.applied: list[int] = []

    def do(self, actions: list[Any]) -> None:
        machine = self.machine
        for action in actions:
            match action:
                case rm.Fetch(attempt):
                    assert attempt == self.catching and not self.gifts
                    self.memory = {}
                    self.gifts = dict.fromkeys(HOLDERS, self.published)
                    self.spoilt, self.done = set(), set()
                    if machine.in_place:
                        self.served = None
                case rm.Expect(attempt, _):
                    assert not self.gifts, "an update begins while a holder may still write"
                    self.asked.discard(attempt)
                    self.memory, self.update = {}, "ready"
                    if machine.in_place:
                        self.served = None
                case rm.Apply(version):
                    assert not self.gifts and not ("t" not in self.memory and self.wrong)
                    assert self.memory in ({"t": version}, dict.fromkeys(HOLDERS, version)), self.memory
                    assert not self.memory.keys() & self.spoilt
                    assert not self.applied or version >= self.applied[-1]
                    self.served = version
                    self.applied.append(version)
                case rm.Drop():
                    assert machine.state == "dropping"
                    self.dropping = True
                case rm.Reply(msg.Refused(attempt, _)):
                    self.asked.discard(attempt)
                    self.update = ""
                case rm.Reply(msg.Has(attempt)):
                    assert self.served == self.version
                    self.had += 1
                    self.asked.discard(attempt)
                    self.update = ""
                case rm.Reply(msg.Aborted(attempt)):
                    self.asked.discard(attempt)
                    self.update = ""
                case rm.Differs():
                    assert self.wrong
        assert machine.version in (self.served, None)

    dropping = False
    wrong = False
    had = 0

    def moves(self) -> list[str]:
        found = ["publish elsewhere"] if not self.update else []
        machine = self.machine
        if machine.state == "idle":
            found += ["catch"] * 3
        if not self.update:
            found += ["begin", "welcome"]
        if self.dropping:
            found += ["cut off"] * 2
        found += [f"land {who}" for who in sorted(self.gifts)]
        found += [f"say {who}" for who in sorted(self.done)]
        if machine.state == "catching":
            found += ["spoil"] * bool(machine.holders) + ["not caught", "stale"]
            if not self.gifts:
                found += ["all landed"] * 3
        if self.update in ("begun", "ready"):
            found += ["abort"]
        if self.update == "ready" and machine.state == "receiving":
            found += ["written"] * 3
        if machine.state == "landed":
            found += ["decide"] * 3
        found += ["lead lost"] if self.rng.random() < 0.1 else []
        return found

    def move(self, what: str) -> None:
        machine = self.machine
        kind, _, who = what.partition(" ")
        match kind:
            case "publish":
                self.published += 1
                self.version = self.published
                self.spoilt |= machine.holders  # who have said that they gave were in time
            case "catch":
                self.catching += 1
                self.wrong = False
                self.do(machine.catch(self.published, self.catching, HOLDERS, here=True))
            case "begin" | "welcome":
                self.attempt += 1
                again = kind == "welcome"
                self.version = self.published if again else self.published + 1
                self.update = "begun"
                self.asked.add(self.attempt)
                self.do(machine.begin(msg.Begin(self.version, self.attempt, DIGEST, {"t": 1}, False, again)))
            case "cut":
                self.dropping = False
                self.gifts, self.memory = {}, {}
                self.do(machine.dropped())
            case "land":
                version = self.gifts.pop(who)
                self.memory[who] = version if who not in self.spoilt else -1
                self.done.add(who)
            case "say":
                self.done.discard(who)
                if who in self.spoilt:
                    self.do(machine.not_caught(self.catching))
                else:
                    lie = self.rng.random() < 0.05
                    self.wrong |= lie
                    self.do(machine.gave(who, self.catching, 5 + lie))
            case "spoil":  # an update reaches one that has not said yet that it gave
                self.spoilt.add(self.rng.choice(sorted(machine.holders)))
            case "all":
                self.do(machine.caught(self.catching, 10))
            case "not":
                self.do(machine.not_caught(self.catching))
            case "stale":
                for actions in (
                    machine.gave("x", self.catching - 1, 5), machine.gave("z", self.catching, 5),
                    machine.caught(self.catching - 1, 10), machine.not_caught(self.catching - 1),
                ):  # fmt: skip
                    assert actions == []
            case "written":
                self.memory = {"t": self.version}
                self.do(machine.landed(self.attempt))
            case "decide":
                self.published, self.update = self.version, ""
                self.do(machine.publish(msg.Publish(self.version, self.attempt)))
            case "abort":
                self.do(machine.abort(msg.Abort(self.attempt, ())))
            case "lead":
                self.asked, self.update = set(), ""
                self.do(machine.lead_lost())
                if machine.state == "asking":
                    self.do(machine.verdict(False))

    def finish(self) -> None:
        for _ in range(50):
            if self.dropping:
                self.move("cut off")
            elif self.machine.state == "catching":
                self.move("not caught")
            elif self.machine.state in ("receiving", "landed"):
                self.move("abort")
            else:
                break
        assert self.machine.state == "idle" and not self.asked
        self.published += 1
        self.catching += 1
        self.wrong = False
        self.do(self.machine.catch(self.published, self.catching, HOLDERS, here=False))
        for who in sorted(HOLDERS):
            self.move(f"land {who}")
        self.do(self.machine.caught(self.catching, 10))
        for who in sorted(HOLDERS):
            self.do(self.machine.gave(who, self.catching, 5))
        assert self.machine.version == self.served == self.published


def test_catching_up_among_updates(request: pytest.FixtureRequest) -> None:
    seed, applied, had, kinds = request.config.option.seed, 0, 0, set()
    for case in range(3000):
        world = World(random.Random(seed + case))
        for _ in range(40):
            what = world.rng.choice(world.moves())
            kinds.add(what.split()[0])
            world.move(what)
        world.finish()
        applied += len(world.applied)
        had += world.had
    assert applied > 3000 and had > 300 and len(kinds) == 15


def test_who_has_caught_up_does_not_hold_up_a_welcome() -> None:
    lead = lm.Lead({0: "t0"})
    lead.join("a", DIGEST, {"t0": 1})
    lead.start(1)
    lead.arrived(0, 1, 1)
    lead.ready("a", 1, 7)
    lead.wrote(0, msg.Wrote(1, {}))
    lead.landed("a", 1)
    lead.decided(True)
    lead.published_by("a", 1)
    for name in "bc":
        lead.join(name, DIGEST, {"t0": 1})
    lead.start(1, only_new=True)
    begun = lead.arrived(0, 1, 2)
    assert [(a.name, a.message.again) for a in begun if isinstance(a, lm.ToReceiver)] == [("b", True), ("c", True)]
    assert lead.has("a", 2) == [] and lead.has("b", 1) == []
    lead.ready("b", 2, 8)
    go = lead.has("c", 2)
    assert go == [lm.ToTrainer(0, msg.Go(1, 2, {"b": 8}))] and lead.current == {"a", "c"}
    lead.wrote(0, msg.Wrote(2, {}))
    lead.landed("b", 2)
    lead.decided(True)
    assert lead.current == {"a", "b", "c"}
    done = lead.published_by("b", 2)
    assert done[-1] == lm.Done(1, ())
    lead.start(2)
    lead.arrived(0, 2, 3)
    assert lead.has("a", 3) == [] and lead.phase == "beginning"  # no answer to an update
