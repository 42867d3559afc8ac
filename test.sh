#!/usr/bin/env bash
# Runs the tests: ./test.sh [--thorough] [pytest arguments]. Without pytest arguments: ruff, mypy and all tests, spread over the
# cores, in the quick profile, which says at its end what it left out; --thorough leaves nothing out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./environment.sh

make_environment requirements.txt client/requirements.txt requirements-light.txt requirements-dev.txt
if [ $# -eq 0 ] || [ "$*" = --thorough ]; then
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/mypy
    set -- "$@" --numprocesses auto --maxprocesses 4 --dist worksteal
fi
exec .venv/bin/python -m pytest "$@"
