"""What a policy did wrong, told so that its author finds the place: the error in a line, file and line, the traceback.

Trusts nothing about an error that a policy raised: its text may be endless, or raise itself.
"""

import sysconfig
import traceback
from pathlib import Path
from types import FrameType

ENGINE = str(Path(__file__).parent)  # this folder's own files; those of the policies lie below it
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
LONGEST_TEXT = 300  # characters of an error's own text
MOST_FRAMES = 20  # the innermost ones


def in_a_line(error: BaseException) -> str:
    """The error's type and text."""
    try:
        text = " ".join(str(error)[:LONGEST_TEXT].split())
    except BaseException as worse:
        text = f"(its text cannot be had: {type(worse).__name__})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def in_full(error: BaseException) -> str:
    """The traceback from the policy on, with the lines of code, and the error in a line."""
    step = error.__traceback__
    while step and step.tb_next and _place(step.tb_frame, step.tb_lineno) is None:
        step = step.tb_next
    return "".join(traceback.format_tb(step, -MOST_FRAMES)) + in_a_line(error)


def place_of(error: BaseException) -> str | None:
    """`mine.py, line 12`: the innermost line of the traceback that is neither the engine's nor a library's."""
    step, place = error.__traceback__, None
    while step:
        place = _place(step.tb_frame, step.tb_lineno) or place
        step = step.tb_next
    return place


def stack_of(frame: FrameType | None) -> str:
    """What a thread is doing, with the lines of code."""
    return "".join(traceback.format_stack(frame, MOST_FRAMES)) if frame else ""


def place_in(frame: FrameType | None) -> str | None:
    """The same of what a thread is doing."""
    while frame:
        if place := _place(frame, frame.f_lineno):
            return place
        frame = frame.f_back
    return None


def _place(frame: FrameType, line: int) -> str | None:
    file = frame.f_code.co_filename
    if str(Path(file).parent) == ENGINE or file.startswith(("<", *LIBRARIES)):
        return None
    return f"{Path(file).name}, line {line}"
