"""Editing weights: in place, for the time of a ``with`` block, or in a state dict."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from lightning_curvature._checks import check_energy, did_you_mean, listing
from lightning_curvature._version import __version__
from lightning_curvature.basis import project_weight, select_staircase
from lightning_curvature.factors import KroneckerFactors, LayerFactors
from lightning_curvature.layers import as_matrix, from_matrix, is_conv1d, is_editable, refusal

DEFAULT_ENERGY = 0.85
"""Share of the curvature mass that is kept unless the user says otherwise; docs/decisions.md shows the evidence."""


@dataclass(frozen=True)
class LayerEdit:
    """What an edit did to one layer.

    Args:
        energy: Asked share of the method's mass.
        energy_kept: Reached share.
        kept: Kept coefficients.
        total: All coefficients, ``d_out * d_in``.
        relative_change: ``||W' - W|| / ||W||`` (Frobenius).
        changed: Entries of the stored weight that are not what they were, after rounding to its dtype.
        tensor: Name of the weight.
        num_inputs: Positions behind the layer's factors.
        dropped: Share of the positions seen that did not count.
    """

    energy: float
    energy_kept: float
    kept: int
    total: int
    relative_change: float
    changed: int
    tensor: str
    num_inputs: int
    dropped: float


@dataclass(frozen=True)
class EditReport:
    """What an edit did; ``print(report)`` shows a table.

    Args:
        layers: By module name.
        method: Name of the editing method.
        provenance: Where the factors come from.
    """

    layers: Mapping[str, LayerEdit]
    method: str = "kfac"
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        headers = [
            "layer",
            "energy",
            "reached",
            "kept",
            "of",
            "share",
            "changed",
            "||W'-W||/||W||",
            "positions",
            "not counted",
        ]
        rows = [
            [
                name,
                f"{edit.energy:.3g}",
                f"{edit.energy_kept:.4f}",
                edit.kept,
                edit.total,
                f"{edit.kept / edit.total:.1%}",
                f"{edit.changed / edit.total:.1%}",
                f"{edit.relative_change:.3f}",
                edit.num_inputs,
                f"{edit.dropped:.1%}",
            ]
            for name, edit in self.layers.items()
        ]
        source = ", ".join(f"{key}={value}" for key, value in self.provenance.items())
        title = f"Edited layers (method {self.method}; {source})" if source else f"Edited layers (method {self.method})"
        table = tabulate(rows, headers, disable_numparse=True, colalign=("left", *("right",) * (len(headers) - 1)))
        return f"{title}\n{table}"


@dataclass(frozen=True)
class Projection:
    """A new weight matrix, and what of the old one it keeps."""

    weight: Tensor
    kept: int
    energy_kept: float


class WeightEditor(ABC):
    """An edit that replaces weight matrices one by one; the methods differ in :meth:`project` alone.

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
        if isinstance(energy, Mapping):
            self.energy: float | dict[str, float] = {
                pattern: check_energy(value, f"energy[{pattern!r}]") for pattern, value in energy.items()
            }
        else:
            self.energy = check_energy(energy)
        if layers is not None and (isinstance(layers, str) or not all(isinstance(entry, str) for entry in layers)):
            raise TypeError(f"layers must be a list of name patterns or None, found {layers!r}.")
        self.layers = None if layers is None else list(layers)

    @abstractmethod
    def project(self, weight: Tensor, factors: LayerFactors, energy: float) -> Projection:
        """Return the edited ``[d_out, d_in]`` weight; ``energy`` is below 1."""

    def edit(self, module: nn.Module, factors: KroneckerFactors) -> EditReport:
        """Edit the weights of a module in place.

        Raises:
            ValueError: If the factors do not fit the module; names the layer, both shapes and the remedy. Nothing is
                edited then.
        """
        weights, report = self._edited_weights(module, factors)
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
        weights, report = self._edited_weights(module, factors)
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

    def _edited_weights(self, module: nn.Module, factors: KroneckerFactors) -> tuple[dict[str, Tensor], EditReport]:
        """Compute everything before anything is written."""
        weights, reports = {}, {}
        for name, energy in self.plan(factors).items():
            layer = _layer(module, name)
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
        matrix = as_matrix(stored, transposed)
        if tuple(matrix.shape) != factors.shape:
            raise ValueError(
                f"Layer {name!r}: factors are for a {list(factors.shape)} weight, the module has "
                f"{list(matrix.shape)}. Were they collected on another model?"
            )
        if energy == 1.0:
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

    method = "kfac"

    def project(self, weight: Tensor, factors: LayerFactors, energy: float) -> Projection:
        """Return the part of a weight in its high-curvature directions."""
        basis = factors.basis
        staircase = select_staircase(basis.lam, basis.mu, energy)
        device = weight.device
        if device.type != basis.U_A.device.type:
            weight = weight.to(basis.U_A.device)
        edited = project_weight(weight, basis, staircase.columns)
        return Projection(edited.to(device), staircase.kept, staircase.energy_kept)


def _layer(module: nn.Module, name: str) -> Any:
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


def _same_memory(one: Any, two: Tensor) -> bool:
    return isinstance(one, Tensor) and (
        one is two
        or (one.data_ptr() == two.data_ptr() and one.shape == two.shape and one.stride() == two.stride()
            and one.numel() > 0 and one.device == two.device)
    )  # fmt: skip
