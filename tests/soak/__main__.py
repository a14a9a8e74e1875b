"""The soak test: engines in several processes connect, write, are stopped, killed, forked and closed, in every state.

::

    python tests/soak --seconds 3600 --nic tcp --nic shm --nic sim --seed 7

Members (member.py) lend each other memory and check every byte, count, end and fence. This process kills and stops
them, starts others in their place, and looks that those that may run do. On ``sim`` all members live in one process,
on a simulated wire with faults of its own. The seeds of a run that found something are printed; the threads of
processes run as they like, so a seed makes a run alike, not equal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from subprocess import Popen

sys.path.insert(0, str(Path(__file__).resolve().parent))

from checks import Bench, Violation
from member import LIVENESS, Member, spawn

from railwire.testing import SimulatedFabric

NICS = {"tcp": "tcp://127.0.0.1", "shm": "shm"}
SILENT_SECONDS = 60.0  # a member that may run and shows no sign of it for so long hangs
END_SECONDS = 120.0  # a member is to end its life so long after its time at most


class Processes:
    """Members in processes of their own, and what is done to them."""

    def __init__(self, nic: str, seed: int, members: int, seconds: float, directory: Path) -> None:
        self.nic = NICS.get(nic, nic)
        self.rng = random.Random(seed)
        self.directory = directory
        self.end = time.monotonic() + seconds
        self.counts: Counter[str] = Counter()
        self.violations: list[str] = []
        self._born = 0
        self._members: dict[str, tuple[Popen[str], float]] = {}
        for _ in range(members):
            self._start()

    def _start(self) -> None:
        self._born += 1
        name = f"m{self._born}"
        left = max(self.end - time.monotonic(), 1.0)
        self._members[name] = (
            spawn(name, self.directory, self.nic, self.rng.getrandbits(32), left),
            time.monotonic(),
        )

    def run(self) -> None:
        members = len(self._members)
        while time.monotonic() < self.end - 2:
            time.sleep(self.rng.uniform(0.2, 2.0))
            self._look()
            while len(self._members) < members:
                self._start()
            name = self.rng.choice(list(self._members))
            process = self._members[name][0]
            dice = self.rng.random()
            if dice < 0.15:
                process.kill()
                process.wait()
                self._gone(name, killed=True)
                self.counts["killed"] += 1
            elif dice < 0.45:
                # Shorter or longer than the liveness time, so that it is a pause to the others, or a loss.
                process.send_signal(signal.SIGSTOP)
                time.sleep(self.rng.choice([0.01, 0.3, 0.8 * LIVENESS, 2.5 * LIVENESS]))
                process.send_signal(signal.SIGCONT)
                self.counts["stopped"] += 1
        deadline = time.monotonic() + END_SECONDS
        for name in list(self._members):
            try:
                self._members[name][0].wait(max(deadline - time.monotonic(), 1.0))
            except Exception:
                self._hangs(name, "does not end")
            else:
                self._gone(name)

    def _look(self) -> None:
        now = time.monotonic()
        for name, (process, born) in list(self._members.items()):
            if process.poll() is not None:
                self._gone(name)
                continue
            beat = self.directory / f"{name}.beat"
            last = float(beat.read_text()) if beat.exists() else born
            if now - last > SILENT_SECONDS:
                self._hangs(name, f"has shown no sign of life for {now - last:.0f} s")

    def _hangs(self, name: str, how: str) -> None:
        process = self._members[name][0]
        process.send_signal(signal.SIGABRT)  # faulthandler tells where each thread is
        process.wait()
        self.violations.append(f"{name} {how}")
        self._gone(name, killed=True)

    def _gone(self, name: str, killed: bool = False) -> None:
        process, _ = self._members.pop(name)
        (self.directory / name).unlink(missing_ok=True)
        out = process.stdout.read() if process.stdout else ""
        if not killed and process.returncode not in (0, 3):
            self.violations.append(f"{name} ended with {process.returncode}")
        for line in out.splitlines():
            if line.startswith("{"):
                self.counts.update(json.loads(line))
        for line in (self.directory / f"{name}.log").read_text().splitlines():
            if line.startswith("VIOLATION"):
                self.violations.append(line)
                self.end = min(self.end, time.monotonic() + 10)


async def simulated(seed: int, members: int, seconds: float, directory: Path, bench: Bench) -> None:
    """All members in this process, on a wire that breaks, loses, reorders and delays."""
    rng = random.Random(seed)
    resumable = rng.random() < 0.5
    reorder = not resumable and rng.random() < 0.7
    with SimulatedFabric(
        seed=seed,
        reorder=reorder,
        resumable=resumable,
        max_delay_us=rng.choice([0, 50, 500]),
        write_failure_rate=rng.choice([0, 0.002]),
        link_break_rate=rng.choice([0, 0.002]),
        message_loss_rate=rng.choice([0, 0.02]),
        completion_proves_landing=resumable or rng.random() < 0.5,
        max_write_bytes=rng.choice([1000, 1 << 40]),
        link_depth=rng.choice([4, 256]),
        max_message_bytes=rng.choice([1500, 65536]),
    ) as fabric:

        def nics() -> list[str]:
            return [fabric.nic(f"n{bench.number()}") for _ in range(rng.randrange(1, 4))]

        clock = asyncio.create_task(bench.clock.run())
        all_members = [Member(bench, f"s{i}", directory, nics, random.Random(seed + i)) for i in range(members)]
        for member in all_members:
            await member.open()
        end = time.monotonic() + seconds
        while time.monotonic() < end and not bench.violations:
            await asyncio.sleep(rng.uniform(0.1, 1.0))
            dice = rng.random()
            if dice < 0.15:
                member = rng.choice(all_members)
                if member.engine is not None:
                    fabric.kill(rng.choice(member.engine.nics).name.rpartition("/")[2])
                    bench.count("NICs killed")
            elif dice < 0.4:
                member = rng.choice(all_members)
                await member.close()
                await member.open()
        for member in all_members:
            await member.close()
        clock.cancel()


def soak(nic: str, seed: int, members: int, seconds: float, keep: bool) -> bool:
    """One run; True if nothing was found."""
    directory = Path(tempfile.mkdtemp(prefix="railwire-soak-"))
    print(f"soak: {nic}, {seconds:g} s, --seed {seed}", flush=True)
    if nic == "sim":
        bench = Bench("sim")
        # A wire lasts some seconds, so that many kinds of it are tried.
        end, lap = time.monotonic() + seconds, seed
        while (left := end - time.monotonic()) > 1 and not bench.violations:
            try:
                asyncio.run(simulated(lap, members, min(left, 20.0), directory, bench))
            except Violation as error:
                bench.wrong(str(error))
            if bench.violations:
                print(f"  with --seed {lap}")
            lap += 1
        counts, violations = Counter(bench.counts), bench.violations
    else:
        run = Processes(nic, seed, members, seconds, directory)
        run.run()
        counts, violations = run.counts, run.violations
    print("  " + ", ".join(f"{what}: {n}" for what, n in sorted(counts.items())))
    if not counts["arrived"]:
        violations.append("nothing ever arrived")
    for violation in violations:
        print(f"  FOUND: {violation}")
    if violations or keep:
        print(f"  logs in {directory}; again with --nic {nic} --seed {seed}")
    else:
        shutil.rmtree(directory)
    return not violations


def main() -> None:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of all NICs together")
    parser.add_argument("--nic", action="append", help="tcp, shm, sim, or any name that nics= takes; again for another")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--members", type=int, default=3, help="engines at a time")
    parser.add_argument("--keep", action="store_true", help="the members' logs")
    options = parser.parse_args()
    nics = options.nic or ["tcp", "shm", "sim"]
    well = [soak(nic, options.seed, options.members, options.seconds / len(nics), options.keep) for nic in nics]
    sys.exit(0 if all(well) else 1)


if __name__ == "__main__":
    main()
