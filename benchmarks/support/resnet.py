"""A small ResNet with batch norms, for images."""

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.demos.vit import LitViT


class Block(nn.Module):
    """Two convolutions around which the input goes, through a third one where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Transform features ``[b, c, h, w]``."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Three blocks of growing width.

    Args:
        channels: Channels of the images.
        stride: Stride of the first convolution.
        width: Features of the first block.
        classes: Number of classes.
    """

    def __init__(self, channels: int, stride: int, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.channels = channels
        self.stem = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images ``[b, h, w]`` of one channel, or ``[b, c, h, w]``."""
        images = images.view(len(images), self.channels, *images.shape[-2:])
        logits: Tensor = self.head(self.blocks(F.relu(self.norm(self.stem(images)))).mean((2, 3)))
        return logits


class LitResNet(LitViT):
    """Trains :class:`ResNet` as the ViT of the demos is trained, with a small weight decay."""

    def __init__(self, channels: int, stride: int, decay: float = 0.05) -> None:
        super().__init__(weight_decay=decay, attention_decay=1.0)
        self.model = ResNet(channels, stride)
