"""Editing weights: in place, for the time of a ``with`` block, or in a state dict."""

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_curvature._checks import check_energy, check_option, did_you_mean, listing
from lightning_curvature._version import __version__
from lightning_curvature.basis import coefficients, project_weight, select_largest, select_staircase, shrink
from lightning_curvature.factors import KroneckerFactors, LayerFactors
from lightning_curvature.layers import as_matrix, from_matrix, is_conv1d, is_editable, refusal
from lightning_curvature.report import EditReport, LayerEdit
from lightning_curvature.scores import SCORES, score_coefficients

DEFAULT_ENERGY = 0.85
"""Share of the curvature mass that is kept unless the user says otherwise; docs/decisions.md shows the evidence."""


@dataclass(frozen=True)
class Projection:
    """A new weight matrix, and what of the old one it keeps."""

    weight: Tensor
    kept: int
    energy_kept: float


class Editor(ABC):
    """Changes weights of the layers of some factors; methods differ in what they need to know for it.

    Args:
        energy: Share to keep, in (0, 1]; or a dict of fnmatch patterns on layer names to shares, of which the first
            that matches counts and layers without a match stay as they are.
        layers: fnmatch patterns on layer names; None for all layers of the factors.

    Raises:
        TypeError: If ``energy`` is no number, or ``layers`` no list of patterns.
        ValueError: If ``energy`` lies outside (0, 1].
    """

    method: str

    def __init__(self, energy: float | Mapping[str, float] = DEFAULT_ENERGY, layers: list[str] | None = None) -> None:
        self.energy = _checked(energy)
        if layers is not None and (isinstance(layers, str) or not all(isinstance(entry, str) for entry in layers)):
            raise TypeError(f"layers must be a list of name patterns or None, found {layers!r}.")
        self.layers = None if layers is None else list(layers)

    def at(self, energy: float | Mapping[str, float]) -> Self:
        """Return the same editor at another energy."""
        other = copy.copy(self)
        other.energy = _checked(energy)
        return other

    @abstractmethod
    def edited_weights(self, module: nn.Module, factors: KroneckerFactors) -> tuple[dict[str, Tensor], EditReport]:
        """Return new weights by layer, and what was done; nothing is written.

        Raises:
            ValueError: As :meth:`edit`.
        """

    def edit(self, module: nn.Module, factors: KroneckerFactors) -> EditReport:
        """Edit the weights of a module in place.

        Raises:
            ValueError: If the factors do not fit the module; names the layer, both shapes and the remedy. Nothing is
                edited then.
        """
        weights, report = self.edited_weights(module, factors)
        with torch.no_grad():
            for name, weight in weights.items():
                module.get_parameter(f"{name}.weight").copy_(weight)
        return report

    @contextmanager
    def applied(self, module: nn.Module, factors: KroneckerFactors) -> Iterator[EditReport]:
        """Edit a module for the time of a ``with`` block; afterwards it is bit for bit what it was.

        Raises:
            ValueError: As :meth:`edit`.
        """
        weights, report = self.edited_weights(module, factors)
        originals = {name: module.get_parameter(f"{name}.weight").detach().clone() for name in weights}
        try:
            with torch.no_grad():
                for name, weight in weights.items():
                    module.get_parameter(f"{name}.weight").copy_(weight)
            yield report
        finally:
            with torch.no_grad():
                for name, original in originals.items():
                    module.get_parameter(f"{name}.weight").copy_(original)

    def plan(self, factors: KroneckerFactors) -> dict[str, float]:
        """Return the energy of each layer to edit.

        Raises:
            ValueError: If there are no factors, or a pattern matches none of their layers.
        """
        if not factors:
            raise ValueError("There are no factors: nothing was collected yet, so there is nothing to edit with.")
        names = list(factors)
        for pattern in [*(self.layers or []), *(self.energy if isinstance(self.energy, dict) else [])]:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"Pattern {pattern!r} matches no layer of the factors.{did_you_mean(pattern, names)} "
                    f"They hold {listing(names)}."
                )
        if self.layers is not None:
            names = [name for name in names if any(fnmatchcase(name, pattern) for pattern in self.layers)]
        if not isinstance(self.energy, dict):
            return dict.fromkeys(names, self.energy)
        plan = {}
        for name in names:
            matching = [energy for pattern, energy in self.energy.items() if fnmatchcase(name, pattern)]
            if matching:
                plan[name] = matching[0]
        if not plan:
            raise ValueError(f"energy={self.energy!r} and layers={self.layers!r} have no layer in common.")
        return plan


