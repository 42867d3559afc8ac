"""Files and batches as OpenAI's Batch API names them, and the lines and results of a batch: plain data, no behaviour."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Status(Enum):
    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


UNFINISHED = (Status.VALIDATING, Status.IN_PROGRESS, Status.FINALIZING, Status.CANCELLING)


@dataclass(frozen=True)
class File:
    id: str
    bytes: int
    created_at: int  # seconds since 1970, as every *_at
    filename: str
    purpose: str


@dataclass(frozen=True)
class Line:
    """Where a line of the input file lies. `number` counts from 1, blank lines included; `length` and `crc32` are of its bytes
    without the line feed."""

    number: int
    custom_id: str
    offset: int
    length: int
    crc32: int


@dataclass(frozen=True)
class Result:
    """The outcome of one line. `entry` is its line in the output file (`ok`) or the error file: JSON without a line feed."""

    batch_id: str
    number: int
    ok: bool
    entry: str


@dataclass(frozen=True)
class BatchError:
    """Why a batch failed; `line` is where in the input file, if it was there."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True)
class Counts:
    """Lines of a batch: all of them, those whose result is ok, those whose result is not. The rest has no result (yet)."""

    total: int
    completed: int
    failed: int


@dataclass(frozen=True)
class Batch:
    id: str
    endpoint: str
    model: str | None  # known once the input file is accepted
    input_file_id: str
    completion_window: str
    status: Status
    created_at: int
    expires_at: float
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    output_file_id: str | None
    error_file_id: str | None
    errors: tuple[BatchError, ...]
    metadata: Mapping[str, str]
    counts: Counts
