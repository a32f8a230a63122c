"""Lines of batch files, and seeds, become jobs with one output each."""

from pathlib import Path
from typing import Any

import pytest

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.case_folder import BatchLine
from scail2_rt.runtime.jobs.batch import batch_jobs
from scail2_rt.runtime.jobs.options import GenerateOptions

pytest_plugins = ["tests.support.runtime_fixtures"]


def lines(*given: dict[str, Any]) -> tuple[BatchLine, ...]:
    return tuple(BatchLine(number, options) for number, options in enumerate(given, 1))


def options_of(folder: Path, *given: dict[str, Any], **changes: Any) -> GenerateOptions:
    return GenerateOptions(engines=folder, output=folder, batch=folder / "b.txt", lines=lines(*given), **changes)


def test_names_are_unique_and_a_bad_line_is_a_job_with_an_error(case: Path, tmp_path: Path) -> None:
    given = [{"case": case, "prompt": "a"}, {"case": case, "prompt": "b"}, {"case": tmp_path / "none"}]
    jobs = batch_jobs(options_of(tmp_path, *given))
    outputs = [job.output.path.name for job in jobs if job.output]
    assert outputs == [f"{case.name}.mp4", f"{case.name}-2.mp4"]
    assert [job.request.prompt for job in jobs if job.request] == ["a", "b"]
    assert isinstance(jobs[2].error, InputError)


def test_a_batch_file_names_its_own_cases(case: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--batch and --case, --prompt were both given"):
        batch_jobs(options_of(tmp_path, case=case, prompt="x"))


def test_lines_change_options_of_the_command(case: Path, tmp_path: Path) -> None:
    given = [
        {"case": case, "seed": 5, "steps": 3, "output": Path("mine.mp4")},
        {"case": case, "seeds": (7, 8)},
        {"case": case},
        {"case": case, "output": Path("mine.mp4")},
        {"case": case, "output": Path("sub/../mine.gif")},
    ]
    jobs = batch_jobs(options_of(tmp_path, *given, seeds=(1, 2), steps=9))
    made = [(job.output.path.name, job.request.seed, job.request.steps) for job in jobs if job.output and job.request]
    name = case.name
    assert made == [
        ("mine.mp4", 5, 3),
        (f"{name}-seed7.mp4", 7, 9),
        (f"{name}-seed8.mp4", 8, 9),
        (f"{name}-2-seed1.mp4", 1, 9),
        (f"{name}-2-seed2.mp4", 2, 9),
    ]
    assert [job.name for job in jobs][1:3] == [f"line 2, {case}, seed 7", f"line 2, {case}, seed 8"]
    assert all("is also the output of an earlier line" in str(job.error) for job in jobs[5:])


def test_seeds_make_one_job_each(case: Path, tmp_path: Path) -> None:
    options = GenerateOptions(engines=tmp_path, output=tmp_path / "a.mp4", case=case, seeds=(1, 22))
    jobs = batch_jobs(options)
    assert [job.name for job in jobs] == [str(tmp_path / "a-seed1.mp4"), str(tmp_path / "a-seed22.mp4")]
    assert [job.request.seed for job in jobs if job.request] == [1, 22]
    with pytest.raises(InputError, match="--seed and --seeds were both given"):
        GenerateOptions(engines=tmp_path, output=tmp_path, case=case, seeds=(1, 2), seed=3)
