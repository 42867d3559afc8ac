"""JSON bodies as typed models: what a field may be stands once, in its type. From there come the check, the error that names
field and limit, and the description in /openapi.json. Must not know which routes there are.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.annotated_handlers import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_plain_validator_function, with_info_after_validator_function

from api.errors import ApiError, bad
from batching.loop import Engine
from batching.request import Priority

MAX_TEMPERATURE = 2.0
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 100
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1
NO_SEED = -1  # vLLM's way to ask for none
LONGEST_TOKEN = 128  # bytes: no prompt of more than that times the context can fit
ABOUT = ("title", "description", "default", "examples")  # of a field, whatever it may be
NULL = {"type": "null"}
TELLING = ("unsupported", "string_unicode", "too_large")
SURROGATE = "must be valid Unicode: it holds half of a surrogate pair"

Schema = dict[str, Any]
Some = TypeVar("Some", bound="Body")


class Body(BaseModel):
    """What every body has in common: no field beside those named; no value converted (a text is no number), but that many
    programs have one kind of number, and write 1 as 1.0; and null says as much as leaving the field out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
    unknown: ClassVar[str] = "invalid_value"  # the error's code for a field that there is not

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: _integral(value) for name, value in body.items() if value is not None}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        schema = handler(core)
        found = handler.resolve_ref_schema(schema)
        for name, field in found.get("properties", {}).items():
            if name not in found.get("required", ()):
                about = {key: field.pop(key) for key in ABOUT if key in field}
                members = field.get("anyOf", [field])
                about = about if about.get("default") is not None else {k: v for k, v in about.items() if k != "default"}
                found["properties"][name] = {"anyOf": [one for one in members if one != NULL] + [NULL]} | about
        return schema


class UpTo:
    """The most that a number may be, where that follows from the engine: the limit's name in `limits_of`, and how much less."""

    def __init__(self, limit: str, less: int = 0) -> None:
        self._limit = limit
        self._less = less

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return with_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        return handler(core) | {"x-limit": [self._limit, self._less]}

    def _check(self, value: int, info: ValidationInfo) -> int:
        most = info.context[self._limit] - self._less  # type: ignore[index]
        if value > most:
            raise PydanticCustomError("too_large", "at most {most}", {"most": most})
        return value


class OneOf:
    """One of a few values; which, is looked up when somebody asks."""

    fault = "one_of"

    def __init__(self, values: Collection[Any]) -> None:
        self._values = values

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        return {"enum": list(self._values)}

    def _check(self, value: Any) -> Any:
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self._values):
            raise PydanticCustomError(self.fault, "not among them")
        return value


class Only(OneOf):
    """A field of which nothing is supported but what changes nothing."""

    fault = "unsupported"

    def __init__(self, value: Any) -> None:
        super().__init__([value])


def _unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise PydanticCustomError("string_unicode", SURROGATE) from None
    return text


def _integral(value: Any, depth: int = 2) -> Any:
    if isinstance(value, list) and depth:
        return [_integral(one, depth - 1) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, AfterValidator(_unicode)]
