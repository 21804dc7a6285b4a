#!/usr/bin/env bash
# Time L16 on one replica of 4 IPUs: two epochs of generated images, sent as bytes and encoded in every step.
# Nothing is saved.
cd "$(dirname "$0")/.."
exec python train.py --config L16 --device ipu --generated-data --no-codes-cache --byteio True \
    --checkpoint-output-dir "" --epochs 2 "$@"
