"""What a file may cost before it is refused, and what is said of one that was edited or damaged.

tests/faults draws such files at random; here stands one of each kind that once cost everything, or
ended in a traceback.
"""

# ruff: noqa: F401, F811  (world is a fixture)

import gzip
import json
import resource
import shutil
import time

import pytest

from minibnf.check import main as check
from minibnf.data import read_examples
from minibnf.evaluate import main as evaluate
from minibnf.files import config, rows
from minibnf.files.tokenizer import load_tokenizer
from tests.faults.damage import bomb, sparse, with_fields, with_tokens
from tests.test_tokenizer import byte_level
from tests.test_train import base, logged, resumed, trained, weights, world, write

ROW = {"prompt": "a", "chosen": " b", "rejected": " c"}


@pytest.fixture
def model(world, tmp_path):
    return shutil.copytree(world / "model", tmp_path / "model")


@pytest.fixture
def fast(model):
    """The same folder with a tokenizer.json."""
    (model / "tokenizer.model").unlink()
    byte_level(model)
    return model


@pytest.fixture(autouse=True)
def cheap():
    """Everything here takes little time; and less than a gigabyte, of which the peak tells."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - began < 20
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 10**6, "kB more than before"


def refused(status, capsys, *parts):
    """One line, which holds the parts."""
    err = capsys.readouterr().err
    assert status in (1, 2) and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(part in err for part in parts), err


# ----------------------------------------------------------------------------------------- sizes


def test_layers_that_no_file_could_hold_are_refused_before_any_is_made(model, capsys):
    for number in (10**6, 2**31, 10**400):
        with_fields(model / "config.json", num_hidden_layers=number)
        refused(check([str(model)]), capsys, "'num_hidden_layers' must be", "at most 1000")


def test_control_tokens_that_cannot_be_told_from_text_are_refused(fast, capsys):
    """To be told from text, each costs the square of its length."""
    with_tokens(fast / "tokenizer.json", ["<|" + "a" * 60_000 + "|>"])
    refused(check([str(fast)]), capsys, "too many or too long", "60004 characters")


def test_as_many_control_tokens_as_published_models_have_are_read(fast):
    with_tokens(fast / "tokenizer.json", [f"<unused_token_number_{i}>" for i in range(6000)])
    assert load_tokenizer(fast).control["<unused_token_number_5999>"]


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("a.jsonl.gz", bomb(b"a"), "line 1: a line has more than 16,777,216 bytes"),
        ("a.jsonl.gz", bomb(b"\n"), "line 1048577: blank lines have 1,048,577 bytes"),
        ("a.jsonl.gz", bomb(b"0\n"), "1000+ bad rows"),
        ("a.json.gz", bomb(b"{},", b"["), "may have 268,435,456 bytes; write one row per line"),
    ],
)
def test_a_megabyte_that_unpacks_to_a_gigabyte_is_refused(
    world, tmp_path, capsys, name, data, says
):
    (tmp_path / name).write_bytes(data)
    status = trained(world, tmp_path / "run", f"--data {tmp_path / name}")
    err = capsys.readouterr().err
    assert status == 1 and says in err and str(tmp_path / name) in err


def test_a_line_has_a_bound_and_an_array_in_one_line_another(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LINE", 100)
    monkeypatch.setattr(rows, "ARRAY", 1000)
    fits, long = ({"prompt": "a" * n, "chosen": "b", "rejected": "c"} for n in (10, 100))
    file = write(tmp_path / "a.jsonl", [fits, long])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: a line has more than 100 bytes"):
        rows.read_rows(file)
    write(file, [long, fits])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: a line has more than 100 bytes"):
        rows.read_rows(file)
    file.write_text(json.dumps([fits] * 4))
    assert len(rows.read_rows(file)) == 4
    file.write_text(json.dumps([fits] * 40))
    with pytest.raises(ValueError, match="an array, may have 1,000 bytes"):
        rows.read_rows(file)


def test_reading_stops_after_a_thousand_bad_rows(tmp_path):
    file = write(tmp_path / "a.jsonl", [ROW, *range(3000)])
    with pytest.raises(
        ValueError,
        match=r"1000\+ bad rows\n(.*\n){10}  \.\.\. and 990",
    ):
        rows.read_rows(file)


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer_config.json", "tokenizer.json", "tokenizer.model",
     "chat_template.jinja", "generation_config.json", "model.safetensors.index.json"],
)  # fmt: skip
def test_a_file_of_gigabytes_that_should_be_small_is_not_read(model, capsys, name):
    sparse(model / name)
    said = f"{name} has 20,000,000,000 bytes, where "
    refused(check([str(model)]), capsys, said, "are the most that is read")


# ---------------------------------------------------------------------------------------- fields


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"model_type": {"a": 1}}, "'model_type' = {'a': 1} is not supported"),
        ({"rope_scaling": "linear"}, "'rope_scaling' must be an object, not 'linear'"),
        ({"rope_scaling": {"rope_type": ["default"]}}, "rotary positions"),
        ({"rope_parameters": {"full_attention": 3}}, "rotary positions"),
        ({"rope_parameters": {"rope_theta": "x"}}, "'rope_theta' must be a number above 0"),
        ({"hidden_size": 10**30}, "'hidden_size' must be a whole number above 0, at most 1048576"),
        ({"max_position_embeddings": 2**32}, "must be a whole number above 0, at most 2147483648"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' must be a number above 0"),
        ({"rope_theta": float("inf")}, "'rope_theta' must be a number above 0"),
        ({"rope_theta": 10**400}, "'rope_theta' must be a number above 0"),
        ({"tie_word_embeddings": "false"}, "'tie_word_embeddings' must be true or false"),
        ({"model_type": "qwen3", "layer_types": [["full_attention"]] * 2}, "must name 2 times"),
        ({"model_type": "qwen3", "layer_types": 3}, "'layer_types' must be a list, not 3"),
        (
            {"model_type": "smollm3", "no_rope_layers": [1]},
            "'no_rope_layers' must have 2 items, not 1",
        ),
        ({"num_attention_heads": 64, "head_dim": None}, "and head_dim even"),
    ],
)
def test_a_field_of_another_kind_is_named(model, capsys, fields, says):
    with_fields(model / "config.json", **fields)
    refused(check([str(model)]), capsys, "config.json: ", says)


@pytest.mark.parametrize("name", [None, ["model.safetensors"], 3])
def test_an_index_names_files(model, capsys, name):
    index = {"weight_map": {"model.norm.weight": name, "a": "model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(check([str(model)]), capsys, "index.json: 'weight_map' must name the file")


def test_an_empty_tokenizer_model_is_named(model, capfd):
    (model / "tokenizer.model").write_bytes(b"")
    refused(check([str(model)]), capfd, "tokenizer.model cannot be read as a tokenizer")


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"chat_template": 3}, "'chat_template' must be text, not 3"),
        ({"chat_template": [{"name": "default", "template": 3}]}, "'chat_template' must be text"),
        ({"added_tokens_decoder": []}, "'added_tokens_decoder' must be an object, not []"),
        ({"added_tokens_decoder": {"1": "a"}}, "added_tokens_decoder 1 needs 'content', a text"),
        ({"add_bos_token": "false"}, "'add_bos_token' must be true or false, not 'false'"),
    ],
)
def test_a_field_of_a_tokenizer_that_is_of_another_kind_is_named(model, capsys, fields, says):
    with_fields(model / "tokenizer_config.json", **fields)
    refused(check([str(model)]), capsys, "tokenizer_config.json", says)


@pytest.mark.parametrize("damage", [{"model": {"type": "WordPiece", "vocab": {"a": 0}}}])
def test_a_tokenizer_that_its_library_cannot_use_is_named(fast, capsys, damage):
    with_fields(fast / "tokenizer.json", **damage)
    refused(check([str(fast)]), capsys, "tokenizer.json")


def test_a_key_that_stands_twice_in_a_row_is_named(world, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}'
    )
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1.*: key 'chosen' stands twice"):
        rows.read_rows(tmp_path / "a.jsonl")
    inner = json.dumps(ROW)[:-1] + ', "tools": "[{\\"a\\": 1, \\"a\\": 2}]"}'
    (tmp_path / "a.jsonl").write_text(inner)
    with pytest.raises(ValueError, match=r"line 1: field 'tools'.*: key 'a' stands twice"):
        read_examples(tmp_path / "a.jsonl", load_tokenizer(world / "model"), 99)


# ------------------------------------------------------------------------------------- a run's own


def test_an_edited_config_json_is_not_resumed_and_can_begin_another_run(world, tmp_path, capsys):
    out = tmp_path / "run"
    assert trained(world, out, "--max-steps 1") == 0
    found = json.loads((out / "config.json").read_text())
    found["arguments"]["seed"] = 1
    (out / "config.json").write_text(json.dumps(found))
    capsys.readouterr()
    refused(resumed(out), capsys, f"{out}/config.json: edited, damaged or of another version")
    assert trained(world, tmp_path / "new", f"--config {out}/config.json") == 0
    assert json.loads((tmp_path / "new" / "config.json").read_text())["arguments"]["seed"] == 1


@pytest.mark.parametrize("value", [["a"], {"a": 1}, "x", True])
def test_an_argument_of_another_kind_is_refused_as_on_the_command_line(
    world, tmp_path, capsys, value
):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"arguments": {"max_steps": value}, "facts": {}}))
    with pytest.raises(SystemExit) as stop:
        trained(world, tmp_path / "run", f"--config {file}")
    refused(stop.value.code, capsys, "argument --max-steps: ")


@pytest.mark.parametrize("found", [{"arguments": 3, "facts": {}}, {"arguments": {}}, []])
def test_what_is_no_config_json_of_a_run_is_named(world, tmp_path, capsys, found):
    (tmp_path / "config.json").write_text(json.dumps(found))
    status = trained(world, tmp_path / "run", f"--config {tmp_path / 'config.json'}")
    refused(status, capsys, "not the config.json that a run of this version wrote")
