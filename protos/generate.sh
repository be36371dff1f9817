#!/usr/bin/env bash
# Writes the Python code of telemetry.proto; with --check, only says whether the committed code is current.
# The generator is pinned: its output runs on protobuf 5 to 7, that of newer ones refuses older runtimes.
# The NotImplementedError in its output is gRPC's answer of a service without that method; our servicers have them all.
set -euo pipefail
cd "$(dirname "$0")"
venv=../.venv-protos
if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c 'import grpc_tools' 2>/dev/null; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check 'grpcio-tools==1.63.2' 'setuptools<81'
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"$venv/bin/python" -W ignore -m grpc_tools.protoc -I . \
  --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" fp8scope_protos/v1/telemetry.proto
if [ "${1:-}" = --check ]; then
  for file in "$out"/fp8scope_protos/v1/*; do
    cmp -s "$file" "fp8scope_protos/v1/$(basename "$file")" ||
      { echo "fp8scope_protos/v1/$(basename "$file") is not what telemetry.proto gives: run 'make protos'" >&2; exit 1; }
  done
else
  cp "$out"/fp8scope_protos/v1/* fp8scope_protos/v1/
fi
