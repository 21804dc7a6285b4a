#!/usr/bin/env bash
# bash run_train.sh               installs, then runs the demo from nothing to a grid of pictures
# bash run_train.sh demo_long     draws and trains the same with more steps
# bash run_train.sh NAME [flags]  installs, then runs train.py --config NAME [flags]
set -euo pipefail
cd "$(dirname "$0")"
. ./install.sh
install requirements.txt

name=${1:-demo}
if [ "$name" = demo ] || [ "$name" = demo_long ]; then
    python -m data.shapes
    [ -f output/demo/vqgan/vqgan.ckpt ] || python train_vqgan.py --config vqgan_demo
fi
if [ $# -gt 0 ]; then
    shift
    exec python train.py --config "$name" "$@"
fi
if [ ! -f output/demo/trained ]; then
    python train.py --config demo --resume
    touch output/demo/trained
fi
python evaluate.py --dalle_path "$(ls -t output/demo/ckpt/dalle_*.pt | head -n 1)"
