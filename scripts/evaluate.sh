#!/usr/bin/env bash
# FVD and KVD (I3D), then IS (C3D).   bash scripts/evaluate.sh REAL_DIR FAKE_DIR [--num-videos N] [--weights W] ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 2 ] || { echo "usage: bash scripts/evaluate.sh REAL_DIR FAKE_DIR [options that fvd.py and inception_score.py share]" >&2; exit 2; }
real=$1 fake=$2
shift 2
"$python" "$root/eval/fvd.py" --real "$real" --fake "$fake" "$@"
"$python" "$root/eval/inception_score.py" --fake "$fake" "$@"
