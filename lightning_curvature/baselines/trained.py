r"""Unlearning by training: rivals that need examples to forget and examples to keep.

Each one trains on a *forget* set and a *retain* set, and changes only the weights of the chosen layers. They are called
like every other editor, but the factors only tell them which layers to edit: they do not use the curvature.

With :math:`\ell` the mean negative log-likelihood of a set, and ``w`` the weight:

- :class:`BalancedSubnet` (Sakarvadia et al. 2025, arXiv:2410.02159) learns a score for each weight, and sets the
  weights of the highest scores to zero: the mask minimises :math:`-w \ell_{forget} + (1 - w) \ell_{retain}`.
- :class:`GradientAscent` minimises :math:`-w \ell_{forget} + (1 - w) \ell_{retain}` over the weights themselves.
- :class:`NegativePreference` (NPO, Zhang et al. 2024, arXiv:2404.05868) replaces the first term, which has no bound, by
  :math:`\frac{2}{\beta} \log(1 + (p / p_0)^\beta)` with ``p`` and :math:`p_0` the likelihoods after and before.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lightning_curvature._checks import check_count
from lightning_curvature.editing.base import Editor
from lightning_curvature.editing.projection import relative_change
from lightning_curvature.editing.report import EditReport, LayerEdit
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.layers.modules import find_layer
from lightning_curvature.layers.ties import check_tie, find_tie, named_tensors, tied_names

Loss = Callable[[nn.Module, Any], Tensor]


class TrainedEditor(Editor):
    """Unlearning by training on the chosen layers.

    Args:
        forget: Batches of examples to forget.
        retain: Batches of examples to keep; they are repeated if there are fewer.
        loss: Returns the mean negative log-likelihood of each example of a batch, ``[n]``, given a module and a batch.
        weight: Weight of the forget loss; the retain loss has one minus it.
        epochs: Passes over the forget set.
        lr: Learning rate of Adam.
        layers: fnmatch patterns on layer names; None for all layers of the factors.

    Raises:
        ValueError: If there is nothing to forget or to retain, or a number is out of range.
    """

    method: str

    def __init__(
        self,
        forget: Sequence[Any],
        retain: Sequence[Any],
        loss: Loss,
        *,
        weight: float = 0.5,
        epochs: int = 10,
        lr: float = 1e-3,
        layers: list[str] | None = None,
    ) -> None:
        super().__init__(1.0, layers)
        if not forget or not retain:
            raise ValueError("Unlearning by training needs batches to forget and batches to retain.")
        if not 0.0 < weight < 1.0:
            raise ValueError(f"weight must lie between 0 and 1, found {weight!r}.")
        self.forget, self.retain, self.loss = list(forget), list(retain), loss
        self.weight, self.lr = weight, lr
        self.epochs = check_count(epochs, "epochs")

    @abstractmethod
    def parameters(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors to train, by layer, given the weights; with ``requires_grad``."""

    @abstractmethod
    def effective(self, weights: dict[str, Tensor], trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that the module runs with, by layer, differentiable in the trained tensors."""

    def forget_loss(self, losses: Tensor, before: Tensor) -> Tensor:
        """Return the loss to minimise on examples to forget.

        Args:
            losses: Negative log-likelihood of each example, ``[n]``.
            before: The same before the training, ``[n]``.
        """
        return -losses.mean()

    def edited_weights(self, module: nn.Module, factors: KroneckerFactors) -> tuple[dict[str, Tensor], EditReport]:
        """Return new weights by layer, and a report; the module stays as it is."""
        stored = {name: find_layer(module, name).weight for name in self.energies(factors)}
        check_tie(find_tie(stored))
        weights = {name: weight.detach() for name, weight in stored.items()}
        with torch.no_grad():
            before = [self.loss(module, batch) for batch in self.forget]
        trained = self.parameters(weights)
        optimizer = torch.optim.Adam(trained.values(), lr=self.lr)
        num_steps = self.epochs * len(self.forget)
        batches = zip(cycle(zip(self.forget, before, strict=True)), cycle(self.retain), strict=False)
        for (forget, losses_before), retain in islice(batches, num_steps):
            effective = {f"{name}.weight": weight for name, weight in self.effective(weights, trained).items()}
            with torch.enable_grad():
                retain_loss = _losses(module, effective, self.loss, retain).mean()
                forget_loss = self.forget_loss(_losses(module, effective, self.loss, forget), losses_before)
                objective = self.weight * forget_loss + (1 - self.weight) * retain_loss
                gradients = torch.autograd.grad(objective, list(trained.values()))
            for parameter, gradient in zip(trained.values(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        with torch.no_grad():
            new = {name: weight.detach() for name, weight in self.effective(weights, trained).items()}
        report = EditReport({name: _layer_edit(name, weights[name], new[name]) for name in weights}, self.method)
        return new, report.with_tied(tied_names(stored, named_tensors(module)))


class GradientAscent(TrainedEditor):
    """Gradient ascent on the examples to forget, descent on the examples to keep.

    Arguments as :class:`TrainedEditor`.
    """

    method = "gradient ascent"

    def parameters(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of the weights."""
        return {name: weight.clone().requires_grad_(True) for name, weight in weights.items()}

    def effective(self, weights: dict[str, Tensor], trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the trained weights."""
        return trained


class NegativePreference(GradientAscent):
    """Negative preference optimization (NPO).

    Args:
        *args: As :class:`TrainedEditor`.
        beta: Inverse temperature; towards 0 it becomes gradient ascent.
        **options: As :class:`TrainedEditor`.
    """

    method = "npo"

    def __init__(self, *args: Any, beta: float = 0.1, **options: Any) -> None:
        super().__init__(*args, **options)
        if not beta > 0:
            raise ValueError(f"beta must be positive, found {beta!r}.")
        self.beta = beta

    def forget_loss(self, losses: Tensor, before: Tensor) -> Tensor:
        """Return ``2 / beta * log(1 + (p / p0)^beta)``, ``log p = -losses``."""
        return 2 / self.beta * F.softplus(self.beta * (before - losses)).mean()


class BalancedSubnet(TrainedEditor):
    """Finds the single weights that are responsible for recitation by training, and sets them to zero.

    Args:
        *args: As :class:`TrainedEditor`.
        ratio: Share of the weights of each layer that is set to zero, in (0, 1).
        seed: Seed of the scores at the beginning; the global random state is not touched.
        **options: As :class:`TrainedEditor`.
    """

    method = "balanced subnet"

    def __init__(self, *args: Any, ratio: float = 0.05, seed: int = 0, **options: Any) -> None:
        super().__init__(*args, **options)
        if not 0.0 < ratio < 1.0:
            raise ValueError(f"ratio must lie between 0 and 1, found {ratio!r}.")
        self.ratio = ratio
        self.seed = seed

    def parameters(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return random scores, small against a step of the optimizer."""
        generator = torch.Generator().manual_seed(self.seed)
        return {
            name: (1e-3 * torch.rand(weight.shape, dtype=torch.float32, generator=generator, device="cpu"))
            .to(weight.device)
            .requires_grad_(True)
            for name, weight in weights.items()
        }

    def effective(self, weights: dict[str, Tensor], trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights, zero where scores are highest; gradients pass the mask straight through."""
        effective = {}
        for name, scores in trained.items():
            count = max(round(self.ratio * scores.numel()), 1)
            removed = torch.zeros_like(scores).flatten()
            removed[scores.detach().flatten().topk(count).indices] = 1.0
            removed = removed.view_as(scores)
            if scores.requires_grad and torch.is_grad_enabled():
                removed = removed + scores - scores.detach()
            effective[name] = weights[name] * (1 - removed.to(weights[name].dtype))
        return effective


def _losses(module: nn.Module, weights: dict[str, Tensor], loss: Loss, batch: Any) -> Tensor:
    """Return the loss of each example of a batch, ``[n]``, with some weights of the module replaced."""
    replaced = {f"module.{name}": weight for name, weight in weights.items()}
    losses: Tensor = functional_call(_LossOf(module, loss), replaced, (batch,))
    return losses


class _LossOf(nn.Module):
    """Computes a loss of a module in its ``forward``, so that ``functional_call`` can replace the module's weights."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.module, batch)


def _layer_edit(name: str, old: Tensor, new: Tensor) -> LayerEdit:
    return LayerEdit(
        energy=1.0,
        energy_kept=1.0,
        kept=int((new != 0).sum()),
        total=old.numel(),
        relative_change=relative_change(new, old),
        changed=int((new != old).sum()),
        tensor=f"{name}.weight",
        num_inputs=0,
        dropped=0.0,
    )
