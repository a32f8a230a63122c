"""The generation plan that the check of a job's inputs made, stored in the job's folder, so that the worker does not
read the clips for it again.

The process that writes it has decoded untrusted uploads. The unpickler therefore accepts only this program's
dataclasses, fractions and paths, and the inputs in the plan are replaced by those of the job's folder.
"""

import importlib.metadata
import io
import pickle
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.core.request import Request

NAME = "plan"
_RECORDS = ("core.plan", "core.findings", "core.geometry", "core.window", "core.request")
_BESIDE = {
    ("fractions", "Fraction"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13's name
}


class Unreadable(Exception):
    """The stored plan is damaged or was written by another version of the program."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _BESIDE:
            return super().find_class(module, name)
        if module in [f"scail2_rt.runtime.{record}" for record in _RECORDS] and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and is_dataclass(found) and found.__module__ == module:
                return found
        raise Unreadable(f"A plan must not contain {module}.{name}.")


def pack(plan: Plan) -> bytes:
    """Serialise a plan for `unpack` of the same program version."""
    return _version() + b"\n" + pickle.dumps(plan, protocol=4)


def unpack(data: bytes, request: Request) -> Plan:
    """The stored plan with this request, whose prompts are cleaned. Raises Unreadable for other data."""
    from scail2_rt.runtime.pipeline.text import clean_prompt

    version, _, body = data.partition(b"\n")
    try:
        plan = _Reader(io.BytesIO(body)).load() if version == _version() else None
    except Exception as error:
        raise Unreadable(str(error)) from error
    if not isinstance(plan, Plan):
        raise Unreadable("The plan was written by another version.")
    prompt, negative = clean_prompt(request.prompt), clean_prompt(request.negative_prompt)
    return replace(plan, request=replace(request, prompt=prompt, negative_prompt=negative))


def planned(folder: Path, request: Request) -> Plan:
    """The plan stored in a job's folder, or else the result of `check_request`, which raises InputError."""
    from scail2_rt.runtime.session.check import check_request

    try:
        return unpack((folder / NAME).read_bytes(), request)
    except (OSError, Unreadable):
        return check_request(request)


def _version() -> bytes:
    return importlib.metadata.version("scail2-rt").encode()
