"""The settings: where they come from, and that a bad one is a single line that names it."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import config
from batching import policy_file
from batching.policies import POLICIES
from batching.policies.dynamic import Dynamic
from config import MODELS, PREFIX, SettingError, Settings, parse, read
from model.checkpoint import CONFIGS

ROOT = Path(__file__).parents[1]


def test_a_flag_wins_over_the_environment_over_dotenv_over_the_default() -> None:
    dotenv = {"BATCHLAB_MAX_QUEUE": "3", "BATCHLAB_PORT": "3003", "BATCHLAB_TOKEN_BUDGET": "300"}
    environment = {"BATCHLAB_MAX_QUEUE": "2", "BATCHLAB_PORT": "2002"}
    settings = parse(["dynamic", "--max-queue", "1"], environment, dotenv)
    assert (settings.max_queue, settings.port, settings.token_budget) == (1, 2002, 300)
    assert settings.host == Settings().host


def test_a_bad_value_that_is_overruled_does_no_harm() -> None:
    assert parse(["dynamic", "--port", "1"], {"BATCHLAB_PORT": "x"}, {"BATCHLAB_PORT": "y"}).port == 1


def test_an_empty_variable_counts_as_not_set() -> None:
    assert parse(["dynamic"], {"BATCHLAB_PORT": ""}, {"BATCHLAB_PORT": "3003"}).port == 3003
    assert parse(["dynamic"], {"BATCHLAB_PORT": ""}, {"BATCHLAB_PORT": None}).port == Settings().port


@pytest.mark.parametrize("mode", POLICIES)
def test_every_mode_is_the_first_argument(mode: str) -> None:
    assert parse([mode], {}, {}) == Settings(mode=mode)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(config, "FILES", files := {})
    monkeypatch.setattr(policy_file, "FILES", files)
    monkeypatch.setitem(POLICIES, "mine", Dynamic)  # so that what comes in is taken out again
    del POLICIES["mine"]
    path = tmp_path / "mine.py"
    path.write_text("from batching.policies.dynamic import Dynamic\nclass Mine(Dynamic): pass\n")
    return path


def test_a_policys_file_is_a_mode_in_the_servers_process_too(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mine.parent)
    settings = parse(["mine.py"], {}, {})
    assert settings.mode == "mine"
    assert type(settings.make_policy("mine", {})).__name__ == "Mine"
    assert settings.environment()["BATCHLAB_MODE"] == str(mine)
    assert read({}, settings.environment(), {}) == settings


def test_a_policys_file_is_not_run_before_what_it_imports_can_be_there(mine: Path) -> None:
    mine.write_text("raise SystemExit")
    parse([str(mine)], {}, None)
    with pytest.raises(SettingError, match=r"^MODE: mine.py cannot be loaded: SystemExit \(mine.py, line 1\)$"):
        parse([str(mine)], {}, {})


def test_a_policys_file_that_is_not_there_is_named() -> None:
    with pytest.raises(SettingError, match=r"^MODE: there is no such file, not 'nowhere.py'$"):
        parse(["nowhere.py"], {}, {})


BAD = [
    *(("port", value, "65535") for value in ("70000", "-1", "x", "1.5", "", " ", "--5", "\u00b2", "1e3", "9" * 5000)),
    ("model", "gpt3", "gpt2-medium"),
    ("dtype", "fp8", "bf16"),
    ("device", "tpu", "cuda"),
    *(("max-batch-size", value, "between 1 and 4096") for value in ("0", "-1", "5000", "many")),
    *(("batch-timeout-ms", value, "between 0 and 60000") for value in ("-1", "nan", "inf", "soon", "60001")),
    *(("token-budget", value, "between 1 and") for value in ("0", "x")),
    *(("max-queue", value, "between 1 and 100000") for value in ("0", "x", "100001")),
    *(("kv-memory-gb", value, "between 0.001 and") for value in ("0", "-1", "nan", "inf", "all")),
    *(("variants", value, "MODEL:LAYERS") for value in ("gpt3", "gpt2,", "demo:", "demo:0", "demo:x", "demo:-1", "gpt2;demo")),
    *(("served-model-name", value, "1 to 100") for value in (",", "a,", " ", "x" * 101, "a\nb")),
    *(("policy-arg", value, "name=value") for value in ("batch_timeout_ms", "=1", "batch_timeout_ms=")),
]


@pytest.mark.parametrize(("name", "value", "limit"), BAD, ids=[f"{name}-{value[:12]}" for name, value, _ in BAD])
def test_a_bad_value_is_one_line_naming_where_it_stands_and_the_limit(name: str, value: str, limit: str) -> None:
    variable = PREFIX + name.upper().replace("-", "_")
    sources = [(parse, ["dynamic", f"--{name}={value}"], {}, {}, f"--{name}: ")]
    if value:
        sources.append((parse, ["dynamic"], {variable: value}, {}, f"{variable}: "))
        sources.append((parse, ["dynamic"], {}, {variable: value}, f"{variable} in .env: "))
    for ask, flags, environment, dotenv, named in sources:
        with pytest.raises(SettingError) as caught:
            ask(flags, environment, dotenv)
        message = str(caught.value)
        assert message.startswith(named)
        assert limit in message
        assert "\n" not in message


def test_a_truth_value_in_the_environment_is_checked() -> None:
    assert parse(["dynamic"], {"BATCHLAB_INSECURE": "yes"}, {}).insecure
    assert not parse(["dynamic"], {"BATCHLAB_INSECURE": "0"}, {}).insecure
    with pytest.raises(SettingError, match="BATCHLAB_INSECURE: must be true or false"):
        parse(["dynamic"], {"BATCHLAB_INSECURE": "maybe"}, {})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["turbo"], "MODE: must be one of nobatch, static"),
        (["dynamic", "--speed", "5"], "--speed"),
        (["dynamic", "--por", "5"], "--por"),
        (["dynamic", "--port"], "--port"),
        (["dynamic", "static"], "static"),
        (["--port", "5"], "MODE"),
        (["static", "--policy-arg", "timeout=5"], "--policy-arg: timeout: no such parameter; there are: batch_timeout_ms"),
        (["dynamic", "--policy-arg", "batch_timeout_ms=5"], "--policy-arg: batch_timeout_ms: no such parameter"),
        (["static", "--policy-arg", "batch_timeout_ms=soon"], "--policy-arg: batch_timeout_ms: must be a number"),
        (["static", "--policy-arg", "batch_timeout_ms=-1"], "--policy-arg: batch_timeout_ms: must lie between"),
        (["static", "--policy-arg", "batch_timeout_ms=nan"], "--policy-arg: batch_timeout_ms: must lie between"),
        (["dynamic", "--token-budget", "16", "--max-batch-size", "32"], "--token-budget: must be at least"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_a_bad_command_line_is_one_line_naming_the_argument(arguments: list[str], named: str) -> None:
    with pytest.raises(SettingError) as caught:
        parse(arguments, {}, {})
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_an_address_that_can_be_reached_from_outside_needs_a_key(host: str) -> None:
    with pytest.raises(SettingError, match=r"--host: .* set --api-key"):
        parse(["dynamic", "--host", host], {}, {})
    assert parse(["dynamic", "--host", host, "--api-key", "k"], {}, {}).host == host
    assert parse(["dynamic", "--host", host, "--insecure"], {}, {}).host == host


def test_no_address_at_all_would_be_every_address_and_is_refused() -> None:
    with pytest.raises(SettingError, match="--host"):
        parse(["dynamic", "--host", ""], {}, {})


def test_a_teachers_key_alone_does_not_open_the_server_to_outside() -> None:
    with pytest.raises(SettingError, match="--host"):
        parse(["dynamic", "--host", "0.0.0.0", "--teacher-key", "k"], {}, {})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_an_address_of_this_machine_needs_no_key(host: str) -> None:
    assert parse(["dynamic", "--host", host], {}, {}).host == host


def test_a_policys_parameter_is_its_setting_unless_policy_arg_says_otherwise() -> None:
    settings = parse(["static", "--batch-timeout-ms", "20"], {}, {})
    assert settings.make_policy("static", {}).params.batch_timeout_ms == 20
    assert settings.make_policy("static", {"batch_timeout_ms": "7"}).params.batch_timeout_ms == 7
    settings = parse(["static", "--policy-arg", "batch_timeout_ms=9"], {}, {})
    assert settings.make_policy(settings.mode, dict(settings.policy_arg)).params.batch_timeout_ms == 9


CHANGED: dict[str, Any] = {
    "mode": "static",
    "host": "::1",
    "port": 8501,
    "model": "gpt2",
    "weights": "/a folder/with spaces=x",
    "dtype": "bf16",
    "device": "cpu",
    "max_batch_size": 4,
    "batch_timeout_ms": 12.5,
    "token_budget": 100,
    "prefix_caching": "off",
    "max_queue": 7,
    "kv_memory_gb": 0.1,
    "variants": ("gpt2", "demo:2"),
    "served_model_name": ("gpt-3.5", "my model"),
    "api_key": "a-key",
    "teacher_key": "cheese",
    "allowed_hosts": ("lab.example", ".ngrok-free.app"),
    "insecure": True,
    "policy_arg": (("batch_timeout_ms", "5"),),
    "tbt_slo_ms": 40.0,
    "data_dir": "/tmp/elsewhere",
    "input_log": "/tmp/log",
}


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(**CHANGED),
        Settings(batch_timeout_ms=0.0),
        Settings(mode="static", batch_timeout_ms=0.0),
    ],
    ids=["defaults", "all changed", "no timeout", "static without timeout"],
)
def test_settings_survive_the_way_through_the_environment(settings: Settings) -> None:
    assert read({}, settings.environment(), {}) == settings


def test_port_0_is_refused_or_kept_but_never_becomes_the_default() -> None:
    try:
        settings = parse(["dynamic", "--port", "0"], {}, {})
    except SettingError:
        return
    assert read({}, settings.environment(), {}).port == 0


def test_the_round_trip_covers_every_setting() -> None:
    assert set(CHANGED) == {f.name for f in fields(Settings)}
    assert all(value != getattr(Settings(), name) for name, value in CHANGED.items())


def test_every_waiting_request_has_a_thread() -> None:
    assert Settings(max_batch_size=8, max_queue=100).threads > 108


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_usage_names_every_mode_and_flag(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments, {}, {})
    assert ended.value.code == 0
    usage = capsys.readouterr().out
    names = [*POLICIES, *("--" + f.name.replace("_", "-") for f in fields(Settings) if f.name != "mode")]
    assert [name for name in names if name not in usage] == []


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return subprocess.run(command, cwd=cwd, env=own | environment, capture_output=True, text=True, timeout=30)


def test_a_bad_flag_ends_with_status_2_and_one_line_and_needs_no_installed_package() -> None:
    ended = run(sys.executable, "-S", "config.py", "dynamic", "--port", "x")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("server.sh: --port: must be a whole number between ")
    assert ended.stderr.endswith(", not 'x'\n")
    assert ended.stderr.count("\n") == 1


def test_a_bad_variable_ends_the_server_with_status_2_and_one_line() -> None:
    ended = run(sys.executable, "app.py", "dynamic", BATCHLAB_MAX_QUEUE="0")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("server.sh: BATCHLAB_MAX_QUEUE: ")
    assert ended.stderr.count("\n") == 1


def test_server_sh_without_arguments_prints_the_usage_and_installs_nothing() -> None:
    ended = run("bash", "server.sh", PYTHON=sys.executable)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "MODE" in ended.stdout


def test_a_relative_path_begins_where_the_server_was_called_and_in_dotenv_beside_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    settings = parse(["dynamic", "--data-dir", "random", "--weights", "../mine"], {}, {})
    assert settings.data_dir == str(tmp_path / "random")
    assert settings.weights == str(tmp_path / "../mine")
    with pytest.raises(SettingError, match="--input-log: /home/me/log cannot be written"):
        parse(["dynamic", "--input-log", "~/log"], {}, {})
    by_variable = parse(["dynamic"], {"BATCHLAB_DATA_DIR": "here"}, {"BATCHLAB_WEIGHTS": "there"})
    assert (by_variable.data_dir, by_variable.weights) == (str(tmp_path / "here"), str(ROOT / "there"))
    usual = parse(["dynamic", "--weights", "random"], {}, {})
    assert (usual.data_dir, usual.weights, usual.input_log) == ("data", "random", "")


def test_a_byte_order_mark_hides_no_line_of_dotenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_bytes("\ufeffBATCHLAB_API_KEY=secret\r\n".encode())
    monkeypatch.setattr(config, "HERE", tmp_path)
    assert config.load_dotenv() == {"BATCHLAB_API_KEY": "secret"}


def test_a_folder_that_is_not_there_is_named_as_the_caller_meant_it(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    ended = run(sys.executable, str(ROOT / "app.py"), "dynamic", "--port", "0", "--data-dir", "a file", cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"server.sh: --data-dir: {tmp_path}/a file: ")


def test_keys_that_no_header_can_carry_are_refused() -> None:
    for key in ("abc ", "k\u00e9y", "a\nb"):
        with pytest.raises(SettingError, match=r"--api-key: must be printable ASCII"):
            parse(["dynamic", "--api-key", key], {}, {})


def test_before_dotenv_is_installed_a_key_that_may_stand_in_it_is_not_missed() -> None:
    assert parse(["dynamic", "--host", "0.0.0.0"], {}, None).host == "0.0.0.0"


def test_a_mode_keeps_the_parameters_it_was_started_with_when_it_comes_back() -> None:
    settings = parse(["static", "--policy-arg", "batch_timeout_ms=200"], {}, {})
    assert settings.make_policy("static", {}).params.batch_timeout_ms == 200
    assert settings.make_policy("static", {"batch_timeout_ms": 5}).params.batch_timeout_ms == 5
    settings = parse(["nobatch", "--batch-timeout-ms", "70"], {}, {})
    assert settings.make_policy("static", {}).params.batch_timeout_ms == 70


def test_a_server_started_where_few_open_files_are_allowed_asks_for_more_and_says_where_even_that_is_not_enough() -> None:
    code = "import resource as r, app, config; r.setrlimit(r.RLIMIT_NOFILE, (64, {})); "
    code += "told = app.allow_open_files(config.Settings(max_batch_size=8, max_queue=8)); "
    code += "print(*r.getrlimit(r.RLIMIT_NOFILE), told)"
    assert run(sys.executable, "-c", code.format(5000)).stdout == "2368 5000 None\n"
    assert run(sys.executable, "-c", code.format(700)).stdout == "700 700 None\n"
    said = run(sys.executable, "-c", code.format(300)).stdout
    assert said.startswith("300 300 only 300 files may be open at a time, and --max-queue 8 needs 368: raise the limit")


def test_the_models_of_the_settings_are_those_that_can_be_loaded() -> None:
    assert set(MODELS) == {*CONFIGS, "demo"}


def test_variants_are_models_or_the_first_layers_of_one_and_survive_the_way_through_the_environment() -> None:
    settings = parse(["deadline", "--variants", "gpt2,distilgpt2,demo:2"], {}, {})
    assert settings.variants == ("gpt2", "distilgpt2", "demo:2")
    assert read({}, settings.environment(), {}) == settings
    assert parse(["deadline"], {}, {}).variants == ()
