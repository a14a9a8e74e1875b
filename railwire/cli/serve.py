"""`railwire serve`: prefill workers, decode workers and the router of a disaggregated model, each a process."""

from __future__ import annotations

from typing import Any, Literal

import typer

app = typer.Typer(no_args_is_help=True, help="Serve a model with prefill and decode in different processes.")

_DEFAULT_MEMBERSHIP = "tcpstore://127.0.0.1:29600"


def _option(default: Any, flag: str, text: str, **more: Any) -> Any:
    """A flag that an environment variable RAILWIRE_* can set, too."""
    name = "RAILWIRE_" + flag.lstrip("-").split("/")[0].replace("-", "_").upper()
    return typer.Option(default, flag, envvar=name, help=text, **more)


def _log_level(name: str) -> str:
    if name.lower() not in ("debug", "info", "warning", "error"):
        raise typer.BadParameter(f"{name!r} is not one of debug, info, warning, error")
    return name


Host = _option("127.0.0.1", "--host", "Address to listen on.")
Port = _option(0, "--port", "Port to listen on; 0 takes a free one.", min=0, max=65535)
Advertise = _option("", "--advertise", "URL under which the others reach this process; default http://HOST:PORT.")
Registry = _option(
    _DEFAULT_MEMBERSHIP,
    "--membership",
    "tcpstore://HOST:PORT (the router keeps it, at this address alone), or etcd://[USER@]HOST:PORT, etcds:// with TLS; "
    "the password of USER by RAILWIRE_ETCD_PASSWORD.",
)
Ttl = _option(5.0, "--ttl", "Seconds after which a silent worker is no member any more.", min=1.0)
Drain = _option(30.0, "--drain-timeout", "Seconds that running requests have to end after SIGTERM.", min=0.0)
LogLevel = _option("info", "--log-level", "debug, info, warning or error.", callback=_log_level)
RunnerName = _option("reference", "--runner", "reference or vllm (docs/vllm.md).")
Model = _option(
    "smollm2", "--model", "smollm2, tiny (random weights), or the path of a GGUF file; for vllm: its model folder."
)
Options = _option(
    [],
    "--runner-option",
    "NAME=VALUE for the runner, such as num_blocks=1024; for vllm: a flag of vllm serve, max-model-len=2048 or "
    "enforce-eager=true; repeatable.",
)
ModelName = _option("", "--model-name", "What clients call the model; default: that of --model.")
Nics = _option([], "--nic", "NIC of the engine, such as tcp://127.0.0.1 or shm; repeatable; default: automatic.")
Device = _option("cpu", "--device", "cpu or cuda:N: which NICs are near.")
Liveness = _option(5.0, "--liveness", "Seconds of silence after which the other side counts as dead.", min=0.05)
Secret = _option(
    "", "--secret", "Shared by all workers and routers; better by RAILWIRE_SECRET than by flag.", show_default=False
)
TicketTimeout = _option(
    30.0, "--ticket-timeout", "Seconds to wait for what the other side of a transfer has not announced.", min=0.1
)
BlockTimeout = _option(
    20.0, "--block-timeout", "Seconds that a prefill waits for free KV blocks, once it is its turn.", min=0.1
)
MaxWaiting = _option(256, "--max-waiting", "Requests that may wait; more are turned away.", min=0)


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("aiohttp", "prometheus_client") if find_spec(name) is None]
    if missing:
        typer.echo(f"railwire serve needs {' and '.join(missing)}: pip install 'railwire[kvcache]'", err=True)
        raise typer.Exit(1)


def _parse_options(pairs: list[str]) -> dict[str, Any]:
    from railwire.errors import ConfigurationError
    from railwire.serve.config import parse_options

    try:
        return parse_options(pairs)
    except ConfigurationError as error:
        raise typer.BadParameter(str(error)) from error


