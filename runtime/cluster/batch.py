"""A batch distributed over a Ray cluster: `scail2-rt generate --batch FILE --ray ADDRESS`.

    checks   one Ray task per case, all before engines load
    cases    one Ray actor per session, with open engines; each idle actor gets the next case

Engines, cases and outputs must be in folders that every node has under the same path. If a node or process dies, its
case moves to another actor, which resumes after the last finished segment. Pending actors make the cluster's autoscaler
add nodes. The output's lock prevents a disconnected node and its successor from writing the same file.
"""

import collections
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime.cluster.joining import joined, share_of_node
from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.jobs.batch import batch_jobs, gathered
from scail2_rt.runtime.jobs.options import GenerateOptions
from scail2_rt.runtime.jobs.run import Job, Outcome, check_job, fit_plan, open_engines, run_plan
from scail2_rt.runtime.media.unfinished import resumable
from scail2_rt.runtime.session.output_lock import wait_for_lock

MOST_DEATHS = 5  # consecutive deaths of a case's runner, without another finished segment, after which the case fails
Failure = dict[str, Any]


class Runner:
    """The actor class: a session that stays open and runs one case after another."""

    def __init__(self, options: GenerateOptions) -> None:
        self._options = options

    def open(self) -> str:
        """Open the engines and return the line that describes the chosen backend. Raises InputError if this node cannot
        open them."""
        self._session = open_engines(self._options)
        return self._session.choice

    def run(self, job: Job, plan: Plan) -> Outcome | Failure:
        """Run one case and return its outcome, or its failure. Does not raise."""
        try:
            assert job.output is not None
            wait_for_lock(job.output.path)
            options = job.options or self._options
            fitting = fit_plan(plan, self._session, options)
            return run_plan(fitting, job, self._session, options, lambda event: None)
        except Exception as error:
            return failure(job, error)


def failure(job: Job, error: Exception) -> Failure:
    """The record of a failed case."""
    reason = str(error) if isinstance(error, Scail2Error) else f"{type(error).__name__}: {error}"
    return {"case": job.name, "status": "failed", "error": reason}


def checked(job: Job) -> Plan | Failure:
    """A Ray task: the generation plan of a case, or its failure."""
    try:
        if job.options is not None and job.options.makes_masks:
            raise InputError("It has no masks, and --ray makes none: make them first with `scail2-rt masks make`.")
        return check_job(job)
    except Exception as error:
        return failure(job, error)


@dataclass(slots=True)
class Case:
    """A waiting or running case. deaths: deaths of its runner since the last finished segment; segments: number of
    finished segments."""

    job: Job
    plan: Plan
    deaths: int = 0
    segments: int = 0

    def lost(self) -> None:
        """Record the death of its runner; the next runner resumes."""
        output = self.job.output
        assert output is not None
        self.job = replace(self.job, output=replace(output, resume=True))
        finished = resumable(output.path)
        self.deaths = self.deaths + 1 if finished <= self.segments else 0
        self.segments = max(finished, self.segments)


@dataclass(slots=True)
class Crew:
    """The actors of a batch. calls: pending Ray call → (actor, its case; None while it opens its engines)."""

    actor: Any
    options: GenerateOptions
    calls: dict[Any, tuple[Any, Case | None]] = field(default_factory=dict)

    def hire(self) -> None:
        """Start another actor."""
        runner = self.actor.remote(self.options)
        self.calls[runner.open.remote()] = (runner, None)

    def give(self, runner: Any, case: Case) -> None:
        """Give a case to an idle actor."""
        self.calls[runner.run.remote(case.job, case.plan)] = (runner, case)

    def dismiss(self) -> None:
        """Kill all actors."""
        import ray

        for runner, _ in self.calls.values():
            ray.kill(runner)
        self.calls.clear()


def run_batch_on_ray(options: GenerateOptions, address: str) -> Outcome:
    """Run all cases. A failed case is reported and the others run. Raises InputError if the cluster does not answer or
    the engines cannot be opened."""
    if options.dry_run:
        raise InputError("--dry-run and --ray were both given; an estimate needs no cluster. Leave --ray out.")
    if isinstance(options.gpus, str):
        raise InputError("--gpus all and --ray were both given. Give the number of GPUs per case: --gpus N.")
    jobs = batch_jobs(options)
    with joined(address):
        import ray

        check = ray.remote(num_cpus=1, max_retries=MOST_DEATHS)(checked)
        found = ray.get([check.remote(job) for job in jobs])
        results: dict[str, Outcome | Failure] = {}
        waiting: collections.deque[Case] = collections.deque()
        for job, plan in zip(jobs, found, strict=True):
            if isinstance(plan, Plan):
                waiting.append(Case(job, plan))
            else:
                results[job.name] = plan
                print(f"error: {job.name}: {plan['error']}", file=sys.stderr)
        for job, outcome in _run(waiting, options, options.gpus) if waiting else ():
            results[job.name] = outcome
            print(f"case {len(results)}/{len(jobs)}: {job.name}", file=sys.stderr)
            if not isinstance(outcome, Outcome):
                print(f"error: {job.name}: {outcome['error']}", file=sys.stderr)
    return gathered(jobs, results)


def _run(
    waiting: collections.deque[Case], options: GenerateOptions, gpus_each: int
) -> Iterator[tuple[Job, Outcome | Failure]]:
    """Run the cases and yield each with its outcome when it ends."""
    import ray

    share, room = share_of_node(gpus_each)
    crew = Crew(ray.remote(max_restarts=0, scheduling_strategy="SPREAD", **share)(Runner), options)
    told = False
    try:
        for _ in range(min(room, len(waiting))):
            crew.hire()
        while crew.calls and (waiting or any(case for _, case in crew.calls.values())):
            (call, *_), _ = ray.wait(list(crew.calls))
            runner, case = crew.calls.pop(call)
            try:
                answer = ray.get(call)
            except ray.exceptions.RayActorError as error:
                if case is not None:
                    case.lost()
                    if case.deaths < MOST_DEATHS:
                        print(f"warning: the process of {case.job.name} died; another one resumes it", file=sys.stderr)
                        waiting.appendleft(case)
                    else:
                        died = Scail2Error(f"Its process died {case.deaths} times ({error}). Look at the nodes' logs.")
                        yield case.job, failure(case.job, died)
                if waiting:
                    crew.hire()
                continue
            except ray.exceptions.RayTaskError as error:  # only `open` raises
                raise error.cause from None
            if case is not None:
                yield case.job, answer
            elif not told:
                print(f"engines: {answer}", file=sys.stderr)
                told = True
            if waiting:
                crew.give(runner, waiting.popleft())
            else:
                ray.kill(runner)
    finally:
        crew.dismiss()
