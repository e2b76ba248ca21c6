#!/usr/bin/env bash
# Measures the plugin on a Hopper GPU host, without network: starts the real server with the plugin installed in the same
# interpreter, and writes one JSON result per case.
#
#   test/gpu/run.sh [--out DIR] [CASE ...]   cases: prenorm exact restart patched nvrtc serve gather pp
#                                              start_up monitor record model_targets, and bundle with WARMSTART_GPU_BUNDLE=FILE made of its plan
#
# Needs: SGLang 0.5.12 with sgl-deep-gemm and sgl_kernel in $PYTHON (default python3), nvcc of CUDA_HOME.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
cp -r "$root/python" "$root/patches" "$root/pyproject.toml" "$root/setup.py" "$root/README.md" "$site/"  # pip builds where the source is
"$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --no-compile --target "$site/site" "$site"
export PYTHONPATH="$site/site:$here/probe:$root/test${PYTHONPATH:+:$PYTHONPATH}"
"$python" "$here/measure.py" "$@"
