"""Choose device and precision, with reasons for the user; threads, memory and names of the machine."""

import platform
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import psutil

from dsu.choices import FeatureDtype, Precision
from dsu.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

Module = TypeVar("Module", bound="nn.Module")


@dataclass(frozen=True)
class Runtime:
    """A device and a precision.

    Attributes:
        device: the device of all tensors.
        precision: `fp32`, or `bf16` for autocast.
        why: the reasons, as a clause for the user.
        deterministic: whether training uses torch's deterministic algorithms.
    """

    device: "torch.device"
    precision: Literal["fp32", "bf16"]
    why: str
    deterministic: bool = False

    def autocast(self) -> AbstractContextManager[object]:
        """A context for every forward pass, of the encoders and of the head."""
        import torch

        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    @contextmanager
    def training(self) -> Iterator[None]:
        """A context for every training step: torch's deterministic algorithms, if requested."""
        if not self.deterministic:
            yield
            return
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        # Filling memory costs time, and nothing here reads uninitialised memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:
            # The memory-efficient attention has no deterministic backward pass.
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
                yield
        finally:
            torch.use_deterministic_algorithms(before)

    def place(self, network: Module) -> Module:
        """Move a network to the device, and prepare it for this precision; returns it.

        Autocast would round a frozen layer's weights to bf16 at every use. Here, the weights of frozen linear and
        convolution layers are stored in bf16, which gives the same results with half of the memory and without
        rounding again.
        """
        import torch
        from torch import nn

        network.to(self.device)
        if self.device.type == "cuda":  # images and features are channels-last: others would be converted at every use
            network.to(memory_format=torch.channels_last)
        if self.precision == "bf16":
            for layer in network.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d) and not layer.weight.requires_grad:
                    layer.to(torch.bfloat16)
        return network

    def describe(self) -> str:
        """The device, its name, precision and reasons: `cuda (NVIDIA ...) at bf16: why`."""
        import torch

        name = f" ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else ""
        return f"{self.device}{name} at {self.precision}: {self.why}"


def choose_runtime(
    device: str = "auto", precision: Precision = "auto", because: str = "as requested", *, deterministic: bool = False
) -> Runtime:
    """The requested device and precision; `auto` chooses the best. `because` explains a requested precision.

    Raises `UsageError` if this machine does not have the device.
    """
    import torch

    kind = device
    reason = "as requested"
    if device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        reason = "a CUDA device is available" if kind == "cuda" else "no CUDA device is available"
    try:
        chosen = torch.device(kind)
        if chosen.type not in ("cpu", "cuda"):
            raise RuntimeError(chosen.type)
        chosen = torch.empty(0, device=chosen).device  # with its number: threads start with GPU 0
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        count = torch.cuda.device_count()
        there = "only cpu" if not count else f"cpu and {', '.join(f'cuda:{number}' for number in range(count))}"
        reason = f" ({str(error).partition(chr(10))[0]})" if count else ""
        raise UsageError(f"The device {device!r} can't be used{reason}: choose an available one ({there}).") from error
    if precision != "auto":
        picked, because = precision, f"precision {because}"
        if picked == "bf16" and chosen.type == "cuda" and not _computes_bf16(chosen):
            because += ", but this GPU is slow at bf16"
    elif chosen.type == "cuda" and _computes_bf16(chosen):
        picked, because = "bf16", "the GPU computes bf16"
    else:
        picked, because = "fp32", "exact, and the default here"
    # With TF32, fp32 results would differ between GPUs; with cuDNN's benchmark mode, kernels would depend on timings.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    return Runtime(chosen, picked, f"{reason}; {because}", deterministic)


def _computes_bf16(device: "torch.device") -> bool:
    """Whether this GPU computes bf16 natively (torch checks the current one)."""
    import torch

    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


@contextmanager
def computing_threads(count: int | None) -> Iterator[None]:
    """Use `count` CPU threads inside a `with`; None leaves the number unchanged."""
    import torch

    before = torch.get_num_threads()
    if count in (None, before):
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def torch_type(feature_dtype: FeatureDtype) -> "torch.dtype":
    """The torch type of `float16` or `float32`."""
    import torch

    return {"float16": torch.float16, "float32": torch.float32}[feature_dtype]


def machine_name(runtime: Runtime) -> str:
    """The GPU's name, or the processor's name and the number of CPU threads."""
    import torch

    if runtime.device.type == "cuda":
        return torch.cuda.get_device_name(runtime.device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"


@cache
def processor_name() -> str:
    """The processor's model, or its architecture if the model is unknown."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.machine()


class PeakMemory:
    """Peak memory since its creation: of the GPU, or on a CPU of this process.

    On Linux, the process's peak is reset; on other systems it covers the process's whole lifetime.
    """

    def __init__(self, device: "torch.device") -> None:
        import torch

        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """Peak bytes: those reserved by torch on the GPU (a replayed graph allocates none), or the resident set."""
        if self._device.type == "cuda":
            import torch

            return torch.cuda.max_memory_reserved(self._device)
        with suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
        with suppress(ModuleNotFoundError):
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        memory = psutil.Process().memory_info()  # on Windows
        return int(getattr(memory, "peak_wset", memory.rss))
