#!/usr/bin/env bash
# Our engine beside ib_write_bw and ib_write_lat: one boot of the emulated machine, runs in turns, medians, ratios.
#   against-perftest.sh [RUNS]        default 7; about ten minutes
# Bandwidth twice: page lists, and single writes with a doorbell each; both with immediates that the receiver counts.
# Latency beside ib_write_lat, whose receiver looks at its memory, and ib_send_lat, whose receiver has completions, as
# ours; and that of our NIC without the engine.
# Inside the machine it is called with --guest.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" != --guest ]; then
  command -v ib_write_bw >/dev/null || {
    sudo=()
    [ "$(id -u)" -eq 0 ] || sudo=(sudo)
    "${sudo[@]}" apt-get -qq -o DPkg::Lock::Timeout=300 update
    "${sudo[@]}" apt-get -qq -y -o DPkg::Lock::Timeout=300 install --no-install-recommends perftest >/dev/null
  }
  exec scripts/rxe-vm.sh -n 1 -m 1536 -t 1500 -- scripts/against-perftest.sh --guest "${1:-7}"
fi
runs=$2 device=rxe0 gid=1
perftest() { # perftest PROGRAM ARGUMENT... -> its row of figures; client and server on a core each, as ours
  taskset -c 1 "$@" -F -d $device -x $gid >/dev/null 2>&1 &
  for _ in $(seq 50); do
    if row=$(taskset -c 0 "$@" -F -d $device -x $gid 127.0.0.1 2>/dev/null | grep -E '^ *[0-9]+ +[0-9]+ ') && [ -n "$row" ]; then
      wait $! || true
      echo "$row"
      return
    fi
    sleep 0.1
  done
  echo "perftest failed: $*" >&2
  exit 1
}
median() { tr ' ' '\n' | sed '/^$/d' | sort -g | awk '{a[NR] = $1} END {print (NR % 2) ? a[(NR + 1) / 2] : (a[NR / 2] + a[NR / 2 + 1]) / 2}'; }
echo "what bytes depth ours perftest ratio"
row() { echo "$1 $2 $3 $4 $5 $(awk "BEGIN {printf \"%.3f\", $4 / $5}")"; }
for spec in 8388608:20:8 1048576:100:16 262144:200:32 65536:400:64 4096:3000:128; do
  IFS=: read -r bytes count depth <<<"$spec"
  lists='' singles='' theirs=''
  for _ in $(seq "$runs"); do
    lists+=" $(build/native/verbs_loop pages $device "$bytes" "$count" "$depth")"
    singles+=" $(build/native/verbs_loop bw $device "$bytes" "$count" "$depth")"
    theirs+=" $(perftest ib_write_bw -s "$bytes" -n "$count" -t "$depth" | awk '{print $4}')"
  done
  b=$(median <<<"$theirs")
  row pages_MiB/s "$bytes" "$depth" "$(median <<<"$lists")" "$b"
  row writes_MiB/s "$bytes" "$depth" "$(median <<<"$singles")" "$b"
done
for bytes in 8 4096; do
  ours='' nic='' theirs='' sends=''
  for _ in $(seq "$runs"); do
    ours+=" $(build/native/verbs_loop lat $device "$bytes" 1500)"
    nic+=" $(build/native/verbs_loop nic $device "$bytes" 1500)"
    theirs+=" $(perftest ib_write_lat -s "$bytes" -n 1500 | awk '{print $5}')"
    sends+=" $(perftest ib_send_lat -s "$bytes" -n 1500 | awk '{print $5}')"
  done
  row latency_us "$bytes" 1 "$(median <<<"$ours")" "$(median <<<"$theirs")"
  row nic_us "$bytes" 1 "$(median <<<"$nic")" "$(median <<<"$theirs")"
  row beside_sends_us "$bytes" 1 "$(median <<<"$ours")" "$(median <<<"$sends")"
done
