#!/usr/bin/env bash
# Starts the server: ./server.sh MODE [--flag value ...]. Without arguments it prints its usage.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh server.sh
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")") # also where a symlink was called
source "$here/environment.sh"

"$python" "$here/config.py" "$@" # a bad argument ends here, before anything is installed
case " ${*:---help} " in *" --help "* | *" -h "* | *" --version "*) exit 0 ;; esac
make_environment requirements.txt
exec "$venv/bin/python" "$here/app.py" "$@"
