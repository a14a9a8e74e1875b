#!/usr/bin/env bash
# Runs the native tests, and the Python tests on the simulated NIC, under ASan+UBSan and under TSan.
set -euo pipefail
cd "$(dirname "$0")/.."

site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
root=$PWD
python_tests=("$root/tests/test_properties.py" "$root/tests/test_guarantees.py")
export RAILWIRE_TEST_LIBFABRICS=$PWD/.venv/lib/mpich/libfabric.so.1 # beside the system's
export ASAN_OPTIONS=detect_leaks=0 # Python itself keeps memory until it ends
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:suppressions=$PWD/scripts/tsan.supp

for kind in address thread; do
  build=build/sanitize-$kind
  echo "sanitize: $kind"
  .venv/bin/cmake -S . -B "$build" -G Ninja -DCMAKE_MAKE_PROGRAM="$PWD/.venv/bin/ninja" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DPython_EXECUTABLE="$PWD/.venv/bin/python" -DRAILWIRE_TESTS=ON -DRAILWIRE_SANITIZE=$kind >/dev/null
  .venv/bin/cmake --build "$build" -- --quiet
  if [ $kind = address ]; then
    "$build/railwire_tests"
    preload=$(g++ -print-file-name=libasan.so)
  else
    # libfabric itself is not instrumented: its own synchronisation would look like races.
    "$build/railwire_tests" --source-file-exclude='*libfabric*'
    preload=$(g++ -print-file-name=libtsan.so)
  fi
  # The package with the instrumented module, found without the editable install (-S).
  package=$build/python/railwire
  rm -rf "$package"
  mkdir -p "$package"
  for entry in railwire/*; do
    case $entry in *.so) ;; *) ln -s "$PWD/$entry" "$package/" ;; esac
  done
  cp "$build"/_native*.so "$package/"
  # From another directory: the current one comes first on the path of `python -m`.
  (
    cd "$build/python"
    LD_PRELOAD="$preload $(g++ -print-file-name=libstdc++.so)" PYTHONPATH="$PWD:$site" RAILWIRE_SANITIZED=$kind \
      "$root/.venv/bin/python" -S -m pytest -p no:cacheprovider -q -c "$root/pyproject.toml" --rootdir "$root" "${python_tests[@]}"
  )
done
