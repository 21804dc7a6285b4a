#!/usr/bin/env bash
# Time L16 on 16 replicas of 4 IPUs, in 4 processes under PopRun: two epochs
# of generated images, sent as bytes and encoded in every step. Nothing is saved.
# HOSTS lists the hosts; the partition is the one that the Poplar SDK uses.
set -u
cd "$(dirname "$0")/.."
exec poprun --host "$HOSTS" --vipu-partition="$IPUOF_VIPU_API_PARTITION_ID" --num-instances=4 --num-replicas=16 \
    --ipus-per-replica=4 python train.py --config L16_POD64 --device ipu --generated-data --no-codes-cache --byteio True \
    --checkpoint-output-dir "" --epochs 2 --executable-cache-dir ./output/executables "$@"
