"""Wrong labels: the edit of the callback without arguments, and what people do against label noise instead.

Protocol, for each seed: a small ViT, or a small ResNet with batch norms, is trained with
``Trainer(callbacks=[KFACEditCallback()])`` on images some of whose labels are wrong. Of the same training are

- *edited*: the edited copy that the callback leaves; of a ResNet also the same edit with the statistics of its batch
  norms as they were;
- *early stopping*: the weights of the epoch of highest validation accuracy;
- *averaging*: the exponential moving average of the weights, decay 0.99 a step.

Each of the others is a training of its own: *label smoothing* (0.1), *GCE* (generalized cross-entropy, q = 0.7; Zhang
and Sabuncu 2018), and *decay* (four times the weight decay). Validation images that choose an epoch, or the edit, are
one half; all numbers are from the other half. ``seconds`` are those of trainings beyond the first one, or of the edit.

    python benchmarks/bench_noise_rivals.py digits --out results/rivals-digits.json
    python benchmarks/bench_noise_rivals.py mnist --root FOLDER --out results/rivals-mnist.json
    python benchmarks/bench_noise_rivals.py mnist --root FOLDER --network resnet --out results/rivals-mnist-resnet.json
    python benchmarks/bench_noise_rivals.py digits --noise 0.2 --asymmetric --same-training
"""

import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from typing_extensions import override

from lightning_curvature import KFACEditCallback
from lightning_curvature.demos.label_noise import METRICS, evaluate
from lightning_curvature.demos.noise import NoisyLabels
from lightning_curvature.demos.vit import LitViT
from lightning_curvature.editing.batch_norm import batch_norms
from support.environment import environment, parser, quiet
from support.images import cifar10, digits, fit, mnist
from support.resnet import LitResNet
from support.tables import Columns, summary

COLUMNS: Columns = {**{metric: (metric, 100, 1) for metric in METRICS}, "seconds": ("seconds", 1, 0)}
GCE = 0.7
RESNET_EPOCHS = 40
DECAYS = 4.0

Row = dict[str, float]
Loss = Callable[[Tensor, Tensor], Tensor]


def generalized_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ``(1 - p^q) / q`` of the labels' probabilities, a loss between cross-entropy and mean absolute error."""
    p = logits.softmax(-1).gather(1, labels[:, None])
    return ((1 - p**GCE) / GCE).mean()


LOSSES: dict[str, Loss] = {
    "label smoothing": partial(F.cross_entropy, label_smoothing=0.1),
    "GCE": generalized_cross_entropy,
    "decay": F.cross_entropy,
}


class OtherLoss(pl.Callback):
    """Trains with another loss than the model's own."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace the step of training."""
        pl_module.training_step = lambda batch, *_: self.loss(pl_module(batch[0]), batch[1])


class Watch(pl.Callback):
    """Keeps the weights of the best epoch, and averages the weights of all steps."""

    def __init__(self, val: torch.utils.data.TensorDataset, train: torch.utils.data.TensorDataset) -> None:
        self.val, self.train, self.best, self.accuracy = val, train, None, -1.0

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the average."""
        self.average = AveragedModel(pl_module.model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Go on with the average."""
        self.average.update_parameters(pl_module.model)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the weights if they are the best ones."""
        accuracy = evaluate(pl_module, self.train, self.val)["val_accuracy"]
        if accuracy > self.accuracy:
            self.accuracy, self.best = accuracy, copy.deepcopy(pl_module.model)


class Timed(KFACEditCallback):
    """Says how long the choice of its edit took."""

    seconds = 0.0

    def _spend(self, *args: Any) -> None:
        started = time.perf_counter()
        super()._spend(*args)
        self.seconds = time.perf_counter() - started


def run(make: Callable[[], tuple[NoisyLabels, LitViT, int]], seed: int, same_training: bool) -> dict[str, Row]:
    """Return the rows of one seed."""
    pl.seed_everything(seed, verbose=False)
    data, model, epochs = make()
    (train, val), (choose_train, choose_val) = (data.halves()[half] for half in ("report", "tuning"))
    callback, watch = Timed(), Watch(choose_val, choose_train)
    trainer = fit(model, data, epochs, [callback, watch])
    rows = {"before": evaluate(model, train, val)}
    with TemporaryDirectory() as folder:  # what a user gets: the edited copy of a checkpoint
        trainer.save_checkpoint(Path(folder) / "last.ckpt", weights_only=True)
        edited = torch.load(Path(folder) / "last-edited.ckpt", weights_only=True)["state_dict"]
    copied = copy.deepcopy(model.model)
    copied.load_state_dict({name.removeprefix("model."): value for name, value in edited.items()})
    rows["edited"] = {**evaluate(copied, train, val), "seconds": callback.seconds}
    if batch_norms(model):
        with callback.editor.applied(model, callback.factors):  # outside of a run nothing renews them
            rows["edited, statistics of batch norms as they were"] = evaluate(model, train, val)
    rows["early stopping"] = evaluate(watch.best, train, val)
    rows["averaging"] = evaluate(watch.average.module, train, val)
    for name, loss in {} if same_training else LOSSES.items():
        pl.seed_everything(seed, verbose=False)
        data, model, epochs = make()
        if name == "decay":
            model.decays = {kind: DECAYS * decay for kind, decay in model.decays.items()}
        started = time.perf_counter()
        fit(model, data, epochs, [OtherLoss(loss)])
        rows[name] = {**evaluate(model, train, val), "seconds": time.perf_counter() - started}
    return rows


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("data", choices=["digits", "mnist", "cifar10"])
    arguments.add_argument("--root", type=Path, help="folder that holds MNIST/raw, or CIFAR-10")
    arguments.add_argument("--network", choices=["vit", "resnet"], default="vit")
    arguments.add_argument("--noise", type=float, default=0.1, help="share of the training labels that are wrong")
    arguments.add_argument("--asymmetric", action="store_true", help="name each class as the next one")
    arguments.add_argument("--same-training", action="store_true", help="leave out what needs a training of its own")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--out", type=Path, help="JSON file for all numbers")
    args = arguments.parse_args()
    quiet()
    noise = {"noise": args.noise, "asymmetric": args.asymmetric}
    made = {
        "digits": lambda seed: digits(seed, **noise),
        "mnist": lambda seed: mnist(seed, args.root, **noise),
        "cifar10": lambda seed: cifar10(seed, args.root, **noise),
    }

    def make(seed: int) -> tuple[NoisyLabels, LitViT, int]:
        data, model, epochs = made[args.data](seed)
        if args.network == "resnet":
            model = LitResNet(channels=3 if args.data == "cifar10" else 1, stride=1 if args.data == "digits" else 2)
            epochs = RESNET_EPOCHS
        return data, model, epochs

    runs = []
    for seed in range(args.seeds):
        runs.append(run(partial(make, seed), seed, args.same_training))
        kind = "asymmetric" if args.asymmetric else "symmetric"
        print(
            f"\n{args.data}, {args.network}, {100 * args.noise:g} % {kind} noise, {len(runs)} of {args.seeds} seeds\n"
        )
        print(summary(runs, COLUMNS), flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            facts = {"environment": environment(), "network": args.network, "noise": noise, "runs": runs}
            args.out.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
