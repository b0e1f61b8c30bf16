#!/usr/bin/env bash
# torch 2.13.0 (CPU): torch.linalg.eigvalsh computes the eigenvectors too, and returns eigenvalues of other last bits, as
# soon as any TorchDispatchMode is active, one that changes nothing (a FLOP counter, a logger) included, although no
# gradient is recorded. A number that is to be compared bit for bit must not be taken inside such a mode.
#
# Output seen:
#   torch 2.13.0
#   compute_v without a gradient, in the mode: True
#   same bits with and without the mode: False
#   largest difference over the largest eigenvalue: under 1e-5
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6"
"$folder/venv/bin/python" - <<'PY'
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Unchanged(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.vectors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_linalg_eigh" in str(function):
            self.vectors.append(args[2] if len(args) > 2 else (kwargs or {}).get("compute_v", True))
        return function(*args, **(kwargs or {}))


x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
matrix = x.T @ x
with torch.no_grad():
    plain = torch.linalg.eigvalsh(matrix)
    with Unchanged() as mode:
        inside = torch.linalg.eigvalsh(matrix)
print("torch", torch.__version__.partition("+")[0])
print("compute_v without a gradient, in the mode:", *mode.vectors)
print("same bits with and without the mode:", torch.equal(plain, inside))
difference = float((plain - inside).abs().max() / plain[-1])
print("largest difference over the largest eigenvalue: under 1e-5" if difference < 1e-5 else difference)
assert mode.vectors == [True], "eigvalsh no longer asks for eigenvectors in a mode"
assert not torch.equal(plain, inside), "the bits are the same now"
assert difference < 1e-5
PY
