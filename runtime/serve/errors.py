"""Error responses of the interface: a status, a sentence and a code for programs."""

import errno
import sys
import traceback
from typing import Any

from scail2_rt.kernels.errors import Scail2Error


class Refusal(Scail2Error):
    """An HTTP error. status: HTTP status; code: identifier for programs; param: the field at fault; retry_s: seconds
    for the Retry-After header."""

    def __init__(
        self, status: int, sentence: str, code: str, *, param: str | None = None, retry_s: int | None = None
    ) -> None:
        super().__init__(sentence)
        self.status, self.code, self.param, self.retry_s = status, code, param, retry_s

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body, in the form that OpenAI's clients read."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The HTTP headers of the response."""
        return {} if self.retry_s is None else {"Retry-After": str(self.retry_s)}


class DiskFull(Exception):
    """The database cannot be written because the disk is full."""


def wrong(sentence: str, param: str | None = None, code: str = "invalid_value") -> Refusal:
    """400: the request is invalid. param: the field at fault."""
    return Refusal(400, sentence, code, param=param)


def no_room(reason: str) -> Refusal:
    """507: the disk is full. Existing jobs are intact; nothing of this request was kept."""
    return Refusal(507, f"The service cannot store more data ({reason}). Try again later.", "disk_full", retry_s=60)


def fault(error: Exception) -> Refusal:
    """507 for a full disk; 500 for any other exception, whose traceback is printed for the operator."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_room(error.strerror or "it is full")
    if isinstance(error, DiskFull):
        return no_room(str(error))
    traceback.print_exception(error, file=sys.stderr)
    said = f"The service has a fault ({type(error).__name__}). Ask its operator: the log has the details."
    return Refusal(500, said, "fault")


def not_found(what: str, name: str) -> Refusal:
    """404: it does not exist, or it belongs to another client."""
    return Refusal(404, f"There is no {what} {name[:80]!r}.", "not_found")
