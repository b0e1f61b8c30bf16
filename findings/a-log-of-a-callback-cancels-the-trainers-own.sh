#!/usr/bin/env bash
# transformers 5.24.0: a callback that calls trainer.log in on_step_end, at a step at which the Trainer would log, takes
# the Trainer's own row away: every log clears control.should_log, which the Trainer reads after on_step_end. Loss,
# learning rate and gradient norm of that step are in no log, without a warning. Restoring `control.should_log` after
# the call keeps the row.
#
# Output seen:
#   transformers 5.24.0
#   steps with a loss, no callback: [2, 4, 6]
#   a callback that logs at step 4: [2, 6]
#   the same, should_log restored:  [2, 4, 6]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "transformers==5.24.0" "accelerate==1.15.0" "torch==2.13.0" "numpy==2.4.6"
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import contextlib
import io

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def forward(self, x, labels=None):
        return {"loss": (self.linear(x) - labels).square().mean()}


class Logs(TrainerCallback):
    def __init__(self, restores):
        self.restores = restores

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            wanted = control.should_log
            trainer.log({"weight": 1.0})
            if self.restores:
                control.should_log = wanted


def steps_with_a_loss(*callbacks):
    global trainer
    data = [{"x": torch.ones(3), "labels": torch.zeros(1)} for _ in range(24)]
    options = {"max_steps": 6, "logging_steps": 2, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    args = TrainingArguments("run", per_device_train_batch_size=4, disable_tqdm=True, **options)
    trainer = Trainer(Net(), args, train_dataset=data, callbacks=list(callbacks))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every log
        trainer.train()
    return [row["step"] for row in trainer.state.log_history if "loss" in row]


without, canceled, restored = steps_with_a_loss(), steps_with_a_loss(Logs(False)), steps_with_a_loss(Logs(True))
print("transformers", transformers.__version__)
print("steps with a loss, no callback:", without)
print("a callback that logs at step 4:", canceled)
print("the same, should_log restored: ", restored)
assert without == restored == [2, 4, 6]
assert canceled == [2, 6], "a callback's log no longer takes the Trainer's own"
PY
