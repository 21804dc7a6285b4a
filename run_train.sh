#!/usr/bin/env bash
# bash run_train.sh                         install, then train the demo from nothing to a grid of images
# bash run_train.sh demo_long               the same with more steps
# bash run_train.sh scenes [flags]          render scenes of things, train a VQGAN and a DALL-E on them, evaluate; resumes
# bash run_train.sh photos FOLDER [flags]   train a VQGAN and a DALL-E on a folder of captioned images; resumes
# bash run_train.sh NAME [flags]            install, then run train.py --config NAME [flags]
set -euo pipefail
from=$PWD
cd "$(dirname "$0")"
name=${1:-demo}
case "$name" in
-h | --help)
    sed -n 's/^# //p' run_train.sh
    exit
    ;;
-*)
    echo "run_train.sh: the first word should be a configuration's name, not $name; --help lists the forms" >&2
    exit 2
    ;;
photos)
    if [ $# -lt 2 ]; then
        echo "run_train.sh: photos needs your folder of captioned images: bash run_train.sh photos FOLDER" >&2
        exit 2
    fi
    ;;
esac
. ./install.sh
install requirements.txt

if [ "$name" = photos ]; then
    case "$2" in /*) folder=$2 ;; *) folder=$from/$2 ;; esac
    python train_vqgan.py --config vqgan_photos --resume --input-folder "$folder"
    exec python train.py --config photos --resume --input-folder "$folder" "${@:3}"
fi
if [ "$name" = scenes ]; then
    install requirements-scenes.txt
    python -m data.scenes
    python train_vqgan.py --config vqgan_scenes --resume
    python train.py --config scenes --resume "${@:2}"
    python train_vqgan.py --config vqgan_scenes_decoder --resume
    python -m utils.checkpoint_info "$(ls -t output/scenes/ckpt/dalle_*.pt | head -n 1)" \
        --export output/scenes/dalle.safetensors --half --decoder output/scenes/vqgan_sharp
    [ -f output/scenes/reader.pt ] || python -m training.scenes_reader --vae-path output/scenes/vqgan_sharp
    exec python evaluate.py --dalle_path output/scenes/dalle.safetensors --prompts-of scenes --outputs-dir output/scenes
fi
if [ "$name" = demo ] || [ "$name" = demo_long ]; then
    python -m data.shapes
    python train_vqgan.py --config vqgan_demo --resume
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
