"""Exercises of page 11, checkpoints: fill in the bodies, then `make exercise N=11`."""


def is_sound(data):
    """Whether data, the bytes of a whole file, is safetensors in which nothing is missing or left
    over.

    True if the table fits into the file, every tensor in it (all but "__metadata__") has one of the
    dtypes F32, BF16 and F64 and as many bytes as dtype and shape ask for, and the tensors cover all
    of the rest of the file without gap or overlap. Any other dtype: False."""
    raise NotImplementedError


def from_bfloat16(raw):
    """(n,) float32: the numbers that 2n bytes hold as bfloat16, little-endian; torch.bfloat16 is
    not to be used."""
    raise NotImplementedError
