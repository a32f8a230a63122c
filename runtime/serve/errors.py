"""What the interface answers when it refuses: a status, a sentence, a code for programs."""

import errno
import sys
import traceback
from typing import Any

from scail2_rt.kernels.errors import Scail2Error


class Refusal(Scail2Error):
    """An HTTP error. status: of the response; code: for programs; retry_s: when to try again."""

    def __init__(
        self, status: int, sentence: str, code: str, *, param: str | None = None, retry_s: int | None = None
    ) -> None:
        super().__init__(sentence)
        self.status, self.code, self.param, self.retry_s = status, code, param, retry_s

    @property
    def body(self) -> dict[str, Any]:
        """In the form that OpenAI's clients read."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_s is None else {"Retry-After": str(self.retry_s)}


class DiskFull(Exception):
    """The database could not be written, for want of room."""


def wrong(sentence: str, param: str | None = None, code: str = "invalid_value") -> Refusal:
    """400: what the client gave cannot work."""
    return Refusal(400, sentence, code, param=param)


def no_room(reason: str) -> Refusal:
    """507: nothing is lost, and nothing was kept of this request."""
    return Refusal(507, f"The service's disk takes no more ({reason}).", "disk_full", retry_s=60)


def fault(error: Exception) -> Refusal:
    """507 for a full disk; 500 for what nobody thought of, whose traceback is for the operator."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_room(error.strerror or "it is full")
    if isinstance(error, DiskFull):
        return no_room(str(error))
    traceback.print_exception(error, file=sys.stderr)
    return Refusal(500, f"The service has a fault ({type(error).__name__}); its log says more.", "fault")


def not_found(what: str, name: str) -> Refusal:
    """404: of another client, or of nobody."""
    return Refusal(404, f"There is no {what} {name[:80]!r}.", "not_found")
