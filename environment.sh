# Makes .venv and installs the given requirements files into it, again only when they change. Sourced by server.sh and test.sh.

make_environment() {
    local python=${PYTHON:-python3} files=("$@") sum
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "Python 3.10 or newer is needed (as python3, or named by PYTHON)" >&2
        return 2
    fi
    if [ ! -x .venv/bin/python ]; then
        "$python" -m venv .venv || { echo "python3 -m venv failed (on Debian and Ubuntu: apt install python3-venv)" >&2; return 1; }
    fi
    sum=$(cat "${files[@]}" | sha256sum)
    if [ "$(cat ".venv/${files[-1]##*/}.sum" 2>/dev/null)" != "$sum" ]; then
        echo "installing ${files[*]} into .venv (once; torch takes some minutes)" >&2
        local wanted=()
        for file in "${files[@]}"; do wanted+=(-r "$file"); done
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "${wanted[@]}" >&2 || return 1
        echo "$sum" > ".venv/${files[-1]##*/}.sum"
    fi
}
