"""A torchvision ViT on CIFAR-10, a tenth of whose training labels are wrong; the callback takes them out again.

python examples/noisy_labels.py --root FOLDER --epochs 30
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10
from torchvision.models import VisionTransformer
from torchvision.transforms import v2

from lightning_curvature import KFACEditCallback


class WrongLabels(Dataset):
    """A dataset whose first tenth has the label of another class."""

    def __init__(self, data: Dataset, classes: int = 10) -> None:
        self.data, self.classes = data, classes

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.data[index]
        return image, (label + 1 + index % (self.classes - 1)) % self.classes if index < len(self) // 10 else label


class Classifier(L.LightningModule):
    def __init__(self, image_size: int = 32, patch: int = 4, layers: int = 4, width: int = 192) -> None:
        super().__init__()
        self.net = VisionTransformer(image_size, patch, layers, 4, width, 4 * width, num_classes=10)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits = self.net(images)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.05)


def main(train: Dataset, val: Dataset, module: L.LightningModule, **options: object) -> KFACEditCallback:
    callback = KFACEditCallback()
    trainer = L.Trainer(callbacks=[callback], **options)
    trainer.fit(module, DataLoader(WrongLabels(train), 128, shuffle=True), DataLoader(val, 128))
    return callback


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--root", required=True)
    arguments.add_argument("--epochs", type=int, default=30)
    args = arguments.parse_args()
    images = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    train, val = (CIFAR10(args.root, train=part, transform=images, download=True) for part in (True, False))
    main(train, val, Classifier(), max_epochs=args.epochs)
