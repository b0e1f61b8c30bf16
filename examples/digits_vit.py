"""A small vision Transformer learns handwritten digits, with every block watched.

Prints the loss, and the share of new digits that it reads, now and then; draws the entropy of each block over the
training, a row for each block. It takes half a minute on one core. It needs matplotlib, and scikit-learn for the
digits.

    python examples/digits_vit.py --picture docs/figures/examples/digits_vit.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastent


class VisionTransformer(nn.Module):
    """Blocks of attention over the 16 patches of 2 x 2 pixels of an 8 x 8 image."""

    def __init__(self, width: int = 48, depth: int = 6) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
        )
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 8, 8)."""
        patches = images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, 16, 4)
        return self.head(self.blocks(self.embed(patches) + self.position).mean(1))


def main(arguments: Sequence[str] | None = None) -> fastent.SpectralEntropyMonitor:
    """Train and draw; return the monitor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=20, help="steps between two evaluations of the entropy")
    parser.add_argument("--picture", type=Path, default=Path("digits_vit.png"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    x, y = torch.tensor(digits.images / 16, dtype=torch.float32)[order], torch.tensor(digits.target)[order]
    model = VisionTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    # The last 256 images are for testing, and the probe. The head reads the mean over the patches, and so do we.
    with fastent.SpectralEntropyMonitor(
        model, x[-256:], "blocks.*", every=options.every, tokens="mean"
    ) as monitor:
        for step in range(options.steps + 1):
            batch = torch.randint(len(x) - 256, (64,))
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            monitor.step(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 100 == 0:
                with torch.no_grad():
                    right = (model(x[-256:]).argmax(1) == y[-256:]).float().mean()
                print(f"step {step:4}  loss {loss:.3f}  test accuracy {right:.3f}")
    print(monitor.cost)
    monitor.plot("heatmap").figure.savefig(options.picture, dpi=120)
    return monitor


if __name__ == "__main__":
    main()
