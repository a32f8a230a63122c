"""Inputs that were checked before are not checked again: another prompt or seed, the same files and options."""

import asyncio
import base64
import os
import shutil
from pathlib import Path

import pytest

from scail2_rt.runtime.core.case_folder import read_case
from scail2_rt.runtime.serve.checking import Checker
from scail2_rt.runtime.serve.fields import REFERENCES, request_of
from scail2_rt.runtime.serve.plans import unpack
from scail2_rt.runtime.serve.settings import Limits

pytest_plugins = ["tests.support.runtime_fixtures"]

OPTIONS = {"size": [64, 96], "frames": 13, "prompt": "a man walks", "seed": 1}


class Started(Exception):
    """The check process is needed."""


def inputs(folder: Path, case: Path, linked: bool = True, **other: str) -> Path:
    """A job's folder with the inputs of a case: hard links to stored files, or copies. other: files of the case
    in the place of an input."""
    folder.mkdir()
    files = read_case(case)
    given = {"image": files.image, "mask_image": files.mask_image, "driving": files.driving}
    for name, field in REFERENCES.items():
        source = given.get(field, files.mask_video)
        assert source is not None
        source = case / other.get(name, source.name)
        (os.link if linked else shutil.copyfile)(source, folder / name)
    return folder


def test_the_same_inputs_are_checked_once(case: Path, tmp_path: Path) -> None:
    stored = tmp_path / "stored"
    shutil.copytree(case, stored)  # links need one file system

    async def run() -> None:
        checker = Checker(Limits())
        first = await checker.check(inputs(tmp_path / "1", stored), OPTIONS)
        await checker.close()
        assert first["frames"] == 13

        async def refused() -> None:
            raise Started

        checker.start = refused  # type: ignore[method-assign]
        again = inputs(tmp_path / "2", stored)
        found = await checker.check(again, OPTIONS | {"prompt": "a man runs", "seed": 2})
        assert found == first
        found.pop("plan")  # the caller may change its copy
        assert "plan" in await checker.check(again, OPTIONS)
        for options in ({"frames": 9}, {"seed": -1}, {"fps": 8}):
            with pytest.raises(Started):
                await checker.check(again, OPTIONS | options)
        with pytest.raises(Started):
            await checker.check(inputs(tmp_path / "3", stored, linked=False), OPTIONS)

    asyncio.run(run())


def test_kept_sentences_name_fields_and_not_another_jobs_folder(case: Path, tmp_path: Path) -> None:
    stored = tmp_path / "stored"
    shutil.copytree(case, stored)
    options = OPTIONS | {"allow_mask_problems": True}

    async def run() -> None:
        checker = Checker(Limits())
        await checker.check(inputs(tmp_path / "first", stored, mask_reference="ref.png"), options)
        again = inputs(tmp_path / "second", stored, mask_reference="ref.png")
        found = await checker.check(again, options)
        await checker.close()
        plan = unpack(base64.b64decode(found["plan"]), request_of(options, again, 0))
        assert any("mask_reference" in said for said in found["warnings"])
        assert {"mask_reference"} <= {finding.file for finding in plan.masks}
        assert str(tmp_path) not in f"{found['warnings']} {plan.warnings} {plan.masks}"

    asyncio.run(run())
