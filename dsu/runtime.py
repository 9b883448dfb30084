"""Which device, at which precision, and why: said before anything starts."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from dsu.errors import UsageError

__all__ = ["Precision", "Runtime", "choose_runtime"]

Precision = Literal["auto", "fp32", "bf16"]


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
