#!/usr/bin/env bash
# The reference run on a CUDA GPU, in one go within about 8 minutes. Arguments go to bench/gpu.py, or, if the first one is
# "serving", to bench/serving.py.
#   MLX_HOME  a folder that `pip install --target` filled (mlx, mlx-cuda-13, the nvidia packages, tunesmith's dependencies);
#             without it the packages of the Python in PYTHON (default python3) are used
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$here/../src${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
if [[ -n "${MLX_HOME:-}" ]]; then
  export PYTHONPATH="$PYTHONPATH:$MLX_HOME"
  libraries="$MLX_HOME/mlx/lib"
  for folder in "$MLX_HOME"/nvidia/*/lib; do
    [[ -d "$folder" ]] && libraries="$libraries:$folder"
  done
  export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  # MLX compiles kernels as it runs and needs CUDA's headers.
  if [[ -z "${CUDA_HOME:-}${CUDA_PATH:-}" && ! -d /usr/local/cuda/include ]]; then
    for folder in "$MLX_HOME"/nvidia/cu1* "$MLX_HOME"/nvidia/cuda_runtime; do
      [[ -d "$folder/include" ]] && export CUDA_HOME="$folder" && break
    done
  fi
fi
script=gpu
if [[ "${1:-}" == serving ]]; then
  script=serving
  shift
fi
exec "${PYTHON:-python3}" "$here/$script.py" "$@"
