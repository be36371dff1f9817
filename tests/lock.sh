#!/usr/bin/env bash
# Writes requirements.lock: the versions that a fresh environment gets from requirements.in today.
#
# Run it by `make lock` after a change of requirements.in or of a distribution's dependencies. The five
# distributions are put beside them without their dependencies, and `pip check` says what requirements.in misses.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "resolving requirements.in in a fresh environment (a few minutes) ..."
"$python" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install --requirement "$root/requirements.in"
for package in fp8core protos agent collector dashboard; do
    "${pip[@]}" install --no-deps --no-build-isolation --editable "$root/$package"
done
"${pip[@]}" check

# A local version such as 2.13.0+cpu names a build that only one index has; its public version is everywhere.
{
    echo "# Made by \`make lock\` (tests/lock.sh) from requirements.in with $("$python" --version), $(date +%Y-%m-%d): do not edit."
    "${pip[@]}" freeze --all --exclude pip --exclude-editable | sed -E 's/^([^=]+==[^+]+)\+.*/\1/'
} >"$work/requirements.lock"

# This machine may have wheels of its own, such as a torch without CUDA; others take theirs from the public index,
# where the same version can ask for other versions beside it.
echo "checking that the public index can serve it too ..."
env -u PIP_FIND_LINKS -u PIP_INDEX_URL -u PIP_EXTRA_INDEX_URL PIP_CONFIG_FILE=/dev/null \
    "${pip[@]}" install --dry-run --ignore-installed --requirement "$work/requirements.lock" || {
    echo "requirements.lock is left as it was: change requirements.in so that both resolve" >&2
    exit 1
}
cp "$work/requirements.lock" "$root/requirements.lock"
echo "wrote requirements.lock: $(grep -c == "$root/requirements.lock") packages"
