#!/usr/bin/env bash
# Starts the server: ./server.sh MODE [--flag value ...]. Without arguments it prints its usage.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./environment.sh

"$python" config.py "$@" # a bad argument ends here, before anything is installed
case " ${*:---help} " in *" --help "* | *" -h "*) exit 0 ;; esac
make_environment requirements.txt
exec .venv/bin/python app.py "$@"
