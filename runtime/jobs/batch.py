"""Many videos with one set of engines: `scail2-rt generate --batch FILE`, and `--seeds N,N,...`.

All cases are checked first, then the engines load once. A line or case that fails is reported, and the others run. With
`--resume`, complete results are kept, interrupted runs are resumed, and the other cases start.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.core.case_folder import FILES, BatchLine, flags
from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.core.progress import Listener
from scail2_rt.runtime.core.request import Output
from scail2_rt.runtime.jobs.masks import MAKING, masks_of
from scail2_rt.runtime.jobs.options import GenerateOptions
from scail2_rt.runtime.jobs.run import (
    Job,
    Outcome,
    check_job,
    fit_plan,
    open_session,
    run_plan,
    say_engines,
    say_notes,
    single_job,
    with_made_masks,
)

T = TypeVar("T")


def batch_jobs(options: GenerateOptions) -> list[Job]:
    """Return the jobs of `--batch FILE` (one video per job in the output folder) or of `--seeds`, and print notes about
    chosen inputs on stderr. An invalid line becomes a job with an error. Raises InputError for options that contradict
    `--batch`, and for invalid inputs of `--seeds`."""
    if options.batch is None:
        jobs = [replace(single_job(each), name=str(each.video)) for each in options.per_seed]
        if not _makes_masks(jobs[0]):
            say_notes(jobs[0])
        return jobs
    others = [name for name in ("case", *FILES, "extra_refs", "prompt", "prompt_file") if getattr(options, name)]
    if others:
        raise InputError(
            f"--batch and {flags(others)} were both given, but a batch file names its cases and prompts. Leave out one."
        )
    if options.output.exists() and not options.output.is_dir():
        raise InputError(
            f"The output {options.output} is a file, but --batch writes one video per case. Give a folder with -o."
        )
    jobs, used = list[Job](), set[str]()
    for line in options.lines:
        label = f"line {line.number}"
        try:
            if line.error is not None:
                raise line.error
            given = _line_options(line, options, used)
            if named := given.case or given.driving:
                label += f", {named}"
            each_seed = [replace(single_job(each), name=_with_seed(label, each)) for each in given.per_seed]
            if set(MAKING) & set(line.options) and not _makes_masks(each_seed[0]):
                masks_of(given)  # raises; the command's own mask options apply only to lines without masks
        except Scail2Error as error:
            jobs.append(Job(label, None, None, None, error))
            continue
        if not _makes_masks(each_seed[0]):
            say_notes(each_seed[0])
        jobs += each_seed
    return jobs


def _makes_masks(job: Job) -> bool:
    return job.options is not None and job.options.makes_masks


def _with_seed(label: str, options: GenerateOptions) -> str:
    return f"{label}, seed {options.seed}" if options.seeds else label


def _line_options(line: BatchLine, options: GenerateOptions, used: set[str]) -> GenerateOptions:
    """Return the options of a line; the command's options apply where the line sets none. used: outputs so far, without
    their endings, to which this one is added. Raises InputError for an output that an earlier line has."""
    given = dict(line.options)
    if "seeds" in given:
        given.setdefault("seed", 0)
    elif "seed" in given:
        given["seeds"] = ()
    case, image, driving = (given.get(name) for name in ("case", "image", "driving"))
    if "output" in given:
        name = os.path.normpath(Output(given["output"]).path)
        if _without_ending(name) in used:
            raise InputError(
                f"The output {name} is also the output of an earlier line, or differs from it only in its ending. Give "
                "each line another name."
            )
    else:
        stem = Path(case).resolve().name if case else "-".join(Path(path).stem for path in (image, driving) if path)
        stem = stem or f"line-{line.number}"
        names = (f"{stem}-{count}.mp4" if count > 1 else f"{stem}.mp4" for count in range(1, len(used) + 2))
        name = next(name for name in names if _without_ending(name) not in used)
    used.add(_without_ending(name))
    return replace(options, **{**given, "batch": None, "lines": (), "output": options.output / name})


def _without_ending(name: str) -> str:
    """What the report, the masks and the unfinished video of an output are named after."""
    return os.path.splitext(name)[0]


def run_batch(options: GenerateOptions, listener: Callable[[], Listener]) -> Outcome:
    """Run all cases. `listener` returns a progress listener for one case. Raises as `batch_jobs`; with `--seeds`, also
    InputError for inputs that fail a check."""
    jobs, results = batch_jobs(options), dict[str, Outcome | dict[str, Any]]()

    def attempt(job: Job, work: Callable[[], T]) -> T | None:
        """Return the result of `work`. If it fails, report the error and return None, so that the other cases run."""
        try:
            return work()
        except Exception as error:
            reason = str(error) if isinstance(error, Scail2Error) else f"{type(error).__name__}: {error}"
            print(f"error: {job.name}: {reason}", file=sys.stderr)
            results[job.name] = {"case": job.name, "status": "failed", "error": reason}
            return None

    plans = list[tuple[Job, Plan]]()
    for job in jobs:

        def check(job: Job = job) -> tuple[Job, Plan] | Outcome:
            needs_masks = options.batch is None or _makes_masks(job)
            ready = with_made_masks(job, listener()) if needs_masks else job
            return ready if isinstance(ready, Outcome) else (ready, check_job(ready))

        found = check() if options.batch is None else attempt(job, check)
        if isinstance(found, Outcome):
            results[job.name] = found
        elif found is not None:
            plans.append(found)
    with open_session(options) if plans else nullcontext() as session:
        if session is not None:
            say_engines(session, options)
        for number, (job, plan) in enumerate(plans, 1):
            print(f"case {number}/{len(plans)}: {job.name}", file=sys.stderr)

            def work(job: Job = job, plan: Plan = plan) -> Outcome:
                assert session is not None
                assert job.options is not None
                return run_plan(fit_plan(plan, session, job.options), job, session, job.options, listener())

            if done := attempt(job, work):
                results[job.name] = done
    return gathered(jobs, results)


def gathered(jobs: Sequence[Job], results: Mapping[str, Outcome | dict[str, Any]]) -> Outcome:
    """Return one outcome for all cases, in their order. results: job name → outcome, or JSON object with the error."""
    in_order, texts = list[dict[str, Any]](), list[str]()
    for job in jobs:
        result = results[job.name]
        if isinstance(result, Outcome):
            in_order.append({"case": job.name, **result.document})
            texts.append(result.text)
        else:
            in_order.append(result)
    lost = [result["case"] for result in in_order if result.get("status") == "failed"]
    failed = f", {len(lost)} failed: {'; '.join(lost)}" if lost else ""
    texts.append(f"{len(in_order) - len(lost)} of {counted(len(in_order), 'case')} done{failed}")
    return Outcome({"cases": in_order, "failed": len(lost)}, "\n".join(texts), len(lost))