Seed = Annotated[
    int,
    Field(ge=MIN_SEED, le=MAX_SEED, description="makes a sampled text repeatable; -1: none"),
    AfterValidator(lambda seed: None if seed == NO_SEED else seed),
]
Temperature = Annotated[float, Field(ge=0, le=MAX_TEMPERATURE, description="0: always the likeliest token")]
TopK = Annotated[
    int, Field(ge=-1), UpTo("vocab_size"), Field(description="0 or -1: off"), AfterValidator(lambda top_k: max(0, top_k))
]
TopP = Annotated[float, Field(ge=1e-6, le=1, description="1: off")]
PriorityName = Annotated[Priority, Field(strict=False)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)]


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises ApiError."""
    try:
        value = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise bad("body", f"must be UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise bad("body", f"must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad("body", f"must be a JSON object, not {type(value).__name__}")
    return value


def check(kind: type[Some], body: Mapping[str, Any], engine: Engine | None = None) -> Some:
    """`body` as a `kind`. Raises ApiError naming the field at fault and what it may be."""
    limits = limits_of(engine) if engine else {}
    for name in body:
        if name not in kind.model_fields and body[name] is not None:
            raise _unknown(kind.unknown, str(name)[:100], kind.model_fields)
    try:
        return kind.model_validate(body, context=limits)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
    fault = next((fault for fault in faults if fault["type"] in TELLING), faults[0])  # of those of a union's members
    schema: Schema = schema_of(kind, limits)
    value: Any = body
    path: list[str] = []
    for step in fault["loc"]:  # as far as it names fields, not places in a list or members of a union
        if "properties" not in schema:
            break
        path.append(str(step))
        value = value.get(step) if isinstance(value, dict) else None
        if step not in schema["properties"]:
            raise _unknown("invalid_value", ".".join(path)[:100], schema["properties"])
        schema = schema["properties"][step]
    name = ".".join(path)
    told = "; it is missing" if value is None else f", not {str(value)[:60]!r}"
    if fault["type"] == "unsupported":
        allowed = "is supported only as " + " or ".join(json.dumps(one) for one in schema["enum"])
        raise ApiError(400, f"{name}: {allowed}{told}", name, "unsupported_parameter")
    if fault["type"] == "string_unicode":
        raise bad(name, SURROGATE)
    most = f", integers up to {fault['ctx']['most']}" if "title" in schema and fault["type"] == "too_large" else ""
    raise bad(name, f"must be {_in_words(schema)}{most}{told}")


def _unknown(code: str, name: str, allowed: Iterable[str]) -> ApiError:
    return ApiError(400, f"{name}: unknown field; allowed: {', '.join(allowed)}", name, code)


def limits_of(engine: Engine) -> dict[str, int]:
    """What `UpTo` may name."""
    return {"max_context": engine.limits.max_context, "vocab_size": engine.tokenizer.vocab_size}


def schema_of(kind: type[Body], limits: Mapping[str, int]) -> Schema:
    """Its JSON schema without references, and with the engine's limits."""
    whole = _schema(kind)

    def inlined(schema: Any) -> Any:
        if isinstance(schema, list):
            return [inlined(one) for one in schema]
        if not isinstance(schema, dict):
            return schema
        if "$ref" in schema:
            return inlined(whole["$defs"][schema["$ref"].rpartition("/")[2]])
        members = [one for one in schema.get("anyOf", ()) if one != NULL]
        if len(members) == 1:
            return inlined(members[0] | {key: value for key, value in schema.items() if key != "anyOf"})
        if members:
            schema = schema | {"anyOf": members}
        return {key: inlined(value) for key, value in with_limit(schema, limits).items()}

    found: Schema = inlined({key: value for key, value in whole.items() if key != "$defs"})
    return found


def with_limit(schema: Schema, limits: Mapping[str, int]) -> Schema:
    """What `UpTo` left in the schema, as JSON Schema has it; nothing while the engine is not known."""
    if "x-limit" not in schema:
        return schema
    name, less = schema["x-limit"]
    rest = {key: value for key, value in schema.items() if key != "x-limit"}
    return rest | ({"maximum": limits[name] - less} if name in limits else {})


class WithoutTitles(GenerateJsonSchema):
    """pydantic would give every field its own name as a title; here a title is a phrase that says what the field may be."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@cache
def _schema(kind: type[Body]) -> Schema:
    return kind.model_json_schema(schema_generator=WithoutTitles)


def _in_words(schema: Schema) -> str:
    """What a field of this schema must be: "an integer between 1 and 511"."""
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ("one of " if len(values) > 1 else "") + ", ".join(
            one if isinstance(one, str) else json.dumps(one) for one in values
        )
    if "title" in schema and "properties" not in schema:
        return str(schema["title"])
    if "anyOf" in schema:
        return ", or ".join(_in_words(one) for one in schema["anyOf"])
    low, high = schema.get("minimum"), schema.get("maximum")
    kind = schema.get("type")
    if kind in ("integer", "number"):
        between = f" between {low:.15g} and {high:.15g}" if kind == "number" else f" between {low} and {high}"
        return f"{'an' if kind == 'integer' else 'a'} {kind}{between if high is not None else ''}"
    if kind == "string":
        few, most = schema.get("minLength", 0), schema.get("maxLength")
        if most is not None:
            return f"a string of {few} to {most} characters"
        return "a string of at least one character" if few else "a string"
    if kind == "array":
        most = schema.get("maxItems")
        return f"a list of {f'at most {most}, each ' if most else ''}{_in_words(schema['items'])}"
    if kind == "boolean":
        return "true or false"
    return "a JSON object"


def check_prompt(prompt: str, engine: Engine) -> str:
    """`prompt`, if it is not longer than any that could fit: to be known before it is cut into tokens. Raises ApiError."""
    size, most = len(prompt.encode("utf-8")), engine.limits.max_context
    if size > LONGEST_TOKEN * most:
        raise bad("prompt", f"has {size} bytes; the model's context is {most} tokens")
    return prompt


def stop_strings(stop: str | list[str] | None) -> list[str]:
    return [stop] if isinstance(stop, str) else stop or []
