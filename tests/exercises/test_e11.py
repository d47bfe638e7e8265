import json
import struct

import pytest
import torch
from safetensors.torch import save


def file_of(table, body):
    head = json.dumps(table).encode()
    return struct.pack("<Q", len(head)) + head + body


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_files_of_the_library_are_sound(exercise):
    tensors = {"b": torch.ones(2, 3), "a": torch.ones(5).bfloat16(), "c": torch.ones(()).double()}
    empty = save(tensors | {"none": torch.ones(0, 4)}, {"format": "pt"})
    assert exercise.is_sound(empty), "is __metadata__ skipped, may a shape be () or hold a 0?"
    assert exercise.is_sound(save({})), "a file without tensors is sound: the table is {}"


TWO = entry("F32", [2], 0, 8)
UNSOUND = {
    "no length": b"\x02\x00",
    "a table longer than the file": struct.pack("<Q", 100) + b"{}",
    "a byte is missing": file_of({"a": TWO}, b"\0" * 7),
    "one is left over": file_of({"a": TWO}, b"\0" * 9),
    "a gap": file_of({"a": TWO, "b": entry("F32", [1], 9, 13)}, b"\0" * 13),
    "an overlap": file_of({"a": TWO, "b": entry("F32", [2], 4, 12)}, b"\0" * 12),
    "a shape that asks for more": file_of({"a": entry("F32", [3], 0, 8)}, b"\0" * 8),
    "a dtype that asks for less": file_of({"a": entry("BF16", [2], 0, 8)}, b"\0" * 8),
    "an unknown dtype": file_of({"a": entry("F8", [8], 0, 8)}, b"\0" * 8),
}


@pytest.mark.parametrize("what", UNSOUND)
def test_unsound_files_are_told(exercise, what):
    assert exercise.is_sound(UNSOUND[what]) is False, f"taken for sound: {what}"


def test_order_in_the_table_is_free(exercise):
    table = {"a": entry("F32", [1], 4, 8), "b": entry("F32", [1], 0, 4)}
    assert exercise.is_sound(file_of(table, b"\0" * 8)), "sort by offset before you compare"


def test_bfloat16(exercise):
    x = torch.tensor([0.0, 1.0, -2.5, 3.14159, 1e-30, -1e30, float("inf")]).bfloat16()
    found = exercise.from_bfloat16(x.view(torch.uint8).numpy().tobytes())
    assert found.dtype == torch.float32, "the result is float32"
    assert torch.equal(found, x.float()), "bfloat16 is the *upper* half: shift by 16, little-endian"
