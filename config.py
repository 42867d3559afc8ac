"""The server's settings: a flag of ./server.sh, else BATCHLAB_<NAME> in the environment, else in .env, else the default.

Checked once, at start; a bad value is one line that names it. Only the standard library is needed to import this file, so
that ./server.sh can check its arguments before it installs anything.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from ipaddress import ip_address
from pathlib import Path
from string import ascii_letters, digits
from typing import Any, NoReturn

from batching.policies import POLICIES
from batching.policy import Policy
from batching.policy_file import FILES, make, mode_named

VERSION = "0.2.0"
PREFIX = "BATCHLAB_"
MODELS = ("gpt2-medium", "gpt2", "distilgpt2", "gpt2-large", "gpt2-xl", "demo")
HERE = Path(__file__).resolve().parent
CPU_BATCH_SIZE, GPU_BATCH_SIZE = 64, 256
HOST_CHARACTERS = {*ascii_letters, *digits, *".-_:"}
HEADROOM = 32  # threads beyond the waiting requests: /health, /stats, /mode
READING = 2000  # connections that have sent no whole request
OTHER_FILES = 256  # that the server has open: its own, its libraries', uploads
MAX_VIEWERS = 64  # of /events; each holds a thread


class SettingError(Exception):
    """A bad setting; the message is one line naming it."""


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high):
            raise ValueError(f"must be a whole number between {low} and {high}")
        return int(text)

    return parse


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise ValueError(f"must be a number between {low:g} and {high:g}")
        return value

    return parse


def _one_of(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return text

    parse.names = names  # type: ignore[attr-defined] # for the usage
    return parse


def _mode(text: str) -> Path | str:
    if text.endswith(".py"):
        if not Path(text).expanduser().is_file():
            raise ValueError("there is no such file")
        return Path(text).expanduser()
    if text not in POLICIES:
        raise ValueError(f"must be one of {', '.join(POLICIES)}, or a policy's file (mine.py)")
    return text


_mode.names = tuple(POLICIES)  # type: ignore[attr-defined] # for the usage


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    pairs = [pair.partition("=") for pair in text.split()]
    if not all(name and value for name, _, value in pairs):
        raise ValueError("must be name=value, several of them separated by spaces")
    return tuple((name, value) for name, _, value in pairs)


def _variants(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name, colon, layers in (variant.partition(":") for variant in names):
        if name not in MODELS or (colon and not (layers.isascii() and layers.isdigit() and 0 < int(layers[:9]) < 1000)):
            raise ValueError(f"must be models or MODEL:LAYERS, with commas between; models: {', '.join(MODELS)}")
    return names


def _hosts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not all(name == "*" or (name.strip(".") and set(name) <= HOST_CHARACTERS) for name in names):
        raise ValueError("must be host names without ports, with commas between")
    return names


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not all(name and len(name) <= 100 and name.isprintable() and not name.isspace() for name in names):
        raise ValueError("must be names of 1 to 100 printable characters, with commas between")
    return names


def _key(text: str) -> str:
    if not (text.isascii() and text.isprintable()) or " " in text:
        raise ValueError("must be printable ASCII without spaces")
    return text


def _truth(text: str) -> bool:
    if text.lower() not in ("1", "true", "yes", "0", "false", "no"):
        raise ValueError("must be true or false")
    return text.lower() in ("1", "true", "yes")


def _path(text: str) -> Path | str:
    return Path(text).expanduser() if text else ""


def _weights(text: str) -> Path | str:
    return text if text in ("", "pretrained", "random") else _path(text)


def _setting(default: Any, parse: Callable[[str], Any], help: str) -> Any:
    return field(default=default, metadata={"parse": parse, "help": help})


@dataclass(frozen=True)
class Settings:
    mode: str = _setting("dynamic", _mode, "how requests are batched, or the file of a policy of your own")
    host: str = _setting("127.0.0.1", str, "any other address needs an API key or --insecure")
    port: int = _setting(8500, _whole(0, 65535), "where the server listens")
    model: str = _setting("", _one_of(*MODELS), "default: gpt2-medium, or demo where that cannot be had")
    variants: tuple[str, ...] = _setting(
        (),
        _variants,
        "cheaper models beside it, as gpt2,distilgpt2 or demo:3,demo:2 (its first layers); the most accurate first",
    )
    served_model_name: tuple[str, ...] = _setting(
        (), _names, "what /v1 calls the model, several names with commas between; default: the model's own"
    )
    weights: str = _setting(
        "pretrained", _weights, "pretrained, random (seeded, to measure speed), or a folder with a checkpoint"
    )
    dtype: str = _setting(
        "auto",
        _one_of("auto", "fp32", "fp16", "bf16", "int8"),
        "auto: bf16 or fp16 where fast, else fp32; int8 rounds the weights",
    )
    device: str = _setting("auto", _one_of("auto", "cpu", "cuda"), "auto: the GPU if there is one")
    max_batch_size: int = _setting(0, _whole(1, 4096), "sequence slots; default: 64 on a CPU, 256 on a GPU")
    batch_timeout_ms: float = _setting(50.0, _number(0, 60_000), "static, sequence: how long a batch may wait to fill up")
    token_budget: int = _setting(512, _whole(1, 1 << 20), "tokens an iteration, for policies that chunk prompts")
    max_queue: int = _setting(1024, _whole(1, 100_000), "waiting requests; beyond it 429")
    kv_memory_gb: float | None = _setting(
        None, _number(0.001, 4096), "KV cache; default: half of what is free, at most 4 on a CPU"
    )
    prefix_caching: str = _setting(
        "on", _one_of("on", "off"), "share KV blocks between requests that begin alike, in modes that cut prompts into chunks"
    )
    tbt_slo_ms: float = _setting(
        0.0, _number(0, 3.6e6), "time between tokens to keep; default: 4 times a full decode step, measured at start"
    )
    api_key: str = _setting("", _key, "asked of every call but /health")
    teacher_key: str = _setting("", _key, "with it set, only it may switch modes, fire bursts and reset statistics")
    allowed_hosts: tuple[str, ...] = _setting(
        (), _hosts, "names it answers to without an API key, beside localhost and --host: a.org,.b.org (with subdomains), or *"
    )
    insecure: bool = _setting(False, _truth, "listen on any address without a key")
    policy_arg: tuple[tuple[str, str], ...] = _setting((), _pairs, "a parameter of the policy, name=value; repeatable")
    data_dir: str = _setting("data", _path, "where files and batches are kept; one server at a time")
    input_log: str = _setting("", _path, "write what the scheduler takes in to this file, for replay")

    def make_policy(self, mode: str, arguments: Mapping[str, Any]) -> Policy:
        """The policy of `mode`. What `arguments` leave out is as the server was started, else the policy's default.
        Raises ValueError naming the parameter, or what the policy's own code raised."""
        return make(mode, self._started_with(mode) | dict(arguments))

    def params_of(self, mode: str) -> dict[str, Any]:
        """The parameters of `mode` where a switch names none. Raises ValueError naming one that does not suit it."""
        return vars(POLICIES[mode].Params.read(self._started_with(mode)))

    def _started_with(self, mode: str) -> dict[str, Any]:
        shared = {f.name: getattr(self, f.name) for f in fields(POLICIES[mode].Params) if hasattr(self, f.name)}
        return shared | (dict(self.policy_arg) if mode == self.mode else {})

    @property
    def threads(self) -> int:
        """Each waiting request and each viewer blocks one HTTP thread."""
        return (self.max_batch_size or GPU_BATCH_SIZE) + self.max_queue + HEADROOM + MAX_VIEWERS

    @property
    def connections(self) -> int:
        """Those that have a thread, and those that are being read or are kept for the next request."""
        return self.threads + READING

    def environment(self) -> dict[str, str]:
        """The settings as the variables from which `read` makes them again."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        if self.mode in FILES:
            values["mode"] = FILES[self.mode]
        for name in ("variants", "allowed_hosts", "served_model_name"):
            if listed := getattr(self, name):
                values[name] = ",".join(listed)
        if self.policy_arg:
            values["policy_arg"] = " ".join(f"{name}={value}" for name, value in self.policy_arg)
        return {PREFIX + name.upper(): str(value) for name, value in values.items()}


def read(flags: Mapping[str, str], environment: Mapping[str, str], dotenv: Mapping[str, str | None] | None) -> Settings:
    """Settings by name from the three sources, the first wins. Paths are made absolute: a relative one begins where the server
    was called, and one in .env beside that file. Raises SettingError."""
    values = {}
    for f in fields(Settings):
        variable, flag = PREFIX + f.name.upper(), "--" + f.name.replace("_", "-")
        for source, name, text in (
            ("MODE" if f.name == "mode" else flag, f.name, flags.get(f.name)),
            (variable, variable, environment.get(variable)),
            (f"{variable} in .env", variable, (dotenv or {}).get(variable)),
        ):
            if text is not None and (text != "" or name == f.name):
                try:
                    value = f.metadata["parse"](text)
                except ValueError as error:
                    raise SettingError(f"{source}: {error}, not {text!r}") from None
                if isinstance(value, Path):
                    value = str((HERE if source.endswith(" in .env") else Path.cwd()) / value)
                values[f.name] = value
                break
    settings = Settings(**values)
    if dotenv is not None:  # else what a policy's file imports may not be installed yet
        try:
            settings = replace(settings, mode=mode_named(settings.mode))
        except ValueError as error:
            raise SettingError(f"MODE: {error}") from None
        _check(settings)
    return settings


def _check(settings: Settings) -> None:
    if not (_is_loopback(settings.host) or settings.api_key or settings.insecure):
        raise SettingError(f"--host: {settings.host} can be reached from outside: set --api-key (or --insecure)")
    if settings.token_budget < settings.max_batch_size:
        least = f"--max-batch-size ({settings.max_batch_size})"
        raise SettingError(f"--token-budget: must be at least {least}, not {settings.token_budget}")
    if settings.input_log:
        try:
            open(settings.input_log, "a", encoding="utf-8").close()
        except OSError as error:
            raise SettingError(f"--input-log: {settings.input_log} cannot be written: {error.strerror}") from None
    try:
        settings.make_policy(settings.mode, {})
    except ValueError as error:
        raise SettingError(f"--policy-arg: {error}") from None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingError(message)


def parse(arguments: list[str], environment: Mapping[str, str], dotenv: Mapping[str, str | None] | None) -> Settings:
    """Settings from ./server.sh's command line. Raises SettingError; prints usage or version, and exits, for --help, --version
    or no argument.

    Without `dotenv` (python-dotenv is not installed yet) each value is checked, but not how they go together.
    """
    modes = ", ".join(POLICIES)
    parser = _Parser(
        prog="./server.sh",
        usage="./server.sh MODE [--flag value ...]",
        description=f"MODE: one of {modes}, or the file of a policy of your own.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"BatchLab {VERSION}")
    for f in fields(Settings):
        shown = "" if f.default in ("", 0, None, False, ()) or f.name == "mode" else f" (default: {f.default})"
        text = (f.metadata["help"] + shown).replace("%", "%%")
        if names := getattr(f.metadata["parse"], "names", ()):
            text = f"{', '.join(names)}; {text}"
        if f.name == "mode":
            parser.add_argument("mode", metavar="MODE", help=text)
        elif f.metadata["parse"] is _truth:
            parser.add_argument("--" + f.name.replace("_", "-"), action="store_const", const="true", help=text)
        else:
            action = "append" if f.name == "policy_arg" else "store"
            parser.add_argument("--" + f.name.replace("_", "-"), metavar="X", help=text, action=action)
    if not arguments:
        parser.print_help()
        raise SystemExit(0)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    if "policy_arg" in given:
        given["policy_arg"] = " ".join(given["policy_arg"])
    return read(given, environment, dotenv)


def load_dotenv() -> Mapping[str, str | None] | None:
    """What .env beside this file says; None before python-dotenv is installed."""
    try:
        from dotenv import dotenv_values
    except ImportError:
        return None
    return dotenv_values(HERE / ".env", encoding="utf-8-sig")


def main() -> None:
    """Check the command line; exit 2 with one line if it will not do."""
    try:
        parse(sys.argv[1:], os.environ, load_dotenv())
    except SettingError as error:
        print(f"server.sh: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
