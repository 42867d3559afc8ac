# Finds Python, makes .venv and installs requirements files into it, again only when they change. Sourced by server.sh and
# test.sh, which say in $here which folder is meant.

CPU_TORCH=https://download.pytorch.org/whl/cpu # a tenth of what PyPI's build with CUDA takes
SAY_EVERY_S=4

venv=$here/.venv
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x "$venv/bin/python" ]; then python=$venv/bin/python; fi

end() {
    echo "$1" >&2
    exit 2
}

version_of() { # of a Python that will do
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 10))' 2> /dev/null
}

version=$(version_of "$python") || end "Python 3.10 or newer is needed: as python3, or named by the variable PYTHON"

make_environment() {
    local files=("${@/#/$here/}") stamp=$venv/${*: -1}.sum sum found
    if [ ! -e "$venv" ]; then
        [ -w "$here" ] || end "$here: .venv cannot be made there: copy the folder to where you may write"
        "$python" -m venv "$venv" || end "$python -m venv failed (Debian, Ubuntu: apt install python3-venv)"
    fi
    found=$(version_of "$venv/bin/python") || found="that does not run"
    [ "$found" = "$version" ] || end "$venv has a Python $found, $python is $version: rm -rf .venv, then again"
    sum=$(cat "${files[@]}" | sha256sum)$version
    if [ "$(cat "$stamp" 2> /dev/null)" != "$sum" ]; then
        [ -w "$venv" ] || end "$venv: $* must be installed there, and it cannot be written"
        echo "installing $* into .venv, once; it takes some minutes" >&2
        echo "(Ctrl-C stops it; the next start goes on from there)" >&2
        trap 'echo "stopped while installing; the next start goes on from there" >&2; exit 130' INT
        choose_torch
        install "${files[@]/#/-r}" 2>&1 | tee "$venv/install.log" | say_now_and_then || {
            tail -n 20 "$venv/install.log" >&2
            end "installing failed (see $venv/install.log); where an earlier try was cut off: rm -rf .venv, then again"
        }
        trap - INT
        echo "$sum" > "$stamp"
    fi
}

# Where there is no NVIDIA GPU, torch's CPU build, if its index answers soon.
choose_torch() {
    local ask="import signal, urllib.request as r; signal.alarm(5); r.urlopen('$CPU_TORCH/torch/', timeout=3)"
    if nvidia-smi -L > /dev/null 2>&1; then return; fi
    if "$python" -c "$ask" 2> /dev/null; then
        echo "no NVIDIA GPU: taking torch's small CPU build" >&2
        export PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL:-} $CPU_TORCH" UV_EXTRA_INDEX_URL="${UV_EXTRA_INDEX_URL:-} $CPU_TORCH"
    else
        echo "no NVIDIA GPU, but $CPU_TORCH does not answer: torch comes from the usual index, perhaps several GB" >&2
    fi
}

install() {
    local python=$venv/bin/python
    if "$python" -m pip --version > /dev/null 2>&1 || ! command -v uv > /dev/null && "$python" -m ensurepip; then
        "$python" -m pip install --progress-bar off --disable-pip-version-check "$@"
    else # an environment made by `uv venv`
        uv pip install --index-strategy unsafe-best-match --python "$python" "$@"
    fi
}

# Reads what an installer says, and says every few seconds what it is doing.
say_now_and_then() {
    local line="" doing="asking for the packages" said=$SECONDS began=$SECONDS status
    while true; do
        status=0
        IFS= read -r -t "$SAY_EVERY_S" line || status=$?
        if [ "$status" -eq 0 ]; then doing=$line; elif [ "$status" -le 128 ]; then return 0; fi
        if [ $((SECONDS - said)) -ge "$SAY_EVERY_S" ]; then
            said=$SECONDS
            echo "  $((SECONDS - began)) s: ${doing:0:120}" >&2
        fi
    done
}
