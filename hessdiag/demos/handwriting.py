"""The handwritten digits that ship with the package; their licence is DIGITS-ATTRIBUTION.md."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import torch
from torch import Tensor

DARKEST = 16
"""The value of a pixel whose 4 x 4 dots are all black."""


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 test images of the UCI handwritten digits, and which digit each one shows.

    Returns:
        Images, float32 ``(1797, 8, 8)``, 0 for white paper to 1 for ink, each row of pixels from
        left to right; and labels, int64 ``(1797,)``, 0 to 9. Fresh tensors at every call.
    Source:
        Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits.
    """
    with files(__package__).joinpath("digits.npz").open("rb") as stream:
        arrays = np.load(stream, allow_pickle=False)
        images = torch.from_numpy(arrays["images"])
        labels = torch.from_numpy(arrays["labels"])
    return images.to(torch.float32) / DARKEST, labels.to(torch.int64)
