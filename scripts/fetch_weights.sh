#!/usr/bin/env bash
# Get the judging networks I3D, AlexNet and VGG16 (111 MB to download), verified.   bash scripts/fetch_weights.sh [DIR]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
exec "$python" "$root/eval/fetch_weights.py" "$@"
