#!/usr/bin/env bash
# Stage one: train OD-VAE.   bash scripts/stage1_vae.sh --data DIR model.init_from=SD_VAE_DIR [key=value ...]
# Several GPUs: LAUNCH="accelerate launch --config_file configs/accelerate/ddp8.yaml" bash scripts/stage1_vae.sh ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
program train_vae --config "$root/configs/stage1/odvae.yaml" "$@"