class WeightEditor(Editor):
    """An edit that replaces weight matrices one by one; the methods differ in :meth:`project` alone.

    Arguments as :class:`Editor`.
    """

    keeps_at_full_energy = True
    """Whether an energy of 1 leaves a weight as it is."""

    @abstractmethod
    def project(self, weight: Tensor, factors: LayerFactors, energy: float) -> Projection:
        """Return the edited ``[d_out, d_in]`` weight; ``energy`` is below 1."""

    def edit_state_dict(
        self, state_dict: Mapping[str, Tensor], factors: KroneckerFactors
    ) -> tuple[dict[str, Tensor], EditReport]:
        """Return a state dict with edited weights; the input stays as it is, untouched tensors are shared.

        Keys that share memory with an edited weight (tied weights) get the edited tensor too.

        Raises:
            ValueError: As :meth:`edit`.
        """
        edited = dict(state_dict)
        weights, reports = {}, {}
        for name, energy in self.plan(factors).items():
            key = f"{name}.weight"
            if key not in state_dict:
                raise ValueError(
                    f"Layer {name!r}: the state dict has no {key!r}.{did_you_mean(key, state_dict)} Were the factors "
                    "collected on another model? Layer names are relative to the module that was collected."
                )
            layer = factors[name]
            weights[key], reports[name] = self.edit_weight(name, state_dict[key], layer, energy, layer.transposed)
        for key, tensor in state_dict.items():
            for changed, weight in weights.items():
                if _same_memory(tensor, state_dict[changed]):
                    edited[key] = weight
        return edited, EditReport(reports, self.method, factors.provenance)

    def edit_checkpoint(
        self, src: str | os.PathLike[str], factors: KroneckerFactors, dst: str | os.PathLike[str], **options: Any
    ) -> EditReport:
        """Write an edited copy of a saved checkpoint; see :func:`lightning_curvature.files.edit_checkpoint`."""
        from lightning_curvature.files import edit_checkpoint

        return edit_checkpoint(self, src, factors, dst, **options)

    def facts(self, factors: KroneckerFactors, source: str) -> dict[str, Any]:
        """Return what an edited checkpoint says about itself, as JSON values.

        Args:
            factors: The factors.
            source: Hash of the unedited weights, see :func:`lightning_curvature.checkpoints.formats.content_hash`.
        """
        return {
            "method": self.method,
            "package": f"lightning_curvature {__version__}",
            "source": source,
            "factors": factors.digest(),
            "provenance": factors.provenance,
            "layers": {name: {"energy": energy, "positions": factors[name].num_inputs}
                       for name, energy in self.plan(factors).items()},
        }  # fmt: skip

    def edited_weights(self, module: nn.Module, factors: KroneckerFactors) -> tuple[dict[str, Tensor], EditReport]:
        """Return new weights by layer, and what was done, computed from the factors alone."""
        weights, reports = {}, {}
        for name, energy in self.plan(factors).items():
            layer = find_layer(module, name)
            transposed = is_conv1d(layer)
            weights[name], reports[name] = self.edit_weight(name, layer.weight, factors[name], energy, transposed)
        return weights, EditReport(reports, self.method, factors.provenance)

    def edit_weight(
        self, name: str, weight: Any, factors: LayerFactors, energy: float, transposed: bool
    ) -> tuple[Tensor, LayerEdit]:
        """Return a new weight, in the layout and dtype of the stored one, and what was done to it.

        Args:
            name: Layer, for errors.
            weight: Stored weight.
            factors: Its factors.
            energy: Share to keep, in (0, 1].
            transposed: Whether the weight is stored as ``[d_in, d_out]``.

        Raises:
            ValueError: If the factors are for a weight of another shape.
        """
        stored = weight.detach()
        if not stored.is_floating_point() or stored.dtype.itemsize < 2:
            raise ValueError(
                f"Layer {name!r}: its weight is packed or quantized ({stored.dtype}, {list(stored.shape)}), and its "
                "entries cannot be edited. Edit the model in full precision, and quantize it afterwards."
            )
        if stored.dim() < 2 or not bool(torch.isfinite(stored).all()):
            what = (
                "holds NaN or infinite values"
                if stored.dim() > 1
                else f"is no matrix, it has the shape {list(stored.shape)}"
            )
            raise ValueError(f"Layer {name!r}: its weight {what}.")
        matrix = as_matrix(stored, transposed)
        if tuple(matrix.shape) != factors.shape:
            raise ValueError(
                f"Layer {name!r}: factors are for a {list(factors.shape)} weight, the module has "
                f"{list(matrix.shape)}. Were they collected on another model?"
            )
        if energy == 1.0 and self.keeps_at_full_energy:
            result = Projection(matrix, matrix.numel(), 1.0)
        else:
            try:
                result = self.project(matrix, factors, energy)
            except ValueError as error:
                raise ValueError(f"Layer {name!r}: {error}") from error
        change = torch.linalg.vector_norm((result.weight - matrix).double()) / torch.linalg.vector_norm(matrix.double())
        new = from_matrix(result.weight, stored, transposed)
        edit = LayerEdit(
            energy=energy,
            energy_kept=result.energy_kept,
            kept=result.kept,
            total=matrix.numel(),
            relative_change=float(change.nan_to_num()),
            changed=int((new != stored).sum()),
            tensor=f"{name}.weight",
            num_inputs=factors.num_inputs,
            dropped=1.0 - factors.num_inputs / factors.num_seen if factors.num_seen else 0.0,
        )
        return new, edit


