"""The parameters of a policy: a frozen dataclass whose fields say what may be set, read from `k=v` strings or JSON values."""

from collections.abc import Collection
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

P = TypeVar("P", bound="Params")


def number(default: float, low: float, high: float) -> Any:
    """A field of `Params` that must lie between `low` and `high`; a whole number where the field is declared as `int`."""
    return field(default=default, metadata={"range": (low, high)})


def choice(default: str, names: Collection[str]) -> Any:
    """A field of `Params` that is one of `names`."""
    return field(default=default, metadata={"names": names})


@dataclass(frozen=True)
class Params:
    """Those of a policy that has none; others inherit from it. Every field is a `number` or a `choice`."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field and what it may be."""
        for known in fields(self):
            value = getattr(self, known.name)
            if names := known.metadata.get("names"):
                if value not in names:
                    raise ValueError(f"{known.name}: must be one of {', '.join(names)}, not {_shown(value)}")
            else:
                low, high = known.metadata["range"]
                if not low <= value <= high:
                    raise ValueError(f"{known.name}: must lie between {low:g} and {high:g}, not {float(value):g}")
                if _is_whole(known) and type(value) is not int:
                    raise ValueError(f"{known.name}: must be a whole number, not {_shown(value)}")

    @classmethod
    def read(cls: type[P], arguments: dict[str, Any]) -> P:
        """Numbers may come as text. Raises ValueError naming the parameter."""
        known = {f.name: f for f in fields(cls)}
        for name in arguments:
            if name not in known:
                raise ValueError(f"{name}: no such parameter; there are: {', '.join(known) or 'none'}")
        return cls(**{name: _value(known[name], value) for name, value in arguments.items()})


def _is_whole(known: Field) -> bool:
    return known.type in (int, "int")  # the text where annotations are not evaluated


def _value(known: Field, value: Any) -> Any:
    if "names" in known.metadata:
        return _name(known.name, value)
    number = _number(known.name, value)
    return int(number) if _is_whole(known) and number.is_integer() else number


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: must be a name, not {_shown(value)}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{name}: must be a number, not {_shown(value)}")
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{name}: must be a number, not {_shown(value)}") from None


def _shown(value: Any) -> str:
    try:
        return repr(value)[:60]
    except ValueError:  # an integer of thousands of digits
        return "that"
