# Sourced by the scripts: where the repository is and how a program is started. Works from any directory.
# An active environment that has the packages is used; else .venv of this repository, made by scripts/setup.sh.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
needed='import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))'
if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && python -c "$needed" torch diffusers accelerate omegaconf av google_crc32c; then
    python=python
else
    bash "$root/scripts/setup.sh"
    python=${OMNILATTE_VENV:-$root/.venv}/bin/python
    PATH=$(dirname "$python"):$PATH
fi
export HOME=${HOME:-$(dirname "$(dirname "$(command -v "$python")")")} # packages ask for one, e.g. deepspeed

program() { # program NAME ARGUMENTS...: LAUNCH is e.g. "accelerate launch --config_file FILE"
    local name=$1
    shift
    # shellcheck disable=SC2086
    ${LAUNCH:-$python} -m "pipelines.$name" "$@"
}
