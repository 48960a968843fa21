#!/usr/bin/env bash
# Runs the tests with the lowest versions that dependencies.txt allows, in an environment of its own (.venv-lowest, 7 GB).
# bash scripts/test_lowest.sh [--fast] [PYTEST ARGUMENTS]    --fast: scan, one training of each
# stage, a pipeline loaded, an export
# PYTHON=... chooses the interpreter (>= 3.11), OMNILATTE_LOWEST_VENV=... another place for the environment.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=${OMNILATTE_LOWEST_VENV:-$root/.venv-lowest}
stamp=$venv/.dependencies.txt

if ! cmp -s dependencies.txt "$stamp"; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
    pins=$(mktemp)
    trap 'rm -f "$pins"' EXIT
    "$venv/bin/uv" pip compile --quiet --resolution lowest-direct --extra dev --python "$venv/bin/python" pyproject.toml -o "$pins"
    VIRTUAL_ENV=$venv "$venv/bin/uv" pip install --quiet -r "$pins"
    cp dependencies.txt "$stamp"
fi

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
chosen=()
if [ "${1:-}" = --fast ]; then
    shift
    chosen=(
        tests/unit/data/test_environment.py
        tests/unit/data/test_scan.py::test_an_intact_file_gives_its_numbers
        tests/programs/test_train_vae.py::test_exported_folder_opens_as_a_diffusers_model_with_the_ema_weights
        tests/programs/test_train_latte.py::test_exported_pipeline_holds_the_ema_weights_and_the_class_names
        tests/programs/test_sample.py::test_pipeline_survives_saving_and_loading
        tests/programs/test_export.py::test_an_exported_pipeline_generates_what_the_original_does
    )
fi
"$venv/bin/python" -c 'from importlib.metadata import version as v; print("lowest:", *(f"{n} {v(n)}" for n in "torch diffusers accelerate deepspeed numpy av timm".split()))'
exec "$venv/bin/python" -m pytest -n "${OMNILATTE_TEST_WORKERS:-2}" "${chosen[@]}" "$@"
