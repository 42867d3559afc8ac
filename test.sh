#!/usr/bin/env bash
# Runs the tests: ./test.sh [pytest arguments]. Without arguments also ruff and mypy.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./environment.sh

make_environment requirements.txt client/requirements.txt requirements-dev.txt
if [ $# -eq 0 ]; then
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/mypy
fi
exec .venv/bin/python -m pytest "$@"
