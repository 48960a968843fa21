#!/usr/bin/env bash
# The whole path on two CPU cores: environment, VAE, latents, Latte, 32 videos, scores, runs/demo/report.html.
# bash scripts/demo.sh [--data DIR] [--out DIR] [--short]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
program demo "$@"