def _run_worker(role: Literal["prefill", "decode"], flags: dict[str, Any]) -> None:
    """`flags` are those of the command, by the names of :class:`WorkerConfig` but for two."""
    _check_installed()
    from railwire.serve.config import WorkerConfig
    from railwire.serve.process import run

    options, nics = _parse_options(flags.pop("runner_option")), tuple(flags.pop("nic"))
    config = WorkerConfig(options=options, nics=nics, **flags)
    if config.runner == "vllm":
        from railwire.serve import vllm

        run(lambda: vllm.main(config, role), config.log_level)
    elif role == "prefill":
        from railwire.serve import prefill as prefill_worker

        run(lambda: prefill_worker.main(config), config.log_level)
    else:
        from railwire.serve import decode as decode_worker

        run(lambda: decode_worker.main(config), config.log_level)


@app.command()
def prefill(
    context: typer.Context,
    host: str = Host,
    port: int = Port,
    advertise: str = Advertise,
    membership: str = Registry,
    ttl: float = Ttl,
    drain_timeout: float = Drain,
    log_level: str = LogLevel,
    runner: str = RunnerName,
    model: str = Model,
    runner_option: list[str] = Options,
    model_name: str = ModelName,
    nic: list[str] = Nics,
    device: str = Device,
    liveness: float = Liveness,
    secret: str = Secret,
    ticket_timeout: float = TicketTimeout,
    block_timeout: float = BlockTimeout,
    max_waiting: int = MaxWaiting,
    chunk: int = _option(256, "--chunk", "Tokens computed at a time.", min=1),
) -> None:
    """Run a prefill worker: computes the KV of prompts and pushes it to decode workers, layer by layer."""
    _run_worker("prefill", dict(context.params))


@app.command()
def decode(
    context: typer.Context,
    host: str = Host,
    port: int = Port,
    advertise: str = Advertise,
    membership: str = Registry,
    ttl: float = Ttl,
    drain_timeout: float = Drain,
    log_level: str = LogLevel,
    runner: str = RunnerName,
    model: str = Model,
    runner_option: list[str] = Options,
    model_name: str = ModelName,
    nic: list[str] = Nics,
    device: str = Device,
    liveness: float = Liveness,
    secret: str = Secret,
    ticket_timeout: float = TicketTimeout,
    block_timeout: float = BlockTimeout,
    max_waiting: int = MaxWaiting,
    max_batch: int = _option(32, "--max-batch", "Sequences per decode step.", min=1),
    checksum: bool = _option(False, "--checksum/--no-checksum", "Verify every page that arrives."),
) -> None:
    """Run a decode worker: takes the KV of prompts from prefill workers, and generates."""
    _run_worker("decode", dict(context.params))


@app.command()
def router(
    host: str = Host,
    port: int = _option(8000, "--port", "Port to listen on; 0 takes a free one.", min=0, max=65535),
    membership: str = Registry,
    secret: str = Secret,
    host_store: bool = _option(True, "--host-store/--no-host-store", "Keep the TCPStore of --membership here."),
    drain_timeout: float = Drain,
    log_level: str = LogLevel,
    runner: str = RunnerName,
    model: str = Model,
    runner_option: list[str] = Options,
    max_attempts: int = _option(4, "--max-attempts", "Attempts per request.", min=1),
    request_timeout: float = _option(600.0, "--request-timeout", "Seconds for a request.", min=0.1),
    event_timeout: float = _option(15.0, "--event-timeout", "Seconds of a decoder's silence.", min=3.0),
    max_active: int = _option(1024, "--max-active", "Prompts worked on at once.", min=1),
    resume: bool = _option(True, "--resume/--no-resume", "Continue elsewhere what broke off after its first token."),
) -> None:
    """Run the router: an OpenAI-compatible endpoint (/v1/completions, /v1/models) in front of the workers."""
    _check_installed()
    from railwire.serve import router as service
    from railwire.serve.config import RouterConfig
    from railwire.serve.process import run

    options = _parse_options(runner_option)
    run(
        lambda: service.main(
            RouterConfig(
                membership=membership,
                secret=secret,
                host=host,
                port=port,
                drain_timeout=drain_timeout,
                log_level=log_level,
                runner=runner,
                model=model,
                options=options,
                max_attempts=max_attempts,
                request_timeout=request_timeout,
                event_timeout=event_timeout,
                host_store=host_store,
                resume=resume,
                max_active=max_active,
            )
        ),
        log_level,
    )
