#!/usr/bin/env bash
# Instructions per work request of the verbs NIC, counted by callgrind over a provider that does next to nothing.
# What does not depend on the number of WRs (start, registration) falls out: two counts are subtracted.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v valgrind >/dev/null; then
  sudo=()
  [ "$(id -u)" -eq 0 ] || sudo=(sudo)
  "${sudo[@]}" apt-get -qq -o DPkg::Lock::Timeout=300 update
  "${sudo[@]}" apt-get -qq -y -o DPkg::Lock::Timeout=300 install --no-install-recommends valgrind >/dev/null
fi
count() { # count MODE WRS [OPTION] -> instructions
  valgrind --tool=callgrind ${3:-} --callgrind-out-file=/dev/null build/native/verbs_instructions "$1" "$2" 2>&1 |
    sed -n 's/.*Collected : *//p'
}
few=6400 many=64000
for mode in pages batch writes turns crowd; do
  a=$(count $mode $few)
  b=$(count $mode $many)
  echo "$mode: $(((b - a) / (many - few))) instructions per WR, of which about 15 are the provider's"
done
# Only what lies between two points, which the program tells valgrind of.
a=$(count answers $few --collect-atstart=no)
b=$(count answers $many --collect-atstart=no)
if [ "$a" = "$b" ]; then
  echo "answers: not counted, as it was built without valgrind's header: touch native/bench/verbs_instructions.cpp, make build-native"
else
  echo "answers: $(((b - a) / (many - few))) instructions from an arrival's completion to the doorbell of its answer"
fi

# An MoE layer's dispatch, from the word to the last doorbell: of a rank, and of the operation besides.
operations=1000
a=$(count scatter 63 --collect-atstart=no)
b=$(count scatter 126 --collect-atstart=no)
if [ "$a" = "$b" ]; then
  echo "scatter: not counted, as above"
else
  echo "scatter: $(((b - a) / 63 / operations)) instructions per rank from a word to the last doorbell, and $(((2 * a - b) / operations)) besides"
fi
build/native/verbs_instructions scatter 63
