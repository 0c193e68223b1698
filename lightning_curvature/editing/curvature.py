"""The edit of this package: the high-curvature part of a weight stays."""

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_curvature._checks import check_option
from lightning_curvature.editing.base import DEFAULT_ENERGY
from lightning_curvature.editing.budget import (
    LossCurve,
    energy_within,
    kept_shares,
    loss_curve,
    penalty_keeping,
    penalty_of,
    together,
)
from lightning_curvature.editing.cost import pair_losses
from lightning_curvature.editing.matrix_editor import Part
from lightning_curvature.editing.projection import Projection, project_on_free_device
from lightning_curvature.editing.report import EditReport
from lightning_curvature.editing.scores import SCORES, score_coefficients
from lightning_curvature.editing.weight_editor import WeightEditor
from lightning_curvature.factors.basis import coefficients, project_weight, select_largest, select_staircase, shrink
from lightning_curvature.factors.decomposition import FaultyLayerError, TooFewPositionsError
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.factors.layer import LayerFactors

SCOPES = ("layer", "model")


class _Known(NamedTuple):
    """A weight, its coefficients, and the price of every penalty by score."""

    weight: Tensor
    coefficients: Tensor
    curves: dict[str, LossCurve]


class CurvatureEditor(WeightEditor):
    """Keeps the high-curvature part of weight matrices in their K-FAC eigenbasis.

    A direction ``u_i v_j^T`` of the curvature basis has the mass ``lam_i * mu_j``; directions are kept in falling order
    of mass until they hold the share ``energy`` of the total. Memorized content lives, averaged over a population, in
    the directions that are dropped.

    Source: arXiv:2510.24256, sections 3 and 5.

    Args:
        energy: Kept share of the curvature mass, in (0, 1]; 1.0 changes nothing. Or a dict of fnmatch patterns on layer
            names to shares: the first pattern that matches a layer counts, and layers without a match stay as they are.
            By default 0.85, unless there is a budget.
        layers: fnmatch patterns on layer names; None for all layers of the factors.
        score: How directions are ranked, see :mod:`~lightning_curvature.editing.scores`.
        soft: Shrink coefficients of the score ``s`` smoothly, by ``s / (s + t)``, instead of keeping some and dropping
            others; ``t`` follows from the energy or the budget.
        skip_faulty: Skip a layer that cannot be edited, with a warning, and edit the others: NaN in its weight or its
            factors, or factors of zero. Not for files, where such a layer is always an error.
        min_positions: Positions that each factor of a layer must rest on; a layer with fewer is skipped, with a
            warning. None for as many as the layer's live inputs and outputs, see
            :meth:`lightning_curvature.LayerFactors.too_few_positions`; 0 to skip no layer.
        budget: Instead of an energy: what the edit is predicted to cost over all its layers, in nats per loss position.
            The strength that meets it is found, see :mod:`lightning_curvature.editing.budget`.
        scope: What scores are compared with: those of their ``"layer"``, so that each layer keeps the same share of its
            own, or of the ``"model"``: one threshold, or one ``t``, for all layers that are edited together. By default
            ``"layer"`` for an energy, as in the paper, and ``"model"`` for a budget.

    Raises:
        TypeError: As :class:`lightning_curvature.editing.base.Editor`.
        ValueError: If an argument is out of range.

    Example:
        >>> from torch import nn
        >>> from lightning_curvature import KroneckerFactors
        >>> layer = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> A, G = torch.diag(torch.tensor([9.0, 1.0])), torch.eye(2)
        >>> factors = KroneckerFactors({"0": LayerFactors(A=A, G=G, num_inputs=100, num_gradients=100)})
        >>> report = CurvatureEditor(energy=0.9).edit(layer, factors)
        >>> report.layers["0"].kept, report.layers["0"].energy_kept
        (2, 0.9)
        >>> bool(layer[0].weight[:, 1].any())
        False
    """

    def __init__(
        self,
        energy: float | Mapping[str, float] | None = None,
        layers: list[str] | None = None,
        score: str = "kfac",
        soft: bool = False,
        skip_faulty: bool = False,
        min_positions: int | None = None,
        budget: float | None = None,
        scope: str | None = None,
    ) -> None:
        if energy is not None and budget is not None:
            raise ValueError("Give an energy or a budget, not both: each of them says how strong the edit is.")
        super().__init__(DEFAULT_ENERGY if energy is None else energy, layers)
        self.budget = None if budget is None else _check_budget(budget)
        self.penalty: float | None = None
        self.share: float | None = None
        self.scope = None if scope is None else check_option(scope, SCOPES, "scope")
        self._check_scope()
        self.skip_faulty = skip_faulty
        if min_positions is not None and (isinstance(min_positions, bool) or not isinstance(min_positions, int)):
            raise TypeError(f"min_positions must be an integer or None, found {min_positions!r}.")
        if min_positions is not None and min_positions < 0:
            raise ValueError(f"min_positions must not be negative, found {min_positions!r}.")
        self.min_positions = min_positions
        self.score = check_option(score, SCORES, "score")
        self.use_soft(soft)
        self._known: WeakKeyDictionary[LayerFactors, _Known] | None = None

    def at(self, energy: float | Mapping[str, float]) -> Self:
        """Return the same editor at another energy.

        The new editor keeps the coefficients of each weight, and hands them on to editors that are made from it: a
        search over energies computes them once.
        """
        editor = super().at(energy)
        editor.budget = editor.penalty = editor.share = None
        editor._check_scope()
        editor._known = WeakKeyDictionary() if self._known is None else self._known
        return editor

    def within(self, budget: float) -> Self:
        """Return the same editor with a budget, in nats per loss position; it keeps coefficients as :meth:`at`."""
        editor = self.at(1.0)
        editor.use_budget(budget)
        return editor

    def use_soft(self, soft: bool) -> None:
        """Shrink coefficients, or drop them."""
        self.soft = soft
        self.method = f"{self.score}, soft" if soft else self.score

    def use_budget(self, budget: float) -> None:
        """Take another budget, in nats per loss position, in the place of an energy or a budget."""
        self.energy, self.budget, self.penalty, self.share = 1.0, _check_budget(budget), None, None

    def _check_scope(self) -> None:
        if self.scope == "model" and isinstance(self.energy, dict):
            raise ValueError('scope="model" takes one energy for all layers, and no dict: their scores are compared.')

    @override
    def energies(self, factors: KroneckerFactors) -> dict[str, float]:
        energies = super().energies(factors)
        return energies if self.budget is None else dict.fromkeys(energies, 1.0)

    @property
    @override
    def is_joint(self) -> bool:
        return self.budget is not None or (self.scope == "model" and self.energy != 1.0)

    @override
    def prepared(self, parts: Mapping[str, Part]) -> Self:
        if not self.is_joint:
            return self
        curves, failure = [], None
        for name, part in parts.items():
            try:
                curves.append(project_on_free_device(name, *part(), self._curve))
            except FaultyLayerError:
                continue  # which the edit of the layer meets, too
            except (ValueError, RuntimeError, OSError) as error:
                failure = error
                break
        outcomes = self.ranks.gather((curves, failure))
        for _, failed in outcomes:
            if failed is not None:  # on all processes: none waits for one that has given up
                raise failed
        gathered = [curve for of_rank, _ in outcomes for curve in of_rank]
        editor = copy.copy(self)
        if not gathered:
            editor.penalty = 0.0
        elif self.budget is None:
            assert isinstance(self.energy, float)  # see _check_scope
            editor.penalty = penalty_keeping(together(gathered), self.energy, self.soft)
        elif self.scope == "layer":
            editor.share = energy_within(gathered, self.budget, self.soft)
        else:
            editor.penalty = penalty_of(gathered, self.budget, self.soft)
        return editor

    def _curve(self, weight: Tensor, factors: LayerFactors) -> LossCurve:
        self.check_positions(factors)
        known = self._known_of(weight, factors)
        curves = {} if known is None else known.curves
        if self.score not in curves:
            C = coefficients(weight, factors.basis) if known is None else known.coefficients.to(weight.device)
            curves[self.score] = loss_curve(score_coefficients(self.score, C, factors), pair_losses(C, factors))
        return curves[self.score]

    def check_positions(self, factors: LayerFactors) -> None:
        """Raise ``TooFewPositionsError`` if the factors rest on too few positions."""
        positions = min(factors.num_inputs, factors.num_gradients)
        if self.min_positions is None:
            reason = factors.too_few_positions()
        elif positions < self.min_positions:
            reason = f"its factors rest on {positions} positions, and min_positions={self.min_positions} asks for more."
        else:
            reason = None
        if reason is not None:
            raise TooFewPositionsError(reason)

    def project(self, weight: Tensor, factors: LayerFactors, energy: float) -> Projection:
        """Return the part of a weight in the directions of highest score."""
        basis, device = factors.basis, weight.device
        weight = weight.to(basis.U_A.device)
        if self.penalty is not None:
            C = self._coefficients(weight, factors)
            scores = score_coefficients(self.score, C, factors)
            shares = kept_shares(scores, self.penalty, self.soft)
            edited = project_weight(weight, basis, shares, C).to(device)
            kept = float((scores * shares).sum() / scores.sum())
            return Projection(edited, int((shares > 0).sum()), kept, change=C * (self.scale * shares - 1.0))
        if self.score in ("kfac", "activations") and not self.soft:
            lam = basis.lam if self.score == "kfac" else torch.ones_like(basis.lam)
            staircase = select_staircase(lam, basis.mu, energy)
            known = self._known_of(weight, factors)
            of_known = None if known is None else known.coefficients.to(weight.device)
            edited = project_weight(weight, basis, staircase.columns, of_known)
            return Projection(edited.to(device), staircase.kept, staircase.energy_kept)
        C = self._coefficients(weight, factors)
        select = shrink if self.soft else select_largest
        keep, energy_kept = select(score_coefficients(self.score, C, factors), energy)
        edited = project_weight(weight, basis, keep.to(basis.U_A.dtype), C).to(device)
        return Projection(edited, keep.numel() if self.soft else int(keep.sum()), energy_kept)

    @override
    def facts(self, factors: KroneckerFactors, source: str, report: EditReport | None = None) -> dict[str, Any]:
        facts = super().facts(factors, source, report)
        if self.scope is not None:
            facts["scope"] = self.scope
        if self.budget is None:
            return facts
        for layer in facts["layers"].values():
            del layer["energy"]
        return {**facts, "budget": self.budget}

    def _coefficients(self, weight: Tensor, factors: LayerFactors) -> Tensor:
        """Return the coefficients of a weight, float64, on the device of the factors' basis."""
        known = self._known_of(weight, factors)
        return coefficients(weight, factors.basis) if known is None else known.coefficients.to(weight.device)

    def _known_of(self, weight: Tensor, factors: LayerFactors) -> _Known | None:
        """Return what is kept of a weight for other strengths, see :meth:`at`; None if nothing is kept.

        It lies on the device of the original factors, since the copy of the factors on a GPU is dropped after each
        edit.
        """
        if self._known is None:
            return None
        home = factors.original.A.device
        at_home, known = weight.to(home), self._known.get(factors.original)
        if known is None or known.weight.dtype != weight.dtype or not torch.equal(known.weight, at_home):
            C = coefficients(weight, factors.basis).to(home)
            known = self._known[factors.original] = _Known(weight.to(home, copy=True), C, {})
        return known


def _check_budget(budget: float) -> float:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"budget must be a number of nats per loss position, found {budget!r}.")
    if not 0.0 < budget < math.inf:
        raise ValueError(f"budget must be positive, in nats per loss position, found {budget!r}.")
    return float(budget)
