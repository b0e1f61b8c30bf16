"""A language model from a Hugging Face configuration, every block watched by a callback of the Trainer.

Nothing is downloaded: the model is a small Llama that reads bytes, and the text is this repository's documentation, or
any file. Prints the loss of training and of new text, and at the end each block's entropy at first and at last; draws
the entropy of each block over the training. It takes half a minute on one core. It needs transformers, accelerate and
matplotlib.

    python examples/language_model.py --picture docs/figures/examples/language_model.png
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fastent.integrations.transformers import SpectralEntropyCallback

DOCS = Path(__file__).resolve().parent.parent / "docs" / "mathematics.md"
LENGTH = 64


def passages(text: Path) -> Tensor:
    """Bytes of a text in pieces of `LENGTH`, as int64 (n, LENGTH)."""
    tokens = torch.tensor(list(text.read_bytes()))
    return tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)


def main(arguments: Sequence[str] | None = None) -> Trainer:
    """Train and draw; return the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", type=Path, default=DOCS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps between two evaluations of the entropy")
    parser.add_argument("--picture", type=Path, default=Path("language_model.png"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    text = passages(options.text)
    train, new = text[: -len(text) // 10], text[-len(text) // 10 :]
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4
    )
    callback = SpectralEntropyCallback(
        layers="model.layers.*", probe={"input_ids": new[:32]}, every=options.every, tokens="flatten"
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=options.steps, per_device_train_batch_size=32, learning_rate=2e-3, use_cpu=True,
            logging_steps=50, eval_strategy="steps", save_strategy="no", report_to="none",
        )  # fmt: skip
        trainer = Trainer(
            LlamaForCausalLM(config),
            settings,
            train_dataset=[{"input_ids": piece, "labels": piece} for piece in train],
            eval_dataset=[{"input_ids": piece, "labels": piece} for piece in new],
        )
        callback.attach(trainer)  # its values go to the Trainer's logs, and to what report_to names
        trainer.train()
    for layer in callback.monitor.layers:
        values = [record.normalized for record in callback.monitor.history if record.layer == layer]
        print(f"{layer}: entropy {values[0]:.3f} at first, {values[-1]:.3f} at last")
    callback.monitor.plot("lines").figure.savefig(options.picture, dpi=120)
    return trainer


if __name__ == "__main__":
    main()
