#!/usr/bin/env bash
# bash run_tests.sh [pytest arguments]   installs, then runs the tests
set -euo pipefail
cd "$(dirname "$0")"
. ./install.sh
install requirements.txt requirements-app.txt requirements-scenes.txt requirements-test.txt
# The oracles come without the packages that only their other parts need; a test that misses one skips.
oracles="dalle-pytorch==1.6.6 axial_positional_embedding==0.2.1 rotary-embedding-torch==0.8.9 open_clip_torch==3.3.0"
oracles="$oracles torch-fidelity==0.4.0 DALL-E==0.1 attrs"
if ! python -c "import importlib.metadata as m; [m.version(p) for p in ('dalle-pytorch', 'open_clip_torch', 'torch-fidelity', 'DALL-E')]" 2>/dev/null; then
    python -m pip install --quiet "setuptools<81" wheel &&
        python -m pip install --quiet --no-deps --no-build-isolation $oracles ||
        echo "some oracles are missing; their tests skip"
fi
# Two at once, of one thread each: most of what is tested is small.
case " $* " in *" -n"* | *" -s "*) ;; *) set -- -n 2 "$@" ;; esac
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python -m pytest "$@"
