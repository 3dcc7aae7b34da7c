"""What a piece of code makes a device wait for: values read by the host, values written by it, collectives."""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result, or whose result's shape, the host has to know.
_READS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::bincount",
}
_COPIES = {"aten::_to_copy", "aten::copy_"}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}
_COLLECTIVES = ("gather", "reduce", "gather_for_metrics", "pad_across_processes")
# What the package looks at on the CPU only: values of arguments, and rows that a subclass may have changed.
_CPU_CHECKS = "trl_lambda.weights"
_ROW_CHECK = ("trl_lambda.trl_seam.scoring", "places_of")


@dataclass
class Counts:
    """
    What was seen. A place is `(module, function)` of the innermost caller outside torch.

    Args:
        reads (`Counter`): place -> transfers from device to host; each waits for the device.
        writes (`Counter`): place -> blocking transfers from host to device.
        collectives (`list`): (method, elements) of each collective that the accelerator is asked for, with one process
            or more.
        calls (`list`): (operator, elements) of each call that reaches torch.distributed: none with one process, and
            several for a collective that first agrees on sizes.
    """

    reads: Counter[tuple[str, str]] = field(default_factory=Counter)
    writes: Counter[tuple[str, str]] = field(default_factory=Counter)
    collectives: list[tuple[str, int]] = field(default_factory=list)
    calls: list[tuple[str, int]] = field(default_factory=list)

    @property
    def argument_checks(self) -> int:
        """Reads by checks of values, which the package makes on the CPU only."""
        return sum(n for place, n in self.reads.items() if place[0].startswith(_CPU_CHECKS) or place == _ROW_CHECK)


class _Operators(TorchDispatchMode):
    """Sees every operator, on a CPU as on a device; not what Python does with memory that the host has already."""

    def __init__(self, counts: Counts, device: str) -> None:
        super().__init__()
        self.counts, self.device = counts, device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if func.namespace == "c10d":
            self.counts.calls.append((name.removeprefix("c10d::").strip("_"), _elements(args)))
        elif name in _READS or (name in _INDEXING and _by_mask(args)):
            if args[0].device.type == self.device and not _inside_optimizer():
                self.counts.reads[_place()] += 1
        result = func(*args, **kwargs)
        if name in _COPIES and not kwargs.get("non_blocking") and torch.is_tensor(result):
            source = args[1] if name == "aten::copy_" else args[0]
            self._record_copy(source.device.type, result.device.type)
        return result

    def _record_copy(self, source: str, target: str) -> None:
        if source != "cpu" and target == "cpu":
            self.counts.reads[_place()] += 1
        elif source == "cpu" and target != "cpu":
            self.counts.writes[_place()] += 1


class _Calls(TorchFunctionMode):
    """Sees, on CPU tensors, the calls that would move data were they on a device; there `_Operators` sees the copy."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy):
            if args[0].device.type == "cpu":
                self.counts.reads[_place()] += 1
        elif func is torch.Tensor.to:
            if "cpu" in (*args[1:2], kwargs.get("device")) and args[0].device.type == "cpu":
                self.counts.reads[_place()] += 1
        elif func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            if not torch.is_tensor(args[0] if args else kwargs["data"]) and _on_host_or_meta(kwargs["device"]):
                self.counts.writes[_place()] += 1
        return func(*args, **kwargs)


@contextlib.contextmanager
def counting(device: str = "cpu") -> Iterator[Counts]:
    """
    Count while the block runs.

    Args:
        device (`str`): where the work is. For `"cpu"`, what would be a transfer if the tensors were on a device.
    """
    counts = Counts()
    with contextlib.ExitStack() as stack:
        for method in _COLLECTIVES:
            stack.enter_context(_noting(method, counts))
        stack.enter_context(_Operators(counts, device))
        stack.enter_context(_Calls(counts))
        yield counts


@contextlib.contextmanager
def _noting(name: str, counts: Counts) -> Iterator[None]:
    """Note calls of one of the accelerator's collectives."""
    method = getattr(Accelerator, name)

    def noting(self: Accelerator, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        counts.collectives.append((name, tensor.numel() if torch.is_tensor(tensor) else 0))
        return method(self, tensor, *args, **kwargs)

    setattr(Accelerator, name, noting)
    try:
        yield
    finally:
        setattr(Accelerator, name, method)


def _by_mask(args: tuple[Any, ...]) -> bool:
    """Whether an indexing operator is given a mask: how many elements that selects only the device knows."""
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _on_host_or_meta(device: torch.device | str | int) -> bool:
    # On any other device `_Operators` sees the copy itself.
    return torch.device(device).type in ("cpu", "meta")


def _inside_optimizer() -> bool:
    """Whether `torch.optim` is calling: the count of steps that it reads is on the host everywhere."""
    frame = sys._getframe(2)
    while frame is not None and (module := frame.f_globals.get("__name__", "")).startswith(("torch", __name__)):
        if module.startswith("torch.optim"):
            return True
        frame = frame.f_back
    return False


def _elements(args: tuple[Any, ...]) -> int:
    """Elements of the first tensor among arguments that may be lists of (lists of) tensors."""
    for argument in args:
        while isinstance(argument, list | tuple) and argument:
            argument = argument[0]
        if torch.is_tensor(argument):
            return argument.numel()
    return 0


def _place() -> tuple[str, str]:
    """Module and function of the innermost frame outside torch and here."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module != __name__ and module.split(".")[0] not in ("torch", "contextlib"):
            return module, frame.f_code.co_name
        frame = frame.f_back
    return "", ""
