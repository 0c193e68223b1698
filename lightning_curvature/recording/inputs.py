"""The inputs of layers alone, for analyses that need no gradients."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_curvature.recording.calls import OVERWRITTEN, version_of


@contextmanager
def layer_inputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Record what some layers read while the block runs: by name, the inputs of its calls, detached.

    Raises:
        RuntimeError: If an input was changed in place after the layer read it.
    """
    recorded: dict[str, list[Tensor]] = {name: [] for name in modules}
    versions: dict[str, list[int]] = {name: [] for name in modules}

    def hook(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            recorded[name].append(inputs.detach())
            versions[name].append(version_of(inputs))

        return keep

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(hook(name), prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield recorded
    for name, inputs in recorded.items():
        if [version_of(tensor) for tensor in inputs] != versions[name]:
            raise RuntimeError(OVERWRITTEN.format(name))
