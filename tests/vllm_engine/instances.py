"""vLLM instances with the Railwire connector as processes, what they say of themselves, and requests to them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import models

from railwire.runner import export, weights

START_SECONDS = 240.0  # three of them start on two cores
BUILD = Path(__file__).resolve().parents[2] / "build" / "models"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def smollm2() -> Path:
    """The model folder; made once."""
    folder = BUILD / "smollm2"
    if not (folder / "tokenizer_config.json").is_file():
        export.export("smollm2", folder)
    return folder


def small(folder: Path) -> Path:
    """A Llama of random weights with four KV heads, whose answers depend on all of its context."""
    loaded = weights.tiny(torch.float32, vocab=512, hidden=256, layers=4, q_heads=8, kv_heads=4, head_dim=32)
    tokenizer = tokenizers.Tokenizer(models.WordLevel({f"t{i}": i for i in range(512)}, unk_token="t0"))
    export.write(loaded.config, tokenizer.to_str(), loaded.tensors, folder, torch.float32)
    return folder


class Instance:
    """One process group: `railwire serve ROLE`, and what it starts."""

    def __init__(self, name: str, arguments: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
        self.name = name
        self.arguments = list(arguments)
        self.log = folder / f"{name}.log"
        self.port = int(arguments[arguments.index("--port") + 1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Instance:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAILWIRE_")}
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # /reset_prefix_cache
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            # More processes spin than there are cores.
            "LD_PRELOAD": str(Path(sys.prefix) / "lib" / "nap_instead_of_yield.so"),
            **self.environment,
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from railwire.cli import app; app()", "serve", *self.arguments],
                stdout=log,
                stderr=log,
                env=environment,
            )
        return self

    def ready(self, seconds: float = START_SECONDS) -> Instance:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process is not None and self.process.poll() is None, f"{self.name} has ended:\n{self.text()}"
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5.0) as answer:
                if answer.status == 200:
                    return self
            time.sleep(0.5)
        raise AssertionError(f"{self.name} does not come up:\n{self.text()}")

    def text(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def metric(self, name: str) -> float:
        """Sum over the labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10.0) as response:
            text = response.read().decode()
        found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        return sum(float(value) for value in found)

    def reset_prefix_cache(self) -> None:
        urllib.request.urlopen(
            urllib.request.Request(f"{self.url}/reset_prefix_cache", method="POST"), timeout=30.0
        ).close()

    def kill(self) -> None:
        """SIGKILL to everything that it consists of, at once: the host is gone."""
        assert self.process is not None
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)

    def stop(self, timeout: float = 60.0) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in listing.read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


class Cluster:
    """A router and vLLM instances."""

    def __init__(self, folder: Path, model: Path, options: Sequence[str] = ()) -> None:
        self.folder = folder
        self.model = model
        self.store = f"tcpstore://127.0.0.1:{free_port()}"
        self.options = list(options)
        self.instances: list[Instance] = []
        arguments = ["router", "--port", str(free_port()), "--runner", "vllm", "--model", str(model)]
        self.router = self._add("router", [*arguments, "--membership", self.store], {})

    def add(self, name: str, core: int, *extra: str) -> Instance:
        """A prefiller or decoder (by its name), bound to a core."""
        role = name.rstrip("0123456789")
        arguments = [role, "--port", str(free_port()), "--runner", "vllm", "--model", str(self.model)]
        arguments += ["--membership", self.store, "--nic", "tcp://127.0.0.1", "--nic", "shm", "--liveness", "2"]
        arguments += ["--ttl", "3"]
        for option in ["dtype=float32", "enforce-eager=true", "max-model-len=2048", *self.options]:
            arguments += ["--runner-option", option]
        return self._add(name, [*arguments, *extra], {"VLLM_CPU_OMP_THREADS_BIND": str(core)})

    def _add(self, name: str, arguments: Sequence[str], environment: dict[str, str]) -> Instance:
        instance = Instance(name, arguments, self.folder, environment)
        self.instances.append(instance)
        return instance

    def members(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.router.url}/members", timeout=10.0) as response:
            body: dict[str, Any] = json.loads(response.read())
        members: list[dict[str, Any]] = body["members"]
        return members

    def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it does not come about:\n" + "\n".join(i.text() for i in self.instances)
            time.sleep(0.2)

    def sees(self, prefillers: int, decoders: int) -> bool:
        roles = [member["role"] for member in self.members() if member["state"] == "ready"]
        return roles.count("prefill") == prefillers and roles.count("decode") == decoders

    def close(self) -> None:
        for instance in reversed(self.instances):
            if instance.process is not None and instance.process.poll() is None:
                instance.kill()


def complete(url: str, model: str, prompt: Any, timeout: float = 120.0, **more: Any) -> dict[str, Any]:
    """One completion, whole; greedy. Token ids are asked for."""
    body = {"model": model, "prompt": prompt, "temperature": 0, "return_token_ids": True, **more}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            answer: dict[str, Any] = json.loads(response.read())
            return answer
    except urllib.error.HTTPError as error:
        raise AssertionError(f"HTTP {error.code}: {error.read().decode(errors='replace')[:2000]}") from error


def tokens_of(answer: dict[str, Any]) -> list[int]:
    ids: list[int] = answer["choices"][0]["token_ids"]
    return ids
