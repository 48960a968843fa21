#!/usr/bin/env bash
# Sets up the environment and runs lint and all tests. Arguments go to pytest, e.g. --slow or tests/unit/vae.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
python=${OMNILATTE_VENV:-$root/.venv}/bin/python
cd "$root"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
"$python" -m ruff check .
"$python" -m ruff format --check .
exec "$python" -m pytest -n "${OMNILATTE_TEST_WORKERS:-2}" "$@"
