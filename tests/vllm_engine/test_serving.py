"""Two prefillers, a decoder and the router, all real: every completed answer is that of a single process, token by
token, and afterwards nothing is held, whoever hung up or died in between."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from instances import Cluster, Instance, complete, smollm2, tokens_of

from railwire.runner.tokenizer_file import FolderTokenizer

ANSWER = 12
LENGTHS = [5, 17, 64, 128, 129, 130, 200, 257, 300, 384, 385, 450, 513, 600]
REQUESTS = 40

pytestmark = pytest.mark.timeout(900)


class Case(NamedTuple):
    prompt: list[int]
    answer: list[int]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("vllm"), smollm2())
    try:
        cluster.router.start().ready()
        for instance in (cluster.add("prefill0", 0), cluster.add("prefill1", 0), cluster.add("decode0", 1)):
            instance.start()
        for instance in cluster.instances[1:]:
            instance.ready()
        cluster.until(lambda: cluster.sees(2, 1))
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def cases(cluster: Cluster) -> list[Case]:
    """Prompts with the answers of a single process: an instance that computes all of it itself, one after the other."""
    text = (Path(__file__).resolve().parents[2] / "railwire" / "demo" / "prompts.txt").read_text(encoding="utf-8")
    words = FolderTokenizer(cluster.model).encode(text)
    rng = random.Random(7)
    prompts = []
    for number in range(REQUESTS):
        length = LENGTHS[number % len(LENGTHS)]
        begin = rng.randrange(len(words) - length)
        prompts.append(words[begin : begin + length])
    oracles = [cluster.instances[2], cluster.instances[3]]

    def ask(number: int) -> list[int]:
        body = complete(oracles[number % 2].url, "smollm2", prompts[number], max_tokens=ANSWER, ignore_eos=True)
        return tokens_of(body)

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(ask, range(REQUESTS)))
    for instance in cluster.instances[1:]:
        instance.reset_prefix_cache()
    return [Case(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def route(cluster: Cluster, case: Case) -> None:
    answer = complete(cluster.router.url, "smollm2", case.prompt, max_tokens=ANSWER, ignore_eos=True)
    assert tokens_of(answer) == case.answer


def route_all(cluster: Cluster, cases: list[Case], at_once: int = REQUESTS) -> list[BaseException]:
    """What went wrong, if anything."""

    def one(case: Case) -> BaseException | None:
        try:
            route(cluster, case)
        except BaseException as error:
            return error
        return None

    with ThreadPoolExecutor(at_once) as pool:
        return [error for error in pool.map(one, cases) if error is not None]


def idle(instance: Instance) -> bool:
    """Nothing is held: neither pages, nor requests, nor anything of ours. Regions are as at the start."""
    gauges = ["open_pushes", "open_receives", "open_tickets", "used_immediates"]
    held = [instance.metric(f"vllm:railwire_{gauge}") for gauge in gauges]
    held += [instance.metric("vllm:num_requests_running"), instance.metric("vllm:num_requests_waiting")]
    held += [instance.metric("vllm:kv_cache_usage_perc")]
    return not any(held)


def settle(cluster: Cluster) -> None:
    """vLLM tells its numbers with the steps it makes: a small request makes some."""
    for instance in cluster.instances[1:]:
        if instance.process is None or instance.process.poll() is not None:
            continue

        def quiet(instance: Instance = instance) -> bool:
            complete(instance.url, "smollm2", [1, 2, 3], max_tokens=2)
            return idle(instance)

        cluster.until(quiet, 40.0)


def stream(cluster: Cluster, case: Case, seconds: float) -> list[int] | None:
    """Reads a streamed answer, or hangs up after so long: then None."""
    body = {"model": "smollm2", "prompt": case.prompt, "max_tokens": ANSWER, "temperature": 0}
    body |= {"stream": True, "return_token_ids": True, "ignore_eos": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    end = time.monotonic() + seconds
    tokens: list[int] = []
    with socket.create_connection(("127.0.0.1", cluster.router.port)) as sock:
        sock.sendall(head.encode() + data)
        buffer = b""
        while True:
            sock.settimeout(max(0.001, end - time.monotonic()))
            try:
                piece = sock.recv(65536)
            except TimeoutError:
                return None
            if not piece:
                break
            buffer += piece
    assert b"data: [DONE]" in buffer, buffer[-500:]
    for line in buffer.splitlines():
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:])["choices"]:
                tokens += choice.get("token_ids") or []
    return tokens


def test_pages_leave_while_the_prefill_computes(cluster: Cluster, cases: list[Case]) -> None:
    pushers = cluster.instances[1:3]
    before = [sum(p.metric(f"vllm:railwire_push_hidden_{what}") for p in pushers) for what in ("sum", "count")]
    chosen = [case for case in cases if len(case.prompt) == 600]
    for case in chosen:
        route(cluster, case)
    settle(cluster)
    total, count = (
        sum(p.metric(f"vllm:railwire_push_hidden_{what}") for p in pushers) - old
        for what, old in zip(("sum", "count"), before, strict=True)
    )
    assert count == len(chosen)
    assert total / count >= 0.9
    assert cluster.instances[3].metric("vllm:railwire_receive_bytes_count") >= len(chosen)


def test_forty_at_once(cluster: Cluster, cases: list[Case]) -> None:
    for instance in cluster.instances[1:]:
        instance.reset_prefix_cache()
    assert route_all(cluster, cases) == []
    settle(cluster)


def test_prefixes_that_are_there(cluster: Cluster, cases: list[Case]) -> None:
    """On both sides, partly and wholly: what is there is not sent, and who has all of it says so."""
    declined = sum(p.metric("vllm:railwire_cancelled_pushes_total") for p in cluster.instances[1:3])
    whole = next(case for case in cases if len(case.prompt) == 129)  # a block of 128, and the token to begin with
    for case in (whole, whole, cases[8], cases[8]):
        route(cluster, case)
    settle(cluster)
    assert sum(p.metric("vllm:railwire_cancelled_pushes_total") for p in cluster.instances[1:3]) > declined


def test_clients_that_hang_up(cluster: Cluster, cases: list[Case], seed: int) -> None:
    for instance in cluster.instances[1:]:
        instance.reset_prefix_cache()
    rng = random.Random(seed)
    patience = [rng.uniform(0.0, 6.0) if rng.random() < 0.5 else 120.0 for _ in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        answers = list(pool.map(lambda pair: stream(cluster, *pair), zip(cases, patience, strict=True)))
    for case, answer, seconds in zip(cases, answers, patience, strict=True):
        assert answer == case.answer or (answer is None and seconds < 100)
    assert any(answer is None for answer in answers)
    settle(cluster)


def test_a_prefiller_dies_and_comes_back_on_its_port(cluster: Cluster, cases: list[Case]) -> None:
    for instance in cluster.instances[1:]:
        instance.reset_prefix_cache()
    victim = cluster.instances[1]
    threading.Timer(2.0, victim.kill).start()
    assert route_all(cluster, cases[:24]) == []
    cluster.until(lambda: cluster.sees(1, 1))
    settle(cluster)
    victim.start().ready()
    cluster.until(lambda: cluster.sees(2, 1))
    cluster.instances[2].stop()  # the other drains away: all that comes now goes to the one that is back
    cluster.until(lambda: cluster.sees(1, 1))
    assert route_all(cluster, cases[24:30]) == []
    assert victim.metric("vllm:railwire_push_bytes_count") > 0
    settle(cluster)


def test_a_decoder_dies_and_comes_back_on_its_port(cluster: Cluster, cases: list[Case]) -> None:
    decoder = cluster.instances[3]
    threading.Timer(1.5, decoder.kill).start()
    failures = route_all(cluster, cases[:10])
    # There is no other decoder: requests may fail, with an error, but none may be wrong.
    assert all("HTTP 50" in str(failure) for failure in failures), failures
    settle(cluster)  # the prefiller has let go of what it held for the dead one
    decoder.start().ready()
    cluster.until(lambda: cluster.sees(1, 1))
    assert route_all(cluster, cases[10:16]) == []
    settle(cluster)


def test_sigterm_drains(cluster: Cluster, cases: list[Case]) -> None:
    for instance in (cluster.instances[1], cluster.instances[3]):  # the last prefiller, the only decoder
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(route_all, cluster, cases[30:34])
            time.sleep(1.0)
            status = instance.stop()
            assert running.result() == []
        assert status == 0
        instance.start().ready()
        cluster.until(lambda: cluster.sees(1, 1))
