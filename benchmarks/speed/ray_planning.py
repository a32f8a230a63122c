"""Simulate the service on many GPUs, with measured service times.

`python -m scail2_rt.benchmarks.speed.ray_planning` prints one row per number of GPUs. The queue is never empty. The
ledger is one process: its CPU handles one call at a time, and its writes to the object store overlap. The calls of a
job are: added, claimed, planned, one report per step, ended; `RECORD_WRITES` of them write its record. Between two jobs
a GPU waits until its result is stored, the end of the job is recorded, Ray Serve has sent the next request, that claim
is recorded and the inputs have arrived. docs/ray-planning.md gives the source of each number.
"""

import argparse
import heapq
import json
import random
from dataclasses import asdict, dataclass, fields

END, CLAIM = 0, -1
RECORD_WRITES = 5  # record writes per job: added, claimed, planned, first step, ended


@dataclass(frozen=True, slots=True)
class Costs:
    """The inputs of the simulation.

    clip_s, steps          seconds and steps of one job on one GPU; one call to the ledger per step
    call_ms, write_ms      CPU time of the ledger per call, and additional time per call that writes a record
    store_ms               time to store a record: one read and one write in the object store
    route_ms               time of Ray Serve from a queued request to a replica
    inputs_mb, result_mb, state_mb   MB per job; state: of its finished segments (0 for a clip of one segment)
    node_mb_s              MB/s between a replica and the object store"""

    clip_s: float = 22.5
    steps: int = 6
    call_ms: float = 0.32
    write_ms: float = 1.21
    store_ms: float = 60.0
    route_ms: float = 10.0
    inputs_mb: float = 4.0
    result_mb: float = 3.0
    state_mb: float = 0.0
    node_mb_s: float = 100.0


@dataclass(frozen=True, slots=True)
class Found:
    """The results for one number of GPUs. gpu_busy, ledger_busy: shares of the time; wait: idle time between jobs."""

    gpus: int
    clips_per_s: float
    gpu_busy: float
    ledger_busy: float
    wait_p50_s: float
    wait_p99_s: float
    ledger_calls_per_s: float
    store_ops_per_s: float
    store_mb_per_s: float


def simulate(gpus: int, costs: Costs, seconds: float = 600.0, seed: int = 0) -> Found:
    """Simulate `gpus` replicas for `seconds` seconds; the first tenth is not counted."""
    rng = random.Random(seed)
    call, write, store = costs.call_ms / 1e3, (costs.call_ms + costs.write_ms) / 1e3, costs.store_ms / 1e3
    move = (costs.inputs_mb + costs.result_mb) / 2 / costs.node_mb_s
    free, busy, calls, ended, warm = 0.0, 0.0, 0, 0, seconds / 10
    waits: list[float] = []

    def ask(now: float, cost: float) -> float:
        """The time at which the ledger's CPU has finished a call that arrives at `now`. cost: CPU seconds."""
        nonlocal free, busy, calls
        free = max(free, now) + cost
        if now >= warm:
            busy, calls = busy + cost, calls + 1
        return free

    # (time, replica, number of remaining steps or END or CLAIM, end of its last step)
    events = [(rng.uniform(0, costs.clip_s), number, costs.steps, 0.0) for number in range(gpus)]
    heapq.heapify(events)
    while events and events[0][0] < seconds:
        now, number, todo, since = heapq.heappop(events)
        if todo > 0:
            if todo == costs.steps:
                ask(now, write)  # planned
            ask(now, write if todo == costs.steps else call)
            step = costs.clip_s / costs.steps * rng.uniform(0.95, 1.05)
            last = todo == 1
            after = (now + step + move, number, END, now + step) if last else (now + step, number, todo - 1, 0.0)
        elif todo == END:
            ask(now, write)  # a client adds the next job
            after = (ask(now, write) + store + costs.route_ms / 1e3, number, CLAIM, since)
        else:
            begun = ask(now, write) + store + move
            if now >= warm:
                ended += 1
                waits.append(begun - since)
            after = (begun, number, costs.steps, 0.0)
        heapq.heappush(events, after)
    measured = seconds - warm
    rate = ended / measured
    waits.sort()
    megabytes = costs.inputs_mb * 2 + costs.result_mb * 2 + costs.state_mb
    return Found(
        gpus,
        rate,
        rate * costs.clip_s / gpus,
        busy / measured,
        waits[len(waits) // 2],
        waits[int(len(waits) * 0.99)],
        calls / measured,
        rate * (2 * RECORD_WRITES + 5 + 5 + 3),  # read and write per record; inputs stored and fetched; results
        rate * megabytes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Costs):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    parser.add_argument("--gpus", type=int, nargs="+", default=[2, 10, 100, 300, 1000, 2000, 4000, 8000])
    given = vars(parser.parse_args())
    counts = given.pop("gpus")
    costs = Costs(**given)
    rows = [simulate(count, costs) for count in counts]
    print("| GPUs | clips/s | GPUs busy | ledger busy | wait p50, p99 s | calls/s | store ops/s | store MB/s |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.gpus:,} | {row.clips_per_s:.2f} | {row.gpu_busy:.1%} | {row.ledger_busy:.1%} | "
            f"{row.wait_p50_s:.2f}, {row.wait_p99_s:.2f} | {row.ledger_calls_per_s:.0f} | {row.store_ops_per_s:.0f} | "
            f"{row.store_mb_per_s:.0f} |"
        )
    print(json.dumps({"costs": asdict(costs), "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
