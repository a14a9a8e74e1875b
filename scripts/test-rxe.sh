#!/usr/bin/env bash
# Runs the engine's tests on real queue pairs: boots a machine with four Soft-RoCE devices, two for each side, and brings back the report.
#   test-rxe.sh [PYTEST_ARGUMENT...]
# Exit status: 0 all passed; 1 a test failed; 124 time ran out; 125 the machine failed.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v ib_write_bw >/dev/null || {
  sudo=()
  [ "$(id -u)" -eq 0 ] || sudo=(sudo)
  "${sudo[@]}" apt-get -qq -o DPkg::Lock::Timeout=300 update
  "${sudo[@]}" apt-get -qq -y -o DPkg::Lock::Timeout=300 install --no-install-recommends perftest >/dev/null
}
report=$PWD/build/test-rxe
rm -rf "$report"
mkdir -p "$report"
status=0
scripts/rxe-vm.sh -n 4 -m 3072 -t "${RXE_SECONDS:-1500}" -w "$report" -- scripts/rxe-guest.sh "$report" "$@" || status=$?
echo "test-rxe: status $status; the report is in $report (junit.xml, pytest.txt, native.txt)"
exit $status
