"""The arguments of every way to collect: which layers, which gradients, which positions, and where they are summed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_curvature._checks import check_count, check_option, check_share
from lightning_curvature.recording.fisher import FISHER_KINDS
from lightning_curvature.recording.positions import check_positions_rule

ACCUMULATE_ON = ("auto", "model", "cpu")


@dataclass(frozen=True)
class CollectorOptions:
    """What is collected from the steps of a model, and how.

    Args:
        layers: Presets or name patterns, see :mod:`lightning_curvature.layers.selection`; None for ``"mlp"`` in a
            deep network, and ``"last-mlp"`` otherwise.
        fisher: Kind of Fisher, see :mod:`lightning_curvature.recording.fisher`.
        draws: Random vectors (labels) per loss position, for ``"sketched"`` (``"sampled"``).
        positions: Which positions count, see :mod:`lightning_curvature.recording.positions`.
        logits: Name of a submodule or method that returns the logits, for models that hide their cross-entropy: a
            tensor ``[batch, classes]``, or one of more dimensions whose classes the softmax of the loss tells.
        class_dim: Dimension of the classes of these logits, where the loss does not tell: 1 for
            ``[batch, classes, ...]``, -1 for ``[batch, ..., classes]``.
        accumulate_on: Where the sums live: ``"model"``, on the device of each layer; ``"cpu"``; or ``"auto"``, on the
            device of each layer if they fit there, and otherwise on the CPU.
        share: Share of the positions that is used, in (0, 1], chosen at random in each batch.
        coupled: Also sum the norm-weighted moments that the score ``"coupled"`` needs, see
            :mod:`~lightning_curvature.editing.scores`: twice the memory and the products.
        seed: Seed of the random vectors and of the chosen positions; the global random state is never touched.

    Raises:
        TypeError: If ``class_dim`` is no integer.
        ValueError: If an argument is none of its options.
    """

    layers: str | Sequence[str] | None = None
    fisher: str = "sketched"
    draws: int = 1
    positions: str = "contributing"
    logits: str | None = None
    class_dim: int | None = None
    accumulate_on: str = "auto"
    share: float = 1.0
    coupled: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self.share, "share")
        check_option(self.fisher, FISHER_KINDS, "fisher")
        check_count(self.draws, "draws")
        check_positions_rule(self.positions)
        check_option(self.accumulate_on, ACCUMULATE_ON, "accumulate_on")
        if self.class_dim is None:
            return
        if isinstance(self.class_dim, bool) or not isinstance(self.class_dim, int):
            raise TypeError(f"class_dim must be an integer or None, found {self.class_dim!r}.")
        if self.logits is None:
            raise ValueError(
                "class_dim says which dimension of named logits holds the classes: name them with logits='...'."
            )

    @property
    def is_empirical(self) -> bool:
        """Whether the gradients are those of the training's own backward pass."""
        return self.fisher == "empirical"

    @property
    def settings(self) -> dict[str, Any]:
        """What two collections must have in common for one to go on with the sums of the other."""
        names = ("layers", "fisher", "draws", "positions", "logits", "class_dim")
        return {name: getattr(self, name) for name in names} | ({"coupled": True} if self.coupled else {})

    @property
    def provenance(self) -> dict[str, Any]:
        """What a factor file says of how it was collected."""
        provenance = {"fisher": self.fisher, "draws": self.draws, "positions": self.positions}
        return provenance | ({"share": float(self.share)} if self.share < 1 else {})
