#!/usr/bin/env bash
# The first day on new hardware: run it on both hosts, side b first. docs/first-day.md says what it does.
#   scripts/first-day.sh b [--nic NIC]...
#   scripts/first-day.sh a --peer HOST_B [--nic NIC]... [--gpu cuda:0] [--largest 8G] [--down CMD --up CMD]
set -euo pipefail
python=${PYTHON:-$(dirname "$0")/../.venv/bin/python}
[ -x "$python" ] || python=python3
# The vendors' baselines are measured from here, also where railwire was installed from a wheel.
bench=$(cd "$(dirname "$0")/.." && pwd)/bench
[ ! -d "$bench" ] || export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$bench
exec "$python" -m railwire.bench.first_day "$@"
