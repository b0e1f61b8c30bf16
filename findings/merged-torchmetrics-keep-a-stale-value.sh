#!/usr/bin/env bash
# torchmetrics 1.9.0: merge_state adds the other metric's state and keeps the value that compute() cached before, so
# that compute() still returns the value without the merged rows, without a warning, until an update or a reset. Whoever
# prints a running value between merges prints the first one. Setting `_computed = None` after the merge, or
# compute_with_cache=False, gives the value of all rows.
#
# Output seen:
#   torchmetrics 1.9.0
#   before the merge: 1.0
#   after the merge, state: 6.0 compute(): 1.0
#   without the cache: 6.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torchmetrics==1.9.0" "torch==2.13.0" "numpy==2.4.6"
"$folder/venv/bin/python" - <<'PY'
import torchmetrics
from torchmetrics.aggregation import SumMetric

value = {}
for cached in (True, False):
    metric, other = SumMetric(compute_with_cache=cached), SumMetric()
    metric.update(1.0)
    other.update(5.0)
    before = metric.compute().item()
    metric.merge_state(other)
    value[cached] = metric.compute().item()
    state = metric.sum_value.item()
print("torchmetrics", torchmetrics.__version__)
print("before the merge:", before)
print("after the merge, state:", state, "compute():", value[True])
print("without the cache:", value[False])
assert before == 1.0
assert state == value[False] == 6.0
assert value[True] == 1.0, "compute() after merge_state has the merged rows now"
PY
