"""What the routes answer, as types: for /openapi.json, and for mypy where an answer is put together."""

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict  # typing's own is too old before Python 3.12

Seconds = Annotated[float, Field(description="s")]
FinishReason = Literal["length", "stop"]


class ErrorFacts(TypedDict):
    message: Annotated[str, Field(description="names the field and its limit")]
    type: str
    param: Annotated[str | None, Field(description="the field at fault")]
    code: str | None


class ErrorAnswer(TypedDict):
    error: ErrorFacts


class InferenceAnswer(TypedDict):
    completion: Annotated[str, Field(description="prompt and generated text")]
    num_tokens: int
    finish_reason: FinishReason | None
    ttft: Seconds
    latency: Seconds
    mode: str | None


class StatsAnswer(TypedDict):
    """Many more beside these: throughput, latencies by priority, padding, preemptions, KV use, the model."""

    mode: str
    params: dict[str, Any]
    running: int
    queue_depth: int
    requests_finished: int


class ResetAnswer(TypedDict):
    status: Literal["reset"]


class ModeAnswer(TypedDict):
    mode: str
    params: dict[str, Any]
    modes: Annotated[dict[str, dict[str, Any]], Field(description="every mode's parameters")]


class HealthAnswer(TypedDict):
    status: Literal["loading", "ready", "draining", "failed"]
    reason: str | None


class BurstAnswer(TypedDict):
    taken: int
    refused: int


class CalledOffAnswer(TypedDict):
    called_off: Annotated[int, Field(description="requests that were waiting or running")]


class StepsAnswer(TypedDict):
    slots: Annotated[int, Field(description="sequence slots")]
    limits: dict[str, Any]
    last: Annotated[int, Field(description="the newest record's id")]
    steps: Annotated[list[dict[str, Any]], Field(description="records, oldest first")]


class SessionAnswer(TypedDict):
    teacher: Annotated[bool, Field(description="may switch modes, fire bursts, reset statistics")]
    keys: Annotated[bool, Field(description="there are keys to log in with")]


class ModelFacts(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelsAnswer(TypedDict):
    object: Literal["list"]
    data: list[ModelFacts]


class Logprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


class PromptTokens(TypedDict):
    cached_tokens: Annotated[int, Field(description="that the prefix cache held")]


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class CompletionAnswer(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class FileFacts(TypedDict):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str


class FilesAnswer(TypedDict):
    object: Literal["list"]
    data: list[FileFacts]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedAnswer(TypedDict):
    id: str
    object: Literal["file"]
    deleted: bool


class RequestCounts(TypedDict):
    total: int
    completed: int
    failed: int


class BatchFacts(TypedDict):
    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: dict[str, Any] | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]  # fmt: skip
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str]


class BatchesAnswer(TypedDict):
    object: Literal["list"]
    data: list[BatchFacts]
    first_id: str | None
    last_id: str | None
    has_more: bool
