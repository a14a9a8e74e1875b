#!/usr/bin/env bash
# The first day on new hardware: run it on both hosts, side b first. docs/first-day.md says what it does.
#   scripts/first-day.sh b [--nic NIC]...
#   scripts/first-day.sh a --peer HOST_B [--nic NIC]... [--gpu cuda:0] [--largest 8G] [--down CMD --up CMD]
set -euo pipefail
python=${PYTHON:-$(dirname "$0")/../.venv/bin/python}
[ -x "$python" ] || python=python3
exec "$python" -m railwire.bench.first_day "$@"
