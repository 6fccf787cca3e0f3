#!/bin/sh
# Installs what some tests need beside Python packages: Debian's PostgreSQL (tests/fleet) and Chromium (pages that are looked at).
# Where it cannot, it says why and goes on: those tests are then skipped with their reason.
set -u
missing=""
[ -n "$(ls -d /usr/lib/postgresql/*/bin/initdb 2>/dev/null)" ] || command -v initdb >/dev/null 2>&1 || missing="$missing postgresql"
command -v chromium >/dev/null 2>&1 || missing="$missing chromium"
if [ -z "$missing" ]; then
  echo "services: postgresql and chromium are installed"
  exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
  echo "services: not installing$missing: only root can" >&2
  exit 0
fi
if ! command -v apt-get >/dev/null 2>&1; then
  echo "services: not installing$missing: this is no Debian" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || echo "services: apt-get cannot reach its sources" >&2
# One at a time: where one is not to be had, the other still is. Tests start servers of their own, so none is started here.
for package in $missing; do
  if apt-get install -y -qq --no-install-recommends "$package" >/dev/null; then
    echo "services: installed $package"
  else
    echo "services: $package could not be installed" >&2
  fi
done
exit 0
