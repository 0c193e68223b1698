"""Small networks and LightningModules shared by the tests."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature.demos.vit import ViT


def vit():
    return ViT(image_size=8, patch=4, classes=4, width=16, depth=2, heads=2, inner=8, mlp_ratio=2)


def torchvision_vit():
    model = torchvision.models.VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=4)
    nn.init.normal_(model.heads.head.weight, std=0.1)  # torchvision starts it at zero: no gradient would reach the rest
    return nn.Sequential(Channels(3), model)


def hf_vit_config():
    return transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=4,
    )


def mlp():
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.ReLU(inplace=True),
        nn.Linear(32, 24),
        nn.ReLU(inplace=True),
        nn.Linear(24, 4),
    )


def cnn():
    return nn.Sequential(
        Channels(1),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(16, 4),
    )


class Channels(nn.Module):
    """Images [b, h, w] to [b, c, h, w]."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        return x[:, None].expand(-1, self.channels, -1, -1)


class Classifier(pl.LightningModule):
    """Any network, with the cross-entropy as a module, as a function, or after log_softmax."""

    def __init__(self, network="mlp", loss="function", lr=0.01):
        super().__init__()
        self.save_hyperparameters()
        self.net = {"mlp": mlp, "cnn": cnn, "vit": vit, "torchvision": torchvision_vit}[network]()
        self.criterion = nn.CrossEntropyLoss()
        self.loss = loss
        self.lr = lr

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        images, labels, *_ = batch
        logits = self(images)
        if self.loss == "module":
            loss = self.criterion(logits, labels)
        elif self.loss == "nll":
            loss = F.nll_loss(logits.log_softmax(-1), labels)
        else:
            loss = F.cross_entropy(logits, labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Validated(Classifier):
    """Computes its loss in the validation step, and returns nothing."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class HFClassifier(Classifier):
    """The loss is computed inside the model's own forward."""

    def __init__(self, lr=0.01):
        super().__init__(lr=lr)
        self.save_hyperparameters()
        self.net = transformers.ViTForImageClassification(hf_vit_config())

    def forward(self, x):
        return self.net(pixel_values=x[:, None])

    def training_step(self, batch, batch_idx):
        images, labels, *_ = batch
        return self.net(pixel_values=images[:, None], labels=labels).loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        output = self.net(pixel_values=images[:, None], labels=labels)
        self.log("val_loss", output.loss)
        self.log("val_accuracy", (output.logits.argmax(1) == labels).float().mean())


def images(n, seed=0, classes=4):
    """Separable images [n, 8, 8]: a bright quadrant says the class, over noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    x = 0.5 * torch.randn(n, 8, 8, generator=generator)
    for index, label in enumerate(labels.tolist()):
        x[index, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 1.0
    return TensorDataset(x, labels)


def loader(data, batch_size=32):
    return DataLoader(data, batch_size=batch_size)


def trainer(tmp_path, *callbacks, **options):
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | options))
