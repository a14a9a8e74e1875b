#!/usr/bin/env bash
# Makes native/cuda/copy_ptx.h of copy.cu. Needs nvcc 13.0 (NVCC=..., the PATH's, or PyPI's wheels in build/nvcc).
# --check: leaves the file, and says whether it is what the source gives and assembles for every architecture.
set -euo pipefail
cd "$(dirname "$0")/.."

# The compiler's version decides the text: one version for all.
VERSION=13.0.88
nvcc=${NVCC:-$(command -v nvcc || true)}
if [ -z "$nvcc" ] || ! "$nvcc" --version | grep -q "V$VERSION"; then
  if [ ! -x build/nvcc/bin/nvcc ]; then
    .venv/bin/python -m pip --quiet install --target build/nvcc-wheels \
      "nvidia-cuda-nvcc==$VERSION" "nvidia-nvvm==$VERSION" "nvidia-cuda-crt==$VERSION" "nvidia-cuda-runtime==13.0.*"
    ln -sfn "$(dirname "$(dirname "$(find "$PWD/build/nvcc-wheels" -path '*bin/nvcc' | head -1)")")" build/nvcc
  fi
  nvcc=build/nvcc/bin/nvcc
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"$nvcc" -std=c++17 -O3 -ptx -arch=compute_80 -o "$out/copy.ptx" native/cuda/copy.cu
# What is in it is old; the number would only keep older drivers (12.0 and later) from taking it. ptxas below agrees.
sed -i -e 's/^\.version .*/.version 7.8/' -e '/^\/\//d' -e '/^$/d' "$out/copy.ptx"
for arch in sm_80 sm_90 sm_100; do
  "$(dirname "$(readlink -f "$nvcc")")/ptxas" -arch=$arch -v -o "$out/copy.$arch" "$out/copy.ptx" 2>"$out/ptxas.log" ||
    { cat "$out/ptxas.log"; exit 1; }
  ! grep -E ' [1-9][0-9]* bytes (stack frame|spill)' "$out/ptxas.log" || { echo "$arch: registers spill"; exit 1; }
done
{
  echo "// Made by scripts/build-kernels.sh of copy.cu; do not edit."
  echo "#pragma once"
  echo
  echo "// clang-format off"
  echo "inline constexpr char kCopyPtx[] = R\"ptx("
  cat "$out/copy.ptx"
  echo ")ptx\";"
  echo "// clang-format on"
} >"$out/copy_ptx.h"
if [ "${1:-}" = --check ]; then
  diff -q "$out/copy_ptx.h" native/cuda/copy_ptx.h || { echo "native/cuda/copy_ptx.h is not what copy.cu gives: run scripts/build-kernels.sh"; exit 1; }
else
  cp "$out/copy_ptx.h" native/cuda/copy_ptx.h
fi
