"""The protocol machines of all ranks on a network of plain Python: writes land in any order, ranks die or are given up
at any moment, and every byte lies where the geometry says. No threads, no clocks: a seed is a run."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from railwire.moe import MaskedOutError, MoeConfig
from railwire.moe import actions as p
from railwire.moe.actions import Phase, Wait
from railwire.moe.geometry import Geometry, Header
from railwire.moe.protocol import Machine
from railwire.moe.rows import OutputRows


@dataclass
class Write:
    """One write with an immediate, on its way."""

    source: int
    target: int
    wait: Wait
    generation: int
    region: str
    at: int
    data: np.ndarray
    extra: object = None


@dataclass
class Rank:
    machine: Machine
    dispatch: np.ndarray
    combine: np.ndarray
    arrived: Counter[tuple[Wait, int, int]] = field(default_factory=Counter)
    headers: dict[int, Header] = field(default_factory=dict)
    grants: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    bins: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    rows: OutputRows | None = None
    output: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    fencing: set[int] = field(default_factory=set)
    dead: bool = False


class World:
    """All ranks. Tokens are numbers: a row holds one; the expert of a token is its bin; a result is the number + 1."""

    def __init__(self, config: MoeConfig, seed: int) -> None:
        self.config = config
        self.geometry = Geometry(config)
        self.random = random.Random(seed)
        self.flying: list[Write] = []
        g = self.geometry
        self.ranks = [
            Rank(Machine(g, r), np.zeros(g.dispatch_region, np.uint8), np.zeros(g.combine_region, np.uint8))
            for r in range(config.ranks)
        ]

    # ---- one rank's shell --------------------------------------------------------------------------------------------
    def begin(self, number: int, bins: np.ndarray) -> None:
        """Dispatches one row for each entry of ``bins`` (sorted)."""
        rank, c = self.ranks[number], self.config
        counts = np.bincount(bins, minlength=c.ranks * c.local_experts).reshape(c.ranks, -1)
        rank.bins = bins
        generation = rank.machine.generation + 1
        rank.tokens = (generation * 1000003 + number * 1009 + np.arange(bins.size)).astype(np.uint32)
        rank.headers.clear()
        sent = counts.sum(axis=1)
        actions = rank.machine.dispatch(sent.tolist(), counts[number])
        segments = np.cumsum(sent) - sent
        words = self.geometry.encode_headers(
            rank.machine.generation, sent, segments, rank.machine.next_slot_rows, rank.machine.masked, counts
        )
        rank.segments, rank.words = segments, words  # type: ignore[attr-defined]
        self.run(number, actions)

    def packed(self, number: int, to: int, first: int, rows: int) -> np.ndarray:
        rank, g = self.ranks[number], self.geometry
        out = np.zeros((rows, g.row), np.uint8)
        begin = int(rank.segments[to]) + first  # type: ignore[attr-defined]
        out[:, :4] = rank.tokens[begin : begin + rows].view(np.uint8).reshape(rows, 4)
        return out.reshape(-1)

    def run(self, number: int, actions: list[p.Action]) -> None:
        rank, g, machine = self.ranks[number], self.geometry, self.ranks[number].machine
        gen = machine.generation
        for action in actions:
            match action:
                case p.SendSlot(to, rows, slot_rows):
                    head = rank.words[to].view(np.uint8)  # type: ignore[attr-defined]
                    data = np.concatenate([head, self.packed(number, to, 0, rows)])
                    self.send(number, to, Wait.HEADER, "dispatch", g.slot(number, to, slot_rows), data)
                case p.SendGrant(to, offset, rows):
                    self.send(number, to, Wait.GRANT, "grant", 0, np.zeros(0, np.uint8), (gen, offset, rows))
                case p.SendOverflow(to, first, rows, offset, slot_rows):
                    at = g.overflow(slot_rows, offset)
                    self.send(number, to, Wait.OVERFLOW, "dispatch", at, self.packed(number, to, first, rows))
                case p.SendCombined(to, rows, segment):
                    assert rank.rows is not None
                    data = np.zeros((rows, g.combine_row), np.uint8)
                    results = rank.output[rank.rows.of(to)] + 1
                    data[:, :4] = results.astype(np.uint32).view(np.uint8).reshape(rows, 4)
                    self.send(number, to, Wait.COMBINED, "combine", segment * g.combine_row, data.reshape(-1))
                case p.Plan(counts):
                    rank.rows = OutputRows(self.config, counts)
                    rank.output = np.zeros(rank.rows.rows, np.uint32)
                case p.TakeSlot(source, rows):
                    if source == number:
                        self.take(rank, source, 0, rows, self.packed(number, number, 0, rows))
                    else:
                        at = g.slot(source, number, machine.slot_rows) + g.header
                        self.take(rank, source, 0, rows, rank.dispatch[at : at + rows * g.row])
                case p.TakeOverflow(source, first, rows, offset):
                    at = g.overflow(machine.slot_rows, offset)
                    self.take(rank, source, first, rows, rank.dispatch[at : at + rows * g.row])
                case p.Blank():
                    pass
                case p.Fence(other, _):
                    rank.fencing.add(other)

    def take(self, rank: Rank, source: int, first: int, rows: int, data: np.ndarray) -> None:
        assert rank.rows is not None
        values = data.reshape(rows, self.geometry.row)[:, :4].copy().view(np.uint32).reshape(-1)
        rank.output[rank.rows.of(source, first, rows)] = values

    def send(
        self, source: int, target: int, wait: Wait, region: str, at: int, data: np.ndarray, extra: object = None
    ) -> None:
        generation = self.ranks[source].machine.generation
        assert at >= 0 and (region == "grant" or at + data.size <= getattr(self.ranks[target], region).size)
        self.flying.append(Write(source, target, wait, generation, region, at, data, extra))

    # ---- the network -------------------------------------------------------------------------------------------------
    def land(self, write: Write) -> None:
        """The bytes land; what the immediate says is looked at by step()."""
        target = self.ranks[write.target]
        if write.region == "grant":
            target.grants[write.source] = write.extra  # type: ignore[assignment]
        else:
            memory = getattr(target, write.region)
            memory[write.at : write.at + write.data.size] = write.data
        target.arrived[write.wait, write.source, write.generation] += 1

    def look(self, number: int) -> bool:
        """Feeds one arrival that the machine awaits."""
        rank = self.ranks[number]
        machine = rank.machine
        awaited = sorted(machine.awaiting, key=lambda key: (key[0].value, key[1]))
        self.random.shuffle(awaited)
        for wait, source in awaited:
            key = (wait, source, machine.generation)
            if not rank.arrived[key]:
                continue
            rank.arrived[key] -= 1
            if wait is Wait.HEADER:
                at = self.geometry.slot(source, number, machine.slot_rows)
                words = rank.dispatch[at : at + self.geometry.header].view(np.uint32)
                self.run(number, machine.header(source, self.geometry.decode_header(words, number)))
            elif wait is Wait.GRANT:
                self.run(number, machine.grant(source, *rank.grants[source]))
            elif wait is Wait.OVERFLOW:
                self.run(number, machine.overflow(source))
            else:
                machine.combined(source)
            return True
        return False

    def fence(self, number: int, other: int) -> None:
        """The connection is cut: what is on its way between the two is lost."""
        self.flying = [w for w in self.flying if {w.source, w.target} != {number, other}]
        rank = self.ranks[number]
        rank.fencing.discard(other)
        self.run(number, rank.machine.fenced(other))

    def miss(self, number: int, other: int) -> None:
        """``number`` gives ``other`` up, or finds that ``other`` has given it up."""
        machine = self.ranks[number].machine
        if number in self.ranks[other].machine.masked and not self.ranks[other].dead:
            machine.masked_out()
        else:
            self.run(number, machine.missing(other, "late"))

    def kill(self, number: int) -> None:
        self.ranks[number].dead = True
        self.flying = [w for w in self.flying if w.source != number or self.random.random() < 0.5]

    # ---- whole generations -------------------------------------------------------------------------------------------
    @property
    def alive(self) -> list[int]:
        return [n for n, rank in enumerate(self.ranks) if not rank.dead and rank.machine.phase is not Phase.OUT]

    def random_bins(self) -> np.ndarray:
        c = self.config
        rows = self.random.randint(0, c.max_rows)
        number = c.ranks * c.local_experts
        if self.random.random() < 0.3:
            bins = np.full(rows, self.random.randrange(number))
        else:
            bins = np.array([self.random.randrange(number) for _ in range(rows)], np.int64)
        bins = bins[(bins < c.experts)]
        return np.sort(bins.astype(np.int64))

    def step_towards(self, number: int, loads: dict[int, list[np.ndarray]], faults: bool) -> bool:
        """Something that this rank can do now, and False if nothing."""
        rank = self.ranks[number]
        machine = rank.machine
        if machine.phase is Phase.OUT:
            return False
        if rank.fencing and self.random.random() < 0.5:
            self.fence(number, sorted(rank.fencing)[0])
            return True
        if self.look(number):
            return True
        if machine.phase is Phase.IDLE and len(loads[number]) > 0 and not machine.unfenced:
            self.begin(number, loads[number].pop(0))
            return True
        if machine.phase is Phase.EXPERTS:
            self.check_dispatch(number)
            self.run(number, machine.combine())
            return True
        if faults:
            lost = [source for _, source in machine.awaiting if self.ranks[source].dead]
            lost += [s for _, s in machine.awaiting if number in self.ranks[s].machine.masked]
            lost += [s for _, s in machine.awaiting if self.ranks[s].machine.phase is Phase.OUT]
            if lost:
                self.miss(number, self.random.choice(lost))
                return True
        return False

    def play(self, loads: dict[int, list[np.ndarray]], faults: float = 0.0, most: int = 1) -> None:
        """Until nobody has anything to do. ``faults``: chance at each step that a rank dies or is given up; at most
        ``most`` times."""
        idle = 0
        while idle < 50:
            if faults and most and self.random.random() < faults and len(self.alive) > 2:
                most -= 1
                victim = self.random.choice(self.alive)
                if self.random.random() < 0.6:
                    self.kill(victim)
                else:  # somebody gives up a rank that is only late
                    for number in self.alive:
                        if any(source == victim for _, source in self.ranks[number].machine.awaiting):
                            self.miss(number, victim)
                            break
            if self.flying and self.random.random() < 0.5:
                self.land(self.flying.pop(self.random.randrange(len(self.flying))))
                idle = 0
                continue
            order = list(self.alive)
            self.random.shuffle(order)
            if any(self.step_towards(number, loads, faults > 0) for number in order):
                idle = 0
            elif not self.flying:
                idle += 1
            for number in self.alive:
                self.check_result(number)

    def check_dispatch(self, number: int) -> None:
        """Every row that a live source sent is where it must be."""
        rank = self.ranks[number]
        assert rank.rows is not None
        local = self.config.local_experts
        for source in rank.machine.live:
            other = self.ranks[source]
            if other.machine.generation != rank.machine.generation:
                continue  # it has died, and comes no further
            here = (other.bins >= number * local) & (other.bins < (number + 1) * local)
            assert rank.output[rank.rows.of(source)].tolist() == other.tokens[here].tolist()

    def check_result(self, number: int) -> None:
        """Every result that came back lies in the slot of its token."""
        rank = self.ranks[number]
        if rank.machine.phase is not Phase.IDLE or not rank.machine.generation or rank.bins.size == 0:
            return
        results = rank.combine.reshape(-1, self.geometry.combine_row)[: rank.bins.size, :4].copy().view(np.uint32)
        for source in rank.machine.returned:
            here = rank.bins // self.config.local_experts == source
            assert (results.reshape(-1)[here] == rank.tokens[here] + 1).all()


__all__ = ["MaskedOutError", "World"]
