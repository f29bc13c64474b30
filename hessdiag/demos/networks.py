"""The demo networks: real architectures, so small that their whole Hessian is exact in seconds.

An exact Hessian of n parameters costs n products over all images; the sizes keep that under half
a minute on two cores.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PIXELS = 8
CLASSES = 10


def mlp() -> nn.Sequential:
    """Two layers with tanh between; 2,410 parameters, 96 of them at three pixels without ink."""
    return nn.Sequential(nn.Linear(PIXELS**2, 32), nn.Tanh(), nn.Linear(32, CLASSES))


class ConvNet(nn.Module):
    """Two convolutions without padding, each under BatchNorm and ReLU; 868 parameters.

    Takes images ``(batch, 1, 8, 8)``; the second convolution sees all of its 3 x 3 input at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, kernel_size=3, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.pool = nn.AvgPool2d(2)
        self.conv2 = nn.Conv2d(6, 12, kernel_size=3, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, 10)``."""
        hidden = self.pool(torch.relu(self.bn1(self.conv1(images))))
        hidden = torch.relu(self.bn2(self.conv2(hidden)))
        logits: Tensor = self.head(hidden.flatten(1))
        return logits


class Transformer(nn.Module):
    """A pre-norm encoder layer that reads an image as eight rows of pixels; 842 parameters.

    Takes images ``(batch, 8, 8)``. The learned ``position`` of each row belongs to the root module.
    """

    def __init__(self) -> None:
        super().__init__()
        width = 8
        self.embed = nn.Linear(PIXELS, width)
        self.position = nn.Parameter(0.1 * torch.randn(PIXELS, width))
        self.encoder = nn.TransformerEncoderLayer(
            d_model=width,
            nhead=2,
            dim_feedforward=2 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, 10)``, from the mean over the eight rows."""
        rows = self.encoder(self.embed(images) + self.position)
        logits: Tensor = self.head(self.norm(rows.mean(dim=1)))
        return logits
