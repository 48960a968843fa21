#!/usr/bin/env bash
# Stage two: cache latents, then train Latte.
#   bash scripts/stage2_latte.sh --vae odvae|wan|ltx|... [--vae-path DIR] [--dataset ucf101|sky_timelapse] --data DIR [key=value ...]
# mode=online trains without a cache. LAUNCH="accelerate launch --config_file FILE" for several GPUs or DeepSpeed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
dataset=ucf101 dry=false config=
for ((i = 1; i <= $#; i++)); do
    next=$((i + 1))
    case ${!i} in
        --dataset) dataset=${!next:-} ;;
        --dataset=*) dataset=${!i#*=} ;;
        --config | --config=*) config=given ;;
        --dry-run) dry=true ;;
    esac
done
[ -n "$config" ] || set -- --config "$root/configs/stage2/$dataset.yaml" "$@"
if ! $dry; then program cache_latents "$@"; fi
program train_latte "$@"
