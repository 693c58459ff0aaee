"""Runs a job next to the cluster: starts it, loads it, breaks it, checks it, stops it.

`python -m load_tests.faults.driver JOB ANSWER`; progress goes to standard error.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import ray
from ray import serve

from actors.client import ClusterClient
from actors.cluster import Cluster, connect_ray
from deploy.app import application
from deploy.running_service import free_port
from dualpath_ray.config import Settings
from dualpath_ray.requests import Generator
from dualpath_ray.serving.tokenizer import Tokenizer
from load_tests.faults.books import Books
from load_tests.faults.faults import Targets, schedule
from load_tests.faults.hosts import Hosts
from load_tests.faults.http_route import HttpRoute
from load_tests.faults.injector import Injector, Outcome
from load_tests.faults.job import Answer, Job
from load_tests.faults.load import Load
from load_tests.faults.reference import Session, Shape, make_sessions
from load_tests.faults.watch import WatchedCalls

VOCABULARY = 512
WARM_UP_S = 6.0
CALM_S = 10.0
HTTP_SHARE = 4  # one play of this many goes over HTTP


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def targets_of(settings: Settings, hosts: Hosts | None, http: bool) -> Targets:
    cluster = settings.cluster
    nodes = [f"p{i}" for i in range(cluster.prefill_nodes)], [f"d{i}" for i in range(cluster.decode_nodes)]
    engines = [*nodes[0], *nodes[1], *(f"prefill-{node}-0" for node in nodes[0]), *(f"decode-{node}-0" for node in nodes[1])]
    if hosts is None:
        return Targets(engines, http=http)
    workers = hosts.spec.workers
    return Targets(engines, workers, [f"{host}-{nic}" for host in workers for nic in ("snic", "cnic")], store=True, http=http)


class Run:
    """One job on a running cluster."""

    def __init__(self, job: Job, settings: Settings, sessions: list[Session], hosts: Hosts | None, address: str | None) -> None:
        self._job, self._settings, self._sessions, self._hosts, self._address = job, settings, sessions, hosts, address
        self.answer = Answer()

    async def __call__(self) -> Answer:
        job, answer = self._job, self.answer
        calls = WatchedCalls(self._settings.cluster.namespace)
        client = ClusterClient(self._settings.cluster.namespace, calls)
        routes: list[Generator] = [client] * (HTTP_SHARE - 1)
        http: HttpRoute | None = None
        if self._address is not None:
            card = await client.describe()
            expected = {turn.prompt: turn.answer for session in self._sessions for turn in session.turns}
            http = HttpRoute(self._address, card.served_name, Tokenizer.from_directory(Path(card.model_path)), expected)
            routes.append(http)
        load = Load(routes, self._sessions, job.agents, job.period_s, job.timeout_s, job.seed)
        injector = Injector(calls, client, load, self._hosts, self._address)
        books = Books()
        stopped = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stopped.set)
        started = time.monotonic()
        outcomes: list[Outcome] = []
        try:
            async with load:
                await self._calm(load)
                await self._rest(load, books, client, injector)
                rounds = schedule(targets_of(self._settings, self._hosts, http is not None), job.faults, job.seed, only=job.only)
                for number, faults in enumerate(rounds, 1):
                    if stopped.is_set() or (job.minutes is not None and time.monotonic() - started > 60 * job.minutes):
                        break
                    done = await injector.round(faults)
                    outcomes += done
                    self._tell(done, len(outcomes), load)
                    if number % job.rest_every == 0:
                        await self._rest(load, books, client, injector)
                await self._rest(load, books, client, injector)
        except Exception as error:  # what was found until then must not be lost
            answer.trouble.append(f"the run broke off: {error!r}")
            say("".join(traceback.format_exception(error)))
        finally:
            if http is not None:
                await http.aclose()
        ended = time.monotonic()
        answer.seconds = ended - started
        answer.calm_rate = load.throughput.calm_rate
        answer.stats = load.stats.as_json()
        answer.outcomes = [self._seen(outcome, started) for outcome in outcomes]
        answer.trouble += load.trouble + [line for outcome in outcomes for line in outcome.trouble]
        answer.unexplained = injector.unexplained
        answer.rests, answer.rss_growth, answer.fd_growth = books.rests, books.rss_growth, books.fd_growth
        step = answer.rate_step_s
        edges = [started + i * step for i in range(int((ended - started) / step))]
        answer.rates = [load.throughput.tokens(edge, edge + step) / step for edge in edges]
        if http is not None:
            answer.http = {"unclear": http.unclear, "broken": http.broken}
        return answer

    async def _calm(self, load: Load) -> None:
        say("calm: measuring the rate without faults ...")
        await asyncio.sleep(WARM_UP_S)
        start = time.monotonic()
        await asyncio.sleep(CALM_S)
        load.throughput.note_calm(start, time.monotonic())
        say(f"calm: {load.throughput.calm_rate:.0f} tokens/s, {load.stats.requests} requests so far")

    async def _rest(self, load: Load, books: Books, client: ClusterClient, injector: Injector) -> None:
        await load.pause()
        leaks = await books.check(client, injector.ended)
        for leak in leaks:
            say(f"LEAK {leak}")
        self.answer.leaks += [leak for leak in leaks if leak not in self.answer.leaks]
        load.resume()

    def _tell(self, done: list[Outcome], count: int, load: Load) -> None:
        parts = []
        for outcome in done:
            back = f", back after {outcome.restart_s:.1f} s" if outcome.restart_s is not None else ""
            parts.append(f"{outcome.fault}{'' if outcome.aimed else ' (phase not met)'}{back}")
            for line in outcome.trouble:
                say(f"TROUBLE {line}")
        seconds = done[0].recovery_s
        recovery = "not recovered" if seconds is None else f"recovered {seconds:.1f} s after repair"
        stats = load.stats
        wrong = f" WRONG {stats.wrong_texts}" if stats.wrong_texts else ""
        say(f"[{count}/{self._job.faults}] {'; '.join(parts)}: {recovery} ({stats.requests} requests, {stats.refused} refused{wrong})")

    def _seen(self, outcome: Outcome, started: float) -> dict[str, object]:
        seen = asdict(outcome)
        fault = seen.pop("fault")
        return {**fault, **seen, "at": outcome.at - started, "repaired": outcome.repaired - started}


@contextlib.contextmanager
def http_service(settings: Settings, node_ip: str) -> Iterator[str]:
    """The HTTP application in front of a cluster that runs."""
    port = free_port(node_ip)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": node_ip, "port": port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    try:
        serve.run(application(settings, start_engines=False), name="faults", route_prefix="/")
        yield f"http://{node_ip}:{port}"
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]


def run_job(job: Job) -> Answer:
    """Start what the job needs, run it, and leave nothing behind."""
    settings = Settings.load(None, job.overrides)
    say("computing the reference texts ...")
    sessions = make_sessions(Path(job.model_path), job.sessions, Shape(), job.seed, VOCABULARY)
    hosts = Hosts.of(**job.testbed) if job.testbed is not None else None
    say("starting the cluster ...")
    own_ray = connect_ray(settings)
    ours = psutil.Process().children(recursive=True) if own_ray else []
    try:
        cluster = Cluster.start(settings)
        try:
            node_ip = "127.0.0.1" if hosts is None else hosts.spec.address("head", "ctl")
            with http_service(settings, node_ip) if job.http else contextlib.nullcontext() as address:
                return asyncio.run(Run(job, settings, sessions, hosts, address)())
        finally:
            cluster.stop()
    finally:
        if own_ray:
            ours += psutil.Process().children(recursive=True)
        ray.shutdown()
        for process in psutil.wait_procs(ours, timeout=10)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def main() -> None:
    job_path, answer_path = map(Path, sys.argv[1:3])
    run_job(Job.read(job_path)).write(answer_path)
    sys.stderr.flush()
    os._exit(0)  # Ray's threads may hold up an interpreter that has lost its cluster


if __name__ == "__main__":
    main()
