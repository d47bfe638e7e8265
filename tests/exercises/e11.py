"""Exercises of page 11, checkpoints: the solutions."""

import json
import math
import struct

import torch

BYTES = {"F32": 4, "BF16": 2, "F64": 8}


def is_sound(data):
    """Whether data, the bytes of a whole file, is safetensors in which nothing is missing or left
    over.

    True if the table fits into the file, every tensor in it (all but "__metadata__") has one of the
    dtypes F32, BF16 and F64 and as many bytes as dtype and shape ask for, and the tensors cover all
    of the rest of the file without gap or overlap. Any other dtype: False."""
    if len(data) < 8:
        return False
    (n,) = struct.unpack("<Q", data[:8])
    if 8 + n > len(data):
        return False
    table = json.loads(data[8 : 8 + n])
    table.pop("__metadata__", None)
    at = 0
    for entry in sorted(table.values(), key=lambda entry: entry["data_offsets"]):
        begin, end = entry["data_offsets"]
        size = BYTES.get(entry["dtype"], math.nan) * math.prod(entry["shape"])
        if begin != at or end - begin != size:
            return False
        at = end
    return 8 + n + at == len(data)


def from_bfloat16(raw):
    """(n,) float32: the numbers that 2n bytes hold as bfloat16, little-endian; torch.bfloat16 is
    not to be used."""
    halves = torch.frombuffer(bytearray(raw), dtype=torch.int16)
    return (halves.to(torch.int32) << 16).view(torch.float32)
