#!/usr/bin/env bash
# An etcd for the tests of the registry: the server out of Debian's etcd-server, put into .venv/bin. The package itself is
# not installed, because that starts a service on this machine. Where it cannot be had, those tests are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
if command -v etcd >/dev/null || [ -x .venv/bin/etcd ]; then exit 0; fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
fetch() { (cd "$folder" && apt-get -qq download etcd-server) >/dev/null 2>&1; }
update() {
  local sudo=()
  [ "$(id -u)" -eq 0 ] || sudo=(sudo -n)
  "${sudo[@]}" apt-get -qq -o DPkg::Lock::Timeout=300 update >/dev/null 2>&1
}
if ! command -v apt-get >/dev/null || ! { fetch || { update && fetch; }; }; then
  echo "etcd: this machine's packages have no etcd-server; the tests that need it will be skipped" >&2
  exit 0
fi
dpkg -x "$folder"/etcd-server_*.deb "$folder"
install -m 755 "$folder/usr/bin/etcd" .venv/bin/etcd
