"""Pairs of vLLM processes, one per connector, and how a client drives the two legs of each.

No router takes part: the client does for each connector what its router does, so that connectors are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

CONTENDERS = ("railwire", "nixl-pull", "nixl-push")
START_SECONDS = 400.0
_names = itertools.count()
_ports = itertools.count(20000 + os.getpid() % 1000 * 12)


def free_port() -> int:
    """None of those that the kernel gives away itself: by the time the server binds it, somebody would have it."""
    for port in _ports:
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("endless")


@dataclass
class Answer:
    """Seconds are counted from sending the first leg."""

    tokens: list[int] = field(default_factory=list)
    first: float = 0.0
    prefilled: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class Placement:
    """How the machine is shared out, the same for all contenders."""

    cores: int = 1  # that each engine computes with
    bound: bool = True
    nap: bool = True

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--cores", type=int, default=1, metavar="N", help="each engine computes with N threads (1)")
        parser.add_argument("--unbound", action="store_true", help="bind nothing to cores: side threads find another")
        parser.add_argument("--no-nap", action="store_true", help="leave sched_yield() as it is: for many cores")

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Placement:
        return cls(arguments.cores, not arguments.unbound, not arguments.no_nap)

    @property
    def roomy(self) -> bool:
        """All pairs can start at once."""
        return (os.cpu_count() or 1) >= 4 * len(CONTENDERS)

    def environment(self, place: int) -> dict[str, str]:
        """Place 0 has the first cores, place 1 the next."""
        cores = f"{place * self.cores}-{(place + 1) * self.cores - 1}" if self.bound else "nobind"
        variables = {"VLLM_CPU_OMP_THREADS_BIND": cores, "OMP_NUM_THREADS": str(self.cores)}
        if self.nap:
            variables["LD_PRELOAD"] = str(Path(sys.prefix) / "lib" / "nap_instead_of_yield.so")
        return variables


class Server:
    """One vLLM process group."""

    def __init__(
        self,
        name: str,
        transfer: dict[str, Any],
        model: Path,
        folder: Path,
        flags: list[str],
        variables: dict[str, str],
    ) -> None:
        self.name = name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{name}.log"
        self.command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(self.port),
            "--host", "127.0.0.1", "--served-model-name", "m", "--enforce-eager", "--no-enable-prefix-caching",
            "--disable-uvicorn-access-log", "--kv-transfer-config", json.dumps(transfer), *flags,
        ]  # fmt: skip
        self.environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "UCX_TLS": "shm,tcp,self",
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            **variables,
        }
        self.side_port = int(self.environment["VLLM_NIXL_SIDE_CHANNEL_PORT"])
        self.process: subprocess.Popen[bytes] | None = None

    def set_engine_id(self, engine_id: str) -> None:
        at = self.command.index("--kv-transfer-config") + 1
        transfer = json.loads(self.command[at])
        if "engine_id" in transfer:
            self.command[at] = json.dumps({**transfer, "engine_id": engine_id})

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    def ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process is None or self.process.poll() is not None:
                raise SystemExit(f"{self.name} has ended:\n{self.log.read_text(errors='replace')[-3000:]}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5.0) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                pass
            time.sleep(0.5)
        raise SystemExit(f"{self.name} does not come up; see {self.log}")

    def metric(self, name: str) -> float:
        """Sum over the labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10.0) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))

    def kill(self) -> None:
        """SIGKILL to all of it."""
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.wait(30)

    def signal(self, number: signal.Signals) -> None:
        """To all of it."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)


def end_on_sigterm() -> None:
    """As at Ctrl-C: what has been started is killed on the way out."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class Pair:
    """A prefill and a decode process with one connector."""

    def __init__(
        self,
        contender: str,
        model: Path,
        folder: Path,
        flags: list[str],
        placement: Placement,
        trace: Path | None = None,
    ) -> None:
        self.contender = contender
        self.engine_id = f"{contender}-p"
        servers = []
        for place, role in enumerate(("kv_producer", "kv_consumer")):
            if contender == "railwire":
                transfer: dict[str, Any] = {
                    "kv_connector": "RailwireConnector",
                    "kv_connector_module_path": "railwire.integrations.vllm",
                    "kv_connector_extra_config": {"nics": ["tcp://127.0.0.1", "shm"]},
                }
                if trace is not None and role == "kv_producer":
                    transfer["kv_connector_extra_config"]["trace"] = str(trace)
            else:
                transfer = {"kv_connector": "NixlPushConnector" if contender == "nixl-push" else "NixlConnector"}
                transfer["engine_id"] = self.engine_id if role == "kv_producer" else f"{contender}-d"
            transfer["kv_role"] = role
            variables = placement.environment(place)
            servers.append(Server(f"{contender}-{role[3:]}", transfer, model, folder, flags, variables))
        self.prefill, self.decode = servers
        self.prefiller: dict[str, Any] | None = None  # Railwire's descriptors, from the first answer

    def restart(self) -> None:
        """The prefill process again, on its port; a new life of it, as any operator would have."""
        self.engine_id = f"{self.contender}-p{next(_names)}"
        self.prefill.set_engine_id(self.engine_id)
        self.prefill.start()

    def rest(self, resting: bool) -> None:
        """Stopped, it takes nothing from the cores that another is measured on: some spin when they have no work."""
        for server in (self.prefill, self.decode):
            server.signal(signal.SIGSTOP if resting else signal.SIGCONT)

    async def learn(self, http: aiohttp.ClientSession) -> None:
        """Makes the handshake, so that no measured request has to."""
        self.prefiller = None
        params = {"do_remote_decode": True}
        prompt = list(range(5, 40))
        body = {
            "model": "m",
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0,
            "kv_transfer_params": params,
        }
        if self.contender == "railwire":
            async with http.post(f"{self.prefill.url}/v1/completions", json=body) as response:
                answer = await response.json()
            self.prefiller = answer["kv_transfer_params"]["prefiller"]
            await self._decode(http, prompt, 1, {}, answer["kv_transfer_params"], Answer(), time.monotonic())
        else:
            await self.ask(http, prompt, 1)

    async def ask(self, http: aiohttp.ClientSession, prompt: list[int], max_tokens: int) -> Answer:
        """One request, as this connector's router sends it."""
        answer = Answer()
        began = time.monotonic()
        name = f"bench-{os.getpid()}-{next(_names)}"
        headers = {"X-Request-Id": name}
        if self.contender == "nixl-pull":
            params = await self._prefill(http, prompt, headers, {"do_remote_decode": True}, answer, began)
            await self._decode(http, prompt, max_tokens, headers, params, answer, began)
            return answer
        if self.contender == "nixl-push":
            leg: dict[str, Any] = {"do_remote_decode": True}
            other: dict[str, Any] = {
                "do_remote_prefill": True,
                "remote_engine_id": self.engine_id,
                "remote_request_id": f"cmpl-{name}-0",  # without it the decode engine dies of a KeyError
                "remote_host": "127.0.0.1",
                "remote_port": self.prefill.side_port,
                "tp_size": 1,
            }
        else:
            leg = {"do_remote_decode": True, "transfer_id": name}
            other = {"do_remote_prefill": True, "transfer_id": name, "prefiller": self.prefiller}
        legs = [
            asyncio.create_task(self._prefill(http, prompt, headers, leg, answer, began)),
            asyncio.create_task(self._decode(http, prompt, max_tokens, headers, other, answer, began)),
        ]
        try:
            await asyncio.gather(*legs)
        finally:
            for task in legs:
                task.cancel()
            await asyncio.gather(*legs, return_exceptions=True)
        return answer

    async def _prefill(
        self,
        http: aiohttp.ClientSession,
        prompt: list[int],
        headers: dict[str, str],
        params: dict[str, Any],
        answer: Answer,
        began: float,
    ) -> dict[str, Any]:
        body = {"model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0, "kv_transfer_params": params}
        async with http.post(f"{self.prefill.url}/v1/completions", json=body, headers=headers) as response:
            if response.status != 200:
                raise RuntimeError(f"prefill: HTTP {response.status} {(await response.text())[:200]}")
            result: dict[str, Any] = await response.json()
        answer.prefilled = time.monotonic() - began
        return result.get("kv_transfer_params") or {}

    async def _decode(
        self,
        http: aiohttp.ClientSession,
        prompt: list[int],
        max_tokens: int,
        headers: dict[str, str],
        params: dict[str, Any],
        answer: Answer,
        began: float,
    ) -> None:
        body = {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "return_token_ids": True, "kv_transfer_params": params}
        async with http.post(f"{self.decode.url}/v1/completions", json=body, headers=headers) as response:
            if response.status != 200:
                raise RuntimeError(f"decode: HTTP {response.status} {(await response.text())[:200]}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(f"decode: {chunk['error']}")
                for choice in chunk.get("choices", ()):
                    if choice.get("finish_reason") in ("error", "abort"):
                        raise RuntimeError("decode: the request failed")
                    ids = choice.get("token_ids") or []
                    if ids and not answer.tokens:
                        answer.first = time.monotonic() - began
                    answer.tokens += ids
        answer.total = time.monotonic() - began

    async def alone(self, http: aiohttp.ClientSession, prompt: list[int], max_tokens: int) -> list[int]:
        """The answer of one process that computes all of it."""
        answer = Answer()
        await self._decode(http, prompt, max_tokens, {}, {}, answer, time.monotonic())
        return answer.tokens
