#!/usr/bin/env bash
# Runs the tests: ./test.sh [--thorough] [pytest arguments]. Without pytest arguments: ruff, mypy and all tests, spread over the
# cores, in the quick profile, which says at its end what it left out; --thorough leaves nothing out.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh test.sh
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
cd "$here"
source ./environment.sh

make_environment requirements.txt client/requirements.txt requirements-light.txt requirements-dev.txt
if [ $# -eq 0 ] || [ "$*" = --thorough ]; then
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/mypy
    set -- "$@" --numprocesses auto --maxprocesses 4 --dist worksteal
fi
exec .venv/bin/python -m pytest "$@"
