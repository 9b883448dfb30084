"""Which device, at which precision, and why: said before anything starts."""

import platform
import resource
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import nn

from dsu.errors import UsageError

__all__ = ["PeakMemory", "Precision", "Runtime", "choose_runtime", "machine_name"]

Precision = Literal["auto", "fp32", "bf16"]


Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Runtime:
    """A device and a precision.

    Attributes:
        device: where tensors live.
        precision: `fp32`, or `bf16` for autocast.
        why: one clause for the user.
    """

    device: torch.device
    precision: Literal["fp32", "bf16"]
    why: str

    def autocast(self) -> AbstractContextManager[object]:
        """Around every forward pass, of the prefix as of the suffix."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def place(self, network: Module) -> Module:
        """Move a network to the device, ready for this precision; returns it.

        Autocast rounds a frozen layer's weights to bf16 anew at every use. Kept rounded, linear and convolution
        layers that do not train give the same numbers, from half of the memory and without that pass over it.
        """
        network.to(self.device)
        if self.precision == "bf16":
            for layer in network.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d) and not layer.weight.requires_grad:
                    layer.to(torch.bfloat16)
        return network

    def describe(self) -> str:
        """`cuda (NVIDIA ...) at bf16: why`."""
        name = f" ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else ""
        return f"{self.device}{name} at {self.precision}: {self.why}"


def choose_runtime(device: str = "auto", precision: Precision = "auto", because: str = "asked for") -> Runtime:
    """The named device and precision, or the best there is; `because` says where a named precision comes from.

    Raises `UsageError` for a device that this machine lacks.
    """
    kind = device
    reason = "asked for"
    if device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        reason = "a CUDA device is there" if kind == "cuda" else "no CUDA device is there"
    try:
        chosen = torch.device(kind)
        if chosen.type not in ("cpu", "cuda"):
            raise RuntimeError(chosen.type)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"The device {device!r} can't be used here: choose cpu, cuda or cuda:N.") from error
    if precision != "auto":
        picked, because = precision, f"precision {because}"
    elif chosen.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        picked, because = "bf16", "the card computes bf16"
    else:
        picked, because = "fp32", "exact and the default here"
    # Rounding to TF32 behind fp32's back would make two cards disagree.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return Runtime(chosen, picked, f"{reason}; {because}")


def machine_name(runtime: Runtime) -> str:
    """The card, or the processor with the number of threads that compute."""
    if runtime.device.type == "cuda":
        return torch.cuda.get_device_name(runtime.device)
    model = ""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return f"{model or platform.machine()}, {torch.get_num_threads()} threads"


class PeakMemory:
    """The most memory held since this was made: of the card, or of this process where there is none.

    On Linux the process's high-water mark is set back; elsewhere it is that of the process's whole life.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """Of the card what tensors took, of the process its resident set."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        with suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
