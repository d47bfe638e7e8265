"""The machine: which device, which numbers to compute in, and what to say when memory runs out."""

import re
from contextlib import contextmanager

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_machine(a) -> None:
    """The options --device and --dtype; a: an ArgumentParser's add_argument."""
    # fmt: off
    a("--device", choices=["auto", "cpu", "cuda"], default="auto",
      help="auto: CUDA where there is a card and the model has more than 5 M parameters")
    a("--dtype", choices=["auto", *DTYPES], default="auto",
      help="number format to compute in; trained weights stay float32. auto: bfloat16 where the "
           "device has matrix units for it and the model has more than 20 M parameters")
    # fmt: on


def resolve_device_and_dtype(
    device: str, dtype: str, parameters: int
) -> tuple[torch.device, torch.dtype]:
    """What --device and --dtype name, or where they are "auto" what suits so many parameters.

    Automatic is CUDA where there is one and the model has more than 5 million parameters: a smaller
    one is faster on a CPU (train-small took 30 s on an H200 and 12 s on a CPU). And bfloat16 where
    the device has matrix units for it and the model has more than 20 million parameters.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and parameters > 5e6 else "cpu"
    if dtype == "auto":
        if device == "cuda":
            units = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            units = torch.cpu._is_avx512_bf16_supported()
        dtype = "bfloat16" if units and parameters > 20e6 else "float32"
    return torch.device(device), DTYPES[dtype]


def to_device(x: Tensor, device) -> Tensor:
    """x on the device, copied from pinned memory, so that nothing waits for the copy."""
    if x.device.type == torch.device(device).type:
        return x
    return x.pin_memory().to(device, non_blocking=True)


# what the text of a RuntimeError says where PyTorch has no class for it
OUT_OF_MEMORY = re.compile(
    "out of memory|not enough memory|can(?:'t|not) allocate memory|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


@contextmanager
def memory_advice(advice: str):
    """Where memory runs out within, raise a MemoryError of one line that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        said = str(error).splitlines() or [type(error).__name__]
        raise MemoryError(f"out of memory; {advice} ({said[0]})") from None
