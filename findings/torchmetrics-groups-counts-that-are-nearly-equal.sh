#!/usr/bin/env bash
# torchmetrics 1.9.0: a MetricCollection joins metrics into a compute group where their states are "the same" after the
# first update, and compares counts, which are integers, by allclose (1e-5 relative). Two metrics whose counts differ by
# a few of a million in the first batch, such as two thresholds on the pixels of a mask, are joined for good: the second
# is never updated again and reports the first one's value. compute_groups=False gives each its own.
#
# Output seen:
#   torchmetrics 1.9.0
#   groups: ['high', 'low']
#   in the collection: high 0.5 low 0.5
#   each by itself:    high 0.5 low 0.75
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torchmetrics==1.9.0" "torch==2.13.0" "numpy==2.4.6"
"$folder/venv/bin/python" - <<'PY'
import torch
import torchmetrics
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy

pixels = 1_000_000
index = torch.arange(pixels)
target = index % 2
first = (index // 2 % 2).float()  # right at a half of the pixels, at either threshold, but for one pixel at 0.6
first[0] = 0.6
second = 0.6 * target  # right everywhere at the lower threshold, at a half of the pixels at the higher one
metrics = {"low": BinaryAccuracy(threshold=0.5), "high": BinaryAccuracy(threshold=0.7)}


def values(joined):
    collection = MetricCollection(metrics, compute_groups=joined).clone()
    for preds in (first, second):
        collection.update(preds, target)
    found = {name: round(value.item(), 2) for name, value in collection.compute().items()}
    return found, list(collection.compute_groups.values())


found, groups = values(True)
alone, _ = values(False)
print("torchmetrics", torchmetrics.__version__)
print("groups:", *groups)
print("in the collection:", *(f"{name} {value}" for name, value in found.items()))
print("each by itself:   ", *(f"{name} {value}" for name, value in alone.items()))
assert groups == [["high", "low"]], "metrics of different counts have groups of their own now"
assert found["low"] == found["high"] == alone["high"]
assert abs(alone["low"] - alone["high"]) > 0.1
PY
