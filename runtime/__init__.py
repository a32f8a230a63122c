"""From a request to a video. The public API is here, loaded when it is asked for:

from scail2_rt.runtime import Session, Request

with Session.open("engines/") as session:
    plan = session.check(Request(image="ref.png", mask_image="ref_mask.png", driving="dance.mp4",
                                 mask_video="dance_mask.mp4", prompt="a girl dances"))
    session.generate(plan, "out.mp4")
"""

import importlib

TYPE_CHECKING = False  # `typing` is not imported: the command line can say that it was interrupted only after this file
if TYPE_CHECKING:
    from scail2_rt.engines.backend import Execution
    from scail2_rt.kernels.errors import InputError, Scail2Error
    from scail2_rt.runtime.core.plan import Estimate, Plan
    from scail2_rt.runtime.core.progress import Cancelled, Progress
    from scail2_rt.runtime.core.request import Clip, Output, Request
    from scail2_rt.runtime.masks.make.make import Masks, make_masks
    from scail2_rt.runtime.masks.make.options import MaskOptions
    from scail2_rt.runtime.pipeline.finite import NotFinite
    from scail2_rt.runtime.session.session import Session
    from scail2_rt.runtime.session.write import Result

_MODULES = {
    "Cancelled": "runtime.core.progress",
    "Clip": "runtime.core.request",
    "Estimate": "runtime.core.plan",
    "Execution": "engines.backend",
    "InputError": "kernels.errors",
    "MaskOptions": "runtime.masks.make.options",
    "Masks": "runtime.masks.make.make",
    "NotFinite": "runtime.pipeline.finite",
    "Output": "runtime.core.request",
    "Plan": "runtime.core.plan",
    "Progress": "runtime.core.progress",
    "Request": "runtime.core.request",
    "Result": "runtime.session.write",
    "Scail2Error": "kernels.errors",
    "Session": "runtime.session.session",
    "make_masks": "runtime.masks.make.make",
}
__all__ = [
    "Cancelled",
    "Clip",
    "Estimate",
    "Execution",
    "InputError",
    "MaskOptions",
    "Masks",
    "NotFinite",
    "Output",
    "Plan",
    "Progress",
    "Request",
    "Result",
    "Scail2Error",
    "Session",
    "make_masks",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"scail2_rt.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
