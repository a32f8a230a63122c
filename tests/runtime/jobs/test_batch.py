"""Batch files become jobs with one output each."""

from pathlib import Path

import pytest

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.jobs.batch import batch_jobs
from scail2_rt.runtime.jobs.options import GenerateOptions

pytest_plugins = ["tests.support.runtime_fixtures"]


def test_names_are_unique_and_a_bad_line_is_a_job_with_an_error(case: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(f"a@@{case}\nb@@{case}\nc@@{case}-2\n")
    jobs = batch_jobs(GenerateOptions(engines=tmp_path, output=tmp_path, batch=tmp_path / "b.txt"))
    outputs = [job.output.path.name for job in jobs if job.output]
    assert outputs == [f"{case.name}.mp4", f"{case.name}-2.mp4"]
    assert [job.request.prompt for job in jobs if job.request] == ["a", "b"]
    assert isinstance(jobs[2].error, InputError)


def test_a_batch_file_names_its_own_cases(case: Path, tmp_path: Path) -> None:
    options = GenerateOptions(engines=tmp_path, output=tmp_path, batch=tmp_path / "b.txt", case=case, prompt="x")
    with pytest.raises(InputError, match="--batch and --case, --prompt were both given"):
        batch_jobs(options)
