#!/usr/bin/env bash
# Kills each program 50 times at random moments and compares its end with that of one never killed; writes
# docs/results/kills.json and kills.md. All eight programs take more than an hour; 3 minutes on two idle CPU cores:
#   bash scripts/kill_test.sh --seed 1 --programs train_vae,train_latte,cache_latents,sample
# Other arguments: tests/faults/kills.py --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
exec "$python" "$root/tests/faults/kills.py" --kills 50 --out "$root/docs/results/kills.json" "$@"
