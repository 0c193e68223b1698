"""Image data with noised labels, as a LightningDataModule."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

Loader = DataLoader[tuple[Tensor, ...]]


def noise_labels(
    labels: Tensor, fraction: float, classes: int, generator: torch.Generator, asymmetric: bool = False
) -> Tensor:
    """Return labels, int64 ``[n]``, of which a random ``fraction`` is replaced by another class.

    Args:
        labels: True labels, int64 ``[n]``.
        fraction: Share of them that is replaced.
        classes: Number of classes.
        generator: Source of the choice.
        asymmetric: Replace each class by the next one, always, and not by any other one.
    """
    noised = labels.clone()
    chosen = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    shift: Tensor | int = 1 if asymmetric else torch.randint(1, classes, chosen.shape, generator=generator)
    noised[chosen] = (labels[chosen] + shift) % classes
    return noised


class NoisyLabels(pl.LightningDataModule):
    """Training images of which some labels are wrong, and clean validation images.

    Training examples and validation examples have two halves: energies are chosen on the *tuning* half, results are
    reported from the *report* half. The model trains on all training examples.

    Args:
        images: Float images ``[n, h, w]`` or ``[n, c, h, w]``; after a seeded shuffle the first ``num_train`` are
            trained on.
        labels: True labels, int64 ``[n]``.
        num_train: Training images.
        noise: Fraction of training labels that is replaced by another class.
        batch_size: Images per batch.
        seed: Seed of the split and the noise.
        asymmetric: Each class is replaced by the next one, always.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        num_train: int,
        noise: float = 0.1,
        batch_size: int = 64,
        seed: int = 0,
        asymmetric: bool = False,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=generator)
        train, val = order[:num_train], order[num_train:]
        clean = labels[train]
        noised = noise_labels(clean, noise, int(labels.max()) + 1, generator, asymmetric)
        self.batch_size = batch_size
        self.train = TensorDataset(images[train], noised, clean)
        self.val = TensorDataset(images[val], labels[val])

    def train_dataloader(self) -> Loader:
        """Shuffled batches ``(images, noised labels, clean labels)``."""
        return self._loader(self.train, RandomSampler(self.train))

    def val_dataloader(self) -> Loader:
        """Batches ``(images, labels)`` of the tuning half, on which the callback measures the price of its edit."""
        val = self.halves()["tuning"][1]
        return self._loader(val, SequentialSampler(val))

    def probe_dataloader(self) -> dict[str, Loader]:
        """Batches of training and validation images; the callback measures them before and after the edit."""
        probes = {"train": self.train, "val": self.val}
        return {name: self._loader(images, SequentialSampler(images)) for name, images in probes.items()}

    def halves(self) -> dict[str, tuple[TensorDataset, TensorDataset]]:
        """Return ``(train, val)`` of the ``"tuning"`` half and of the ``"report"`` half."""
        return {
            half: (_every_second(self.train, start), _every_second(self.val, start))
            for start, half in enumerate(("tuning", "report"))
        }

    def _loader(self, data: TensorDataset, sampler: Any) -> Loader:
        # The sampler hands out whole batches of indices: one indexing per batch instead of one per image.
        return DataLoader(data, sampler=BatchSampler(sampler, self.batch_size, drop_last=False), batch_size=None)


def _every_second(data: TensorDataset, start: int) -> TensorDataset:
    return TensorDataset(*(tensor[start::2] for tensor in data.tensors))
