"""A plan sent between two processes: it is restored exactly, and other objects are refused."""

import importlib.metadata
import os
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest

from scail2_rt.runtime.core.as_json import plain
from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.core.request import Request
from scail2_rt.runtime.serve.plans import NAME, Unreadable, pack, planned, unpack
from scail2_rt.runtime.session.check import check_request

pytest_plugins = ["tests.support.runtime_fixtures"]


def test_a_plan_comes_back_as_it_was(request_of: Callable[..., Request], tmp_path: Path) -> None:
    request = request_of(prompt="a  man\n walks", segment_length=13)
    plan = check_request(request)
    other = replace(request, seed=5)
    back = unpack(pack(plan), other)
    assert back.request.seed == 5
    for field in fields(Plan):
        if field.name != "request":
            assert plain(getattr(back, field.name)) == plain(getattr(plan, field.name)), field.name
    assert (back.request.prompt, back.layout) == (plan.request.prompt, plan.layout)
    assert planned(tmp_path, request).frames == plan.frames
    (tmp_path / NAME).write_bytes(b"0.0.0\n" + pack(plan).partition(b"\n")[2])
    assert planned(tmp_path, request).frames == plan.frames


class Evil:
    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple[object, ...]:
        return self.call[0], self.call[1:]


def test_what_does_not_belong_in_a_plan(request_of: Callable[..., Request], tmp_path: Path) -> None:
    version = importlib.metadata.version("scail2-rt").encode() + b"\n"
    mark = tmp_path / "mark"
    for evil in (
        Evil(os.mkdir, str(mark)),
        Evil(eval, "1"),
        Evil(open, str(mark), "w"),
        Evil(Path.touch, mark),
        [1],
        7,
    ):
        with pytest.raises(Unreadable):
            unpack(version + pickle.dumps(evil, protocol=4), request_of())
    for data in (
        b"",
        b"\n",
        version,
        version + b"\x80\x04.",
        version + b"cscail2_rt.runtime.core.request\nos.system\n.",
    ):
        with pytest.raises(Unreadable):
            unpack(data, request_of())
    assert not mark.exists()
