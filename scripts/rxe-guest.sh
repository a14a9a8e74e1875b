#!/usr/bin/env bash
# Inside the machine of rxe-vm.sh: the native tests on its devices, then the engine's tests on the verbs NIC.
#   rxe-guest.sh REPORT_DIR [PYTEST_ARGUMENT...]
set -uo pipefail
cd "$(dirname "$0")/.."
report=$1
shift
export PYTHONDONTWRITEBYTECODE=1
status=0
build/native/railwire_tests -tc="verbs*" >"$report/native.txt" 2>&1 || status=1
tail -3 "$report/native.txt"
[ $# -gt 0 ] || set -- tests/test_two_processes.py tests/test_guarantees.py tests/test_verbs.py tests/test_verbs_options.py
.venv/bin/python -m pytest -p no:cacheprovider --nic verbs -m "not slow" --junitxml "$report/junit.xml" \
  -o junit_family=xunit2 --durations 10 "$@" 2>&1 | tee "$report/pytest.txt"
[ "${PIPESTATUS[0]}" -eq 0 ] || status=1
exit $status
