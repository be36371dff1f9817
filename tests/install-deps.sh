#!/usr/bin/env bash
# Installs what the tests need beyond Python: a browser and fonts, PostgreSQL, Prometheus, Alertmanager, OpenSSL, setpriv, a C++ compiler.
#
# By apt-get, as root, and only what is missing; otherwise it prints the command to run. The services that the
# packages bring are not started: the tests start their own, on free ports, and end them.
set -euo pipefail

has() { command -v "$1" >/dev/null 2>&1; }

missing=()
need() { # PACKAGE CHECK...: PACKAGE is missing unless CHECK succeeds
    local package=$1
    shift
    "$@" || missing+=("$package")
}

has_browser() { has chromium || has chromium-browser || has google-chrome; }
has_alertmanager() { { has prometheus-alertmanager || has alertmanager; } && has amtool; }
has_prometheus() { has prometheus && has promtool; }
has_postgresql() {
    local program
    for program in initdb pg_dump pg_restore; do
        has "$program" || compgen -G "/usr/lib/postgresql/*/bin/$program" >/dev/null || return 1
    done
}
has_fonts() { [ -e /usr/share/fonts/truetype/dejavu/DejaVuSans.ttf ]; }
has_sans() { [ -e /usr/share/fonts/truetype/liberation/LiberationSans-Regular.ttf ]; }

need chromium has_browser
need fonts-dejavu-core has_fonts
need fonts-liberation has_sans
need g++ has g++
need iproute2 has ss
need openssl has openssl
need postgresql has_postgresql
need prometheus has_prometheus
need prometheus-alertmanager has_alertmanager
need util-linux has setpriv
need wget has wget

if [ ${#missing[@]} -eq 0 ]; then
    echo "test dependencies: all installed"
    exit 0
fi
if ! has apt-get; then
    echo "test dependencies missing: ${missing[*]} (Debian's names), and there is no apt-get here; install them by hand" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "test dependencies missing: ${missing[*]}; installing needs root. Run:" >&2
    echo "  sudo apt-get update && sudo apt-get install --no-install-recommends ${missing[*]}" >&2
    exit 1
fi

# Debian asks policy-rc.d before a package starts its service; 101 says no. One that is there already stays.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi

echo "installing ${missing[*]} ..."
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --no-install-recommends "${missing[@]}" >/dev/null
echo "test dependencies: installed ${missing[*]}"
