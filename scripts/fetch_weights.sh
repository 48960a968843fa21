#!/usr/bin/env bash
# Prints where the judges' official weights are (it downloads nothing), or verifies downloaded ones.
# bash scripts/fetch_weights.sh [FILE...]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
exec "${OMNILATTE_VENV:-$root/.venv}/bin/python" "$root/eval/check_weights.py" "$@"
