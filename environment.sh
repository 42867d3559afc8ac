# Finds Python, makes .venv and installs requirements files into it, again only when they change. Sourced by server.sh, test.sh.

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "Python 3.10 or newer is needed: as python3, or named by the variable PYTHON" >&2
    exit 2
fi

make_environment() {
    local stamp=.venv/${!#}.sum sum wanted=() file
    if [ ! -x .venv/bin/python ]; then
        "$python" -m venv .venv || { echo "python3 -m venv failed (Debian, Ubuntu: apt install python3-venv)" >&2; return 1; }
    fi
    for file; do wanted+=(-r "$file"); done
    sum=$(cat "$@" | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$sum" ]; then
        echo "installing $* into .venv (once; torch takes some minutes)" >&2
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "${wanted[@]}" >&2 || {
            echo "installing failed; where an earlier try was cut off: rm -rf .venv, then again" >&2
            return 1
        }
        echo "$sum" > "$stamp"
    fi
}