class CurvatureEditor(WeightEditor):
    """Keeps the high-curvature part of weight matrices in their K-FAC eigenbasis.

    A direction ``u_i v_j^T`` of the curvature basis has the mass ``lam_i * mu_j``; directions are kept in falling order
    of mass until they hold the share ``energy`` of the total. Memorized content lives, averaged over a population, in
    the directions that are dropped.

    Source: arXiv:2510.24256, sections 3 and 5.

    Args:
        energy: Kept share of the curvature mass, in (0, 1]; or a dict of fnmatch patterns on layer names to shares, of
            which the first that matches counts and layers without a match stay as they are. 1.0 changes nothing.
        layers: fnmatch patterns on layer names; None for all layers of the factors.
        score: What a direction is worth, see :mod:`lightning_curvature.scores`.
        soft: Shrink coefficients smoothly, by ``s / (s + t)``, instead of keeping some and dropping others; ``t`` is
            such that the share ``energy`` of the scores is kept.

    Example:
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
        energy: float | Mapping[str, float] = DEFAULT_ENERGY,
        layers: list[str] | None = None,
        score: str = "kfac",
        soft: bool = False,
    ) -> None:
        super().__init__(energy, layers)
        self.score = check_option(score, SCORES, "score")
        self.soft = soft
        self.method = f"{score}, soft" if soft else score
        self._known: WeakKeyDictionary[LayerFactors, tuple[Tensor, Tensor]] | None = None

    def at(self, energy: float | Mapping[str, float]) -> Self:
        """Return the same editor at another energy; it and those made from it compute coefficients of weights once."""
        other = super().at(energy)
        other._known = WeakKeyDictionary() if self._known is None else self._known
        return other

    def project(self, weight: Tensor, factors: LayerFactors, energy: float) -> Projection:
        """Return the part of a weight in its directions of highest score."""
        basis, device = factors.basis, weight.device
        if device.type != basis.U_A.device.type:
            weight = weight.to(basis.U_A.device)
        known = self._coefficients(weight, factors)
        if self.score in ("kfac", "activations") and not self.soft:
            lam = basis.lam if self.score == "kfac" else torch.ones_like(basis.lam)
            staircase = select_staircase(lam, basis.mu, energy)
            edited = project_weight(weight, basis, staircase.columns, known)
            return Projection(edited.to(device), staircase.kept, staircase.energy_kept)
        C = coefficients(weight, basis) if known is None else known
        keep, kept = (shrink if self.soft else select_largest)(score_coefficients(self.score, C, factors), energy)
        edited = project_weight(weight, basis, keep.to(basis.U_A.dtype), C).to(device)
        return Projection(edited, keep.numel() if self.soft else int(keep.sum()), kept)

    def _coefficients(self, weight: Tensor, factors: LayerFactors) -> Tensor | None:
        """Return all coefficients of a weight if several energies share them, None if there is only one."""
        if self._known is None:
            return None
        old, C = self._known.get(factors, (None, None))
        if old is None or C is None or not (old.dtype == weight.dtype and torch.equal(old, weight)):
            C = coefficients(weight, factors.basis)
            self._known[factors] = (weight.clone(), C)
        return C


def find_layer(module: nn.Module, name: str) -> Any:
    """Return a layer by its name.

    Raises:
        ValueError: If there is no such layer, or it cannot be edited.
    """
    layer = dict(module.named_modules()).get(name)
    if layer is None:
        names = [found for found, candidate in module.named_modules() if is_editable(candidate)]
        raise ValueError(
            f"Layer {name!r}: the module has no such layer.{did_you_mean(name, names)} Were the factors collected on "
            "another model? Layer names are relative to the module that was collected."
        )
    if not is_editable(layer):
        reason = refusal(layer) or f"it is a {type(layer).__name__}"
        raise ValueError(f"Layer {name!r} cannot be edited: {reason}.")
    return layer


def _checked(energy: float | Mapping[str, float]) -> float | dict[str, float]:
    if isinstance(energy, Mapping):
        return {pattern: check_energy(value, f"energy[{pattern!r}]") for pattern, value in energy.items()}
    return check_energy(energy)


def _same_memory(one: Any, two: Tensor) -> bool:
    return isinstance(one, Tensor) and (
        one is two
        or (one.data_ptr() == two.data_ptr() and one.shape == two.shape and one.stride() == two.stride()
            and one.numel() > 0 and one.device == two.device)
    )  # fmt: skip
