"""Which methods of other libraries are being called right now.

Nothing that a user passes to l1ra refers to the Trainer that trains the model, or to the object that is being saved
with it. But its method is on the call stack at the moments that matter. This is the only file of the library that looks
there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["calls", "first_argument", "runs"]


def calls(*names: str) -> Iterator[FrameType]:
    """The calls of methods with one of these names, innermost first.

    Read the local variables of no more frames than needed: before Python 3.13 reading them keeps them alive as long as
    the frame, also a model that its function deletes.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in names and code.co_argcount and code.co_varnames[0] == "self":
            yield frame
        frame = frame.f_back


def first_argument(frame: FrameType) -> Any:
    """The value of the first argument after ``self``, None if there is none."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[1]) if code.co_argcount > 1 else None


def runs(module: str, function: str) -> bool:
    """Whether a function of a module is running."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") == module:
            return True
        frame = frame.f_back
    return False
