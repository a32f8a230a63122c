"""Many cases through one set of engines: `scail2-rt generate --batch FILE`.

Every case is checked before the engines load once for all of them. What is wrong with one case is reported, and the
others run. With `--resume`, a complete result stays, an interrupted one is continued and what was not begun begins.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.core.case_folder import FILES, flags, read_batch
from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.core.progress import Listener
from scail2_rt.runtime.jobs.options import GenerateOptions
from scail2_rt.runtime.jobs.run import Job, Outcome, check_job, fit_plan, open_session, run_plan, say_engines

T = TypeVar("T")


def batch_jobs(options: GenerateOptions) -> list[Job]:
    """The jobs of `--batch FILE`, each writing `<case folder>.mp4` into the output folder; names are made unique."""
    others = [name for name in ("case", *FILES, "extra_refs", "prompt", "prompt_file") if getattr(options, name)]
    if others:
        raise InputError(f"--batch and {flags(others)} were both given: a batch file names its cases and prompts.")
    folder = options.output
    if folder.exists() and not folder.is_dir():
        raise InputError(f"The output {folder} is a file, but --batch writes a video per case: give a folder with -o.")
    assert options.batch is not None
    jobs: list[Job] = []
    taken: set[str] = set()
    for line in read_batch(options.batch):
        name = line.directory.resolve().name
        unique = next(n for i in range(len(taken) + 1) if (n := f"{name}-{i + 1}" if i else name) not in taken)
        taken.add(unique)
        label = f"line {line.number}, {line.directory}"
        try:
            request = options.folder_request(line.directory, prompt=line.prompt)
            jobs.append(Job(label, request, options.output_to(folder / f"{unique}.mp4")))
        except Scail2Error as error:
            jobs.append(Job(label, None, None, error))
    return jobs


def run_batch(options: GenerateOptions, listener: Callable[[], Listener]) -> Outcome:
    """All cases; `listener` makes one listener per case."""
    jobs, results = batch_jobs(options), dict[str, Outcome | dict[str, Any]]()

    def attempt(job: Job, work: Callable[[], T]) -> T | None:
        """What `work` returns; whatever is wrong with one case is reported, and the others run."""
        try:
            return work()
        except Exception as error:
            reason = str(error) if isinstance(error, Scail2Error) else f"{type(error).__name__}: {error}"
            print(f"error: {job.name}: {reason}", file=sys.stderr)
            results[job.name] = {"case": job.name, "status": "failed", "error": reason}
            return None

    checked = [(job, attempt(job, partial(check_job, job))) for job in jobs]
    plans = [(job, plan) for job, plan in checked if plan is not None]
    with open_session(options) if plans else nullcontext() as session:
        if session is not None:
            say_engines(session, options)
        for number, (job, plan) in enumerate(plans, 1):
            print(f"case {number}/{len(plans)}: {job.name}", file=sys.stderr)

            def work(job: Job = job, plan: Plan = plan) -> Outcome:
                assert session is not None
                return run_plan(fit_plan(plan, session, options), job, session, options, listener())

            if done := attempt(job, work):
                results[job.name] = done
    return gathered(jobs, results)


def gathered(jobs: Sequence[Job], results: Mapping[str, Outcome | dict[str, Any]]) -> Outcome:
    """One report of all cases, in their order; `results` by name: what came of a case, or how it failed."""
    in_order, texts = list[dict[str, Any]](), list[str]()
    for job in jobs:
        result = results[job.name]
        if isinstance(result, Outcome):
            in_order.append({"case": job.name, **result.document})
            texts.append(result.text)
        else:
            in_order.append(result)
    lost = sum(result["status"] == "failed" for result in in_order)
    cases = counted(len(in_order), "case")
    texts.append(f"{len(in_order) - lost} of {cases} done" + (f", {lost} failed" if lost else ""))
    return Outcome({"cases": in_order, "failed": lost}, "\n".join(texts), lost)
