#!/usr/bin/env bash
# Generate videos.   bash scripts/sample.sh pipeline=runs/latte-ucf101/pipeline num_videos=2048 [key=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
program sample "$@"
