"""LightningCLI with this package's example configurations at hand: ``lightning-curvature fit --config digits.yaml``."""

import sys
import warnings
from importlib.resources import files
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI

from lightning_curvature.cli.choices import LIGHTNING


class CurvatureCLI(LightningCLI):
    """LightningCLI with the subcommands that collect; the configuration names the model and the data."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands and the arguments that they do not take from the command line."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in LIGHTNING}


class _Instances(CurvatureCLI):
    """Makes what a configuration of ``fit`` names, but does not fit."""

    def instantiate_classes(self) -> None:
        """Make model, data and trainer."""
        super().instantiate_classes()
        self.subcommand = None


def run(args: list[str]) -> None:
    """Run a subcommand of LightningCLI.

    Args:
        args: Command line. After ``--config``, the name of an example of this package may stand for its path.
    """
    _make(CurvatureCLI, args)


def instances(config: str) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """Return the model and the data that a configuration of ``fit`` names, as :func:`run` would make them.

    LightningCLI makes the trainer, too. Its accelerator, devices and strategy are those of this machine, since the
    configuration may come from another machine.

    Args:
        config: Path of the YAML file, also one that LightningCLI has saved, or the name of an example.
    """
    here = [f"--trainer.{name}=auto" for name in ("accelerator", "devices", "strategy")]
    cli = _make(_Instances, ["fit", "--config", config, *here])
    return cli.model, cli.datamodule


def _make(kind: type[CurvatureCLI], args: list[str]) -> CurvatureCLI:
    # LightningCLI warns when its command line is an argument, which it is here since names of examples are replaced.
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended to run from within Python")
    return kind(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"enable_progress_bar": sys.stdout.isatty()},
        args=[_example(before, argument) for before, argument in zip(["", *args], args, strict=False)],
    )


def _example(before: str, argument: str) -> str:
    """Return the path of an example configuration for its name, and any other argument as it is."""
    option, equals, value = argument.partition("=")
    if equals and option in ("--config", "-c"):
        return f"{option}={_example(option, value)}"
    packaged = files("lightning_curvature.cli.configs") / argument
    if before in ("--config", "-c") and not Path(argument).exists() and "/" not in argument and packaged.is_file():
        return str(packaged)
    return argument
