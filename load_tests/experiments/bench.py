"""A testbed with stored contexts, ready to measure systems on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from load_tests.experiments.experiment import Say, Setup
from load_tests.experiments.job import Answer, Job, Phase
from load_tests.experiments.machine import Machine
from load_tests.experiments.measure import Load, Run, make_run, seeds
from load_tests.experiments.modes import MODES, Mode
from load_tests.experiments.workload import VOCABULARY
from load_tests.replay.records import Replay, TurnRecord
from load_tests.testbed.errors import TestbedError
from load_tests.testbed.spec import TestbedSpec, parse_shape
from load_tests.testbed.testbed import Testbed, open_testbed

BUCKET = "kvcache"
START_S = 240.0  # for a cluster to start, warm up and stop


class Bench:
    """Made by `open_bench`. Runs find the contexts of its loads in storage, and nothing of earlier runs."""

    def __init__(self, testbed: Testbed, setup: Setup, loads: Sequence[Load], say: Say) -> None:
        self.testbed, self.setup, self.loads, self.say = testbed, setup, tuple(loads), say
        self._seeds = seeds(setup.workload.seed)
        self._runs = 0

    def preload(self) -> None:
        """Store the contexts, over storage NICs that are not limited meanwhile."""
        lengths: list[int] = []
        for load in self.loads:
            contexts = load.workload.contexts
            lengths = [max(pair) for pair in zip(lengths + [0] * len(contexts), contexts + [0] * len(lengths), strict=False)]
        lengths = [length for length in lengths if length]
        self.say(f"storing {len(lengths)} contexts, {sum(lengths)} tokens")
        phase = Phase([], lengths, self.setup.workload.seed, store_only=True)
        self.limit_snics(0)
        self._drive(Job(self.settings(self.testbed.spec), VOCABULARY, [phase]), "preload", self.setup.run_timeout_s)
        self.limit_snics(self.setup.testbed.snic_bits)

    def measure(
        self, shape: str, mode: str | Mode, loads: Sequence[Load] | None = None, repeat: int = 0, failures: bool = False
    ) -> list[Run]:
        """One cluster of `mode` on the hosts of `shape` goes through the loads; a run of each.

        Raises TestbedError when it breaks down, or, unless `failures` are part of what is measured, when a turn fails.
        """
        hosts = self.testbed.spec.shape(shape)
        system = MODES[mode] if isinstance(mode, str) else mode
        loads = self.loads if loads is None else loads
        job = Job(
            [*self.settings(hosts), *system.overrides, *self.setup.overrides], VOCABULARY, [self._phase(load, system) for load in loads]
        )
        self.limit_snics(0 if system.unlimited_snic else hosts.snic_bits)
        self._runs += 1
        with Machine() as machine:
            answer = self._drive(job, f"{shape}-{system.name}-{self._runs}", self.setup.run_timeout_s)
        runs = []
        for load, phase in zip(loads, answer.phases, strict=True):
            replay = Replay(phase.started, phase.finished, tuple(TurnRecord(**record) for record in phase.records))
            samples = self.testbed.counters.between(phase.started, phase.finished)
            run = make_run(hosts, system, load, repeat, replay, samples, load.workload.hit_bytes(self.setup.model.geometry))
            run.figures |= {"quiet_after_s": phase.quiet_after_s, "machine": machine.figures()}
            run.processes = answer.processes
            self.say(describe(run))
            if run.figures["failed_turns"] and not failures:
                raise TestbedError(f"{run.figures['failed_turns']} turns failed: {run.figures['first_error']}")
            runs.append(run)
        return runs

    def limit_snics(self, bits: int) -> None:
        """Shape the workers' storage NICs; 0: no limit."""
        for host in self.testbed.spec.workers:
            self.testbed.network.shape(host, "snic", bits)

    def settings(self, hosts: TestbedSpec) -> list[str]:
        """Of a cluster on `hosts`. Engines never limit: every agent finds room in the window, the pool and the staging memory."""
        setup = self.setup
        context = -(-(max(load.workload.longest for load in self.loads) + 64) // 128) * 128
        agents = max(load.workload.agents for load in self.loads)
        longest = -(-context // setup.model.block_tokens)
        blocks = max(longest, *(load.workload.blocks(setup.model.block_tokens) for load in self.loads))
        return [
            *self.testbed.overrides(BUCKET, hosts),
            f"model.spec={setup.model.make(self.testbed.folder, context)}",
            f"model.block_tokens={setup.model.block_tokens}",
            f"model.max_context={context}",
            "model.threads=1",
            "storage.layer_groups=1",
            "storage.read_threads=8",
            "prefill.max_batch_tokens=1024",
            f"prefill.window_layers={setup.model.layers}",
            f"prefill.window_tokens={max(context, 4 * setup.workload.context)}",
            f"decode.pool_blocks={blocks}",
            f"decode.max_batch={min(16, agents)}",
            f"staging.slots={2 * blocks}",
            # Thresholds at this scale: reads of 3 s are a long queue (paper, A.4), and a block is long enough to be read apart.
            f"scheduling.alpha_tokens={3 * setup.testbed.snic_bits // 8 // setup.model.geometry.token_bytes}",
            "scheduling.min_split_blocks=1",
            "staging.resident_share=0",  # every hit comes from storage, as in the paper
            "scheduling.use_resident=false",
            "transfer.busy_poll_s=0.001",
            "transfer.idle_poll_s=0.005",
        ]

    def _phase(self, load: Load, mode: Mode) -> Phase:
        workload = load.workload
        return Phase(
            [[(turn.append, turn.generate, turn.pause_s) for turn in trajectory.turns] for trajectory in workload.trajectories],
            workload.contexts,
            self.setup.workload.seed,
            next(self._seeds),
            workload.seed,
            mode.share_nothing,
            load.agents_per_s,
            load.timeout_s,
        )

    def _drive(self, job: Job, name: str, timeout_s: float) -> Answer:
        stem = self.testbed.folder / name
        job_path, answer_path, log = stem.with_suffix(".job"), stem.with_suffix(".answer"), stem.with_suffix(".log")
        job.write(job_path)
        self.testbed.run(["-m", "load_tests.experiments.driver", str(job_path), str(answer_path)], log, timeout_s + START_S)
        return Answer.read(answer_path)


@contextlib.contextmanager
def open_bench(setup: Setup, loads: Sequence[Load], say: Say) -> Iterator[Bench]:
    """A testbed with enough hosts for all shapes of `setup`, and the contexts of `loads` stored. Raises TestbedError."""
    unknown = [mode for mode in setup.modes if mode not in MODES]
    if unknown:
        raise TestbedError(f"unknown modes {', '.join(unknown)}; there are {', '.join(MODES)}")
    counts = [parse_shape(shape) for shape in setup.shapes]
    spec = replace(setup.testbed, prefill_hosts=max(p for p, _ in counts), decode_hosts=max(d for _, d in counts))
    say(f"starting {len(spec.hosts)} hosts: {spec.name}, storage NICs of {spec.snic_bits / 1e6:g} Mbit/s")
    with open_testbed(spec) as testbed:
        bench = Bench(testbed, setup, loads, say)
        bench.preload()
        yield bench


def describe(run: Run) -> str:
    figures = run.figures
    used, ttft = figures["snic_utilisation"], figures["ttft_s"].get("p50", 0.0)
    storage = f"storage NICs {used:.0%} used, max/avg {run.snic_max_over_avg():.2f}" if used is not None else "storage NICs not limited"
    return (
        f"{run.testbed} {run.mode:13s} {f'{run.load}: ' if run.load else ''}JCT {figures['jct_s']:6.1f} s, hits {figures['hit_rate']:.1%}, "
        f"read {figures['read_bytes'] / 1e6:.0f} MB, {storage}, TTFT p50 {ttft:.2f} s, {figures['failed_turns']} failed, "
        f"load of the machine {figures['machine']['load']:.1f}"
    )
