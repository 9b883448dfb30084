"""Environment variables for libraries that torch uses.

The libraries read them once, when torch is loaded. So they must be set before the first `import torch`: the command
line does this, and other programs call `prepare_environment` first.
"""

import os
import sys
import warnings
from typing import Final

SETTINGS: Final = {
    # Next to other busy programs, spinning threads occupy the cores they wait for (measured on two shared cores: a step
    # ten times slower).
    "OMP_WAIT_POLICY": "passive",
    # Intel's matrix library otherwise chooses kernels by the number of threads, and results differ in their last bits.
    "MKL_CBWR": "AUTO,STRICT",
    # cuBLAS needs this for deterministic results.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # If one of several processes dies, torch would print 60 lines of stack trace for each lost connection.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def prepare_environment() -> None:
    """Set the variables that are not set yet; issues a `UserWarning` if torch was already imported.

    Example:
        >>> from dsu.environment import prepare_environment
        >>> prepare_environment()  # before the first import of torch
    """
    lacking = {name: value for name, value in SETTINGS.items() if name not in os.environ}
    os.environ |= lacking
    if lacking and "torch" in sys.modules:
        listed = ", ".join(f"{name}={value}" for name, value in lacking.items())
        warnings.warn(
            f"torch was imported before dsu could set its environment variables ({listed}): call prepare_environment() "
            f"before the first import of torch, or results may depend on the number of threads.",
            stacklevel=2,
        )
