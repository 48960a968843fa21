#!/usr/bin/env bash
# Makes .venv with the pinned, hashed requirements.txt. Up to date already: returns at once. Interrupted: the next call completes it.
# PYTHON=... chooses the interpreter (>= 3.11), OMNILATTE_VENV=... another place for the environment.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${OMNILATTE_VENV:-$root/.venv}
stamp=$venv/.requirements.txt

if cmp -s "$root/requirements.txt" "$stamp"; then exit 0; fi

new_enough='import sys; sys.exit(sys.version_info < (3, 11))'
python=
for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    [ -z "$python" ] && "$candidate" -c "$new_enough" 2>/dev/null && python=$candidate
done
if [ -z "$python" ]; then
    there=$("${PYTHON:-python3}" --version 2>/dev/null || echo "no ${PYTHON:-python3}")
    echo "error: Python >= 3.11 is needed, there is $there; set PYTHON=/path/to/python" >&2
    exit 2
fi

place=$(dirname "$venv")
mkdir -p "$place" 2>/dev/null || true
[ -w "$venv" ] || [ -w "$place" ] || { echo "error: $place cannot be written to; say where the environment goes: OMNILATTE_VENV=FOLDER" >&2; exit 2; }
free_gib=$(($(df -Pk "$place" | awk 'NR==2 {print $4}') / 1048576))
if [ "$free_gib" -lt 7 ]; then # measured: 6.4 GiB
    echo "error: $free_gib GiB free under $place; the environment takes 7 GiB: make room, or OMNILATTE_VENV=FOLDER on another disk" >&2
    exit 2
fi
if [ "$free_gib" -lt 10 ]; then # pip keeps what it downloads until all is installed
    echo "warning: $free_gib GiB free under $place; the environment takes 7 GiB, its downloads up to 3 GiB more on the disk of ${TMPDIR:-/tmp}" >&2
fi

echo "making $venv (torch with its CUDA libraries: about 3 GB to download, minutes)"
export HOME=${HOME:-$venv} # building deepspeed asks for one
"$python" -m venv "$venv" # on a half-made one: completes it
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r "$root/requirements.txt"
cp "$root/requirements.txt" "$stamp"
