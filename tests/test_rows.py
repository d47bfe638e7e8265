"""Files of rows as people have them, and what a row says: formats, refusals, columns."""

import gzip
import json
import os
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minibnf import evaluate, generate, train
from minibnf.data import read_examples
from minibnf.files.config import read_config
from minibnf.files.rows import (
    Notes,
    Place,
    each_row,
    parse_prompt,
    parse_row,
    present,
    read_rows,
    scan_rows,
)
from minibnf.files.tokenizer import load_tokenizer
from tests.strategies import FEW

TINY = Path(__file__).parents[1] / "weights" / "tiny"
GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}


def said(role, content, **more):
    return [{"role": role, "content": content, **more}]


def part(text):
    return {"type": "text", "text": text}


ASKED = said("user", "What is 3 + 4?")
RIGHT, WRONG = said("assistant", "It is 7."), said("assistant", "It is 9.")
PAIR = {"prompt": ASKED, "chosen": RIGHT, "rejected": WRONG}


def records(path):
    return each_row(scan_rows(path), parse_row)


def file_of(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def one(row):
    """The Record of a row, less its nulls."""
    return parse_row(present(row, "here"), "here")


# -------------------------------------------------------------------------------------- formats

CELLS = st.recursive(
    st.booleans() | st.integers(-9, 9) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(st.text(), CELLS, max_size=4), min_size=1, max_size=4)


@FEW
@given(rows=ROWS, ascii_only=st.booleans(), blank=st.sampled_from(["", "\n", "\r\n \n", "\ufeff"]))
def test_every_form_of_json_holds_the_same_rows(tmp_path_factory, rows, ascii_only, blank):
    folder = tmp_path_factory.mktemp("forms")
    dumps = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    pretty = [json.dumps(row, indent=1, ensure_ascii=ascii_only) for row in rows]
    # an empty object takes one line when pretty, and then the first line does not tell the form
    pretty = [text if len(row) else "{\n}" for text, row in zip(pretty, rows, strict=True)]
    texts = {
        "lines.jsonl": "\n".join(dumps),
        "crlf.jsonl": "\r\n".join(dumps) + "\r\n",
        "array.json": "[" + ",".join(dumps) + "]",
        "pretty-array.json": json.dumps(rows, indent=2, ensure_ascii=ascii_only),
        "pretty.jsonl": "\n".join(pretty),
    }
    for name, text in texts.items():
        data = (blank + text).encode("utf-8", "surrogatepass")
        (folder / name).write_bytes(data)
        (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        for file in (folder / name, folder / f"{name}.gz"):
            assert [row for _, row in read_rows(file)] == rows, file


def test_places_are_lines_or_where_there_are_none_rows(tmp_path):
    lines = file_of(tmp_path / "lines.jsonl", ["", '{"a": 1}', "", '{"a": 2}'])
    pretty = file_of(tmp_path / "pretty.jsonl", ["", '{\n"a": 1\n}', "", '{\n"a": 2\n}'])
    array = file_of(tmp_path / "array.json", ['[{"a": 1},', '{"a": 2}]'])
    assert [str(place) for place, _ in read_rows(lines)] == [f"{lines}, line 2", f"{lines}, line 4"]
    assert [place.number for place, _ in read_rows(pretty)] == [2, 6]
    assert [str(place) for place, _ in read_rows(array)] == [f"{array}, row 1", f"{array}, row 2"]


def parquet(path, rows):
    arrow = pytest.importorskip("pyarrow", reason="needs minibnf[data]")
    from pyarrow.parquet import write_table

    write_table(arrow.Table.from_pylist(rows), path)
    return path


def test_parquet_is_read_and_the_nulls_of_arrow_are_absent(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}
    completion = said("assistant", "No.", tool_calls=[call])
    unpaired = {"prompt": ASKED, "completion": completion, "label": False}
    file = parquet(
        tmp_path / "rows.parquet", [{**PAIR, "completion": None, "label": None}, unpaired]
    )
    paired, unpaired = records(file)
    assert paired.prompt == unpaired.prompt == ASKED and paired.preferred == (True, False)
    assert dict(paired.completions) == {k: PAIR[k] for k in ("chosen", "rejected")}
    assert unpaired.completions == [("completion", completion)]
    assert unpaired.preferred == (False,) and paired.unused == unpaired.unused == ()
    assert [place.unit for place, _ in read_rows(file)] == ["row", "row"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_read_once(tmp_path, capsys):
    """evaluate with --base makes tokens of the rows twice."""

    def fill():
        pipe.write_text(json.dumps(PAIR) + "\n")

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=fill, daemon=True)
    writer.start()
    command = ["--model", TINY, "--base", TINY, "--data", pipe, "--device", "cpu"]
    assert evaluate.main(list(map(str, command))) == 0
    writer.join(10)
    assert "1 row of preference" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("nothing.jsonl", None, "cannot be read: No such file or directory"),
        ("empty.jsonl", "\n \n", "no rows"),
        ("none.json", "[]", "no rows"),
        ("rows.csv", "prompt,chosen,rejected\na,b,c\n", "2 bad rows.*\n.*not valid JSON"),
        ("rows.jsonl.gz", b"no archive", "cannot be read: Not a gzipped file"),
        ("rows.jsonl.gz", gzip.compress(b"{}\n" * 9, mtime=0)[:-12], "cannot be read: Compressed"),
        ("rows.jsonl", '{"a": 1}\n {"a": 1\n', "line 2, column 9: not valid JSON: Expecting ','"),
        ("rows.json", '[{"a": 1},\n {"a" 2}]', "line 2, column 7: not valid JSON"),
        ("rows.json", '{\n "a": 1,\n "b" 2\n}', "line 3, column 6: not valid JSON"),
        ("rows.json", "[1]", "row 1: a row must be a JSON object, not int"),
        ("rows.json", "[" * 100000, "JSON that cannot be read"),
        ("rows.json", "3\n", "line 1: a row must be a JSON object, not int"),
        ("rows.jsonl", b'{"prompt": "\xff"}\n', "line 1: JSON that cannot be read: 'utf-8'"),
        ("a.parquet", b"PAR1 and no more", "cannot be read as Parquet"),
    ],
)
def test_what_is_no_file_of_rows_is_told(tmp_path, name, content, says):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="needs minibnf[data]")
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}.*{says}") as error:
        read_rows(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))


def test_a_missing_pyarrow_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"a\.parquet: .* pip install 'minibnf\[data\]'"):
        read_rows(file_of(tmp_path / "a.parquet", [GOOD]))


ROWS_OF_BOTH = [{**PAIR, "tools": [{"a": None}], "system": "s"}, GOOD]


@st.composite
def damaged(draw):
    """A file of rows, whole but for a few bytes."""
    forms = [json.dumps(ROWS_OF_BOTH, indent=1), "\n".join(map(json.dumps, ROWS_OF_BOTH))]
    whole, at = draw(st.sampled_from(forms)).encode(), draw(st.integers(0, 300))
    return whole[:at] + draw(st.binary(max_size=3)) + whole[at + draw(st.integers(0, 5)) :]


@given(
    data=st.binary(max_size=60) | damaged(),
    name=st.sampled_from(["a.jsonl", "a.json.gz", "a.parquet"]),
)
def test_no_bytes_give_anything_but_rows_or_an_error_for_people(tmp_path_factory, data, name):
    file = tmp_path_factory.mktemp("bytes") / name
    file.write_bytes(data)
    try:
        records(file)
    except (ValueError, ImportError) as error:
        assert str(error).startswith(str(file))


# ----------------------------------------------------------------------------------- many errors


def test_the_first_ten_bad_rows_are_listed_in_one_error(tmp_path):
    """Broken lines, broken rows and rows that the tokenizer cannot take, among good ones."""
    bad = [{**GOOD, "chosen": None}, '{"prompt": ', {**PAIR, "prompt": [{"role": "user"}]}]
    rows = [row for k in range(4) for row in (GOOD, *bad)]
    file = file_of(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match="12 bad rows") as error:
        read_examples(file, load_tokenizer(TINY), 256)
    first, *lines, last = str(error.value).splitlines()
    assert first == f"{file}: 12 bad rows" and last == "  ... and 2 more"
    numbers = [k for k in range(1, 17) if k % 4 != 1][:10]
    assert [line.split(":")[0].split(",")[0] for line in lines] == [f"  line {k}" for k in numbers]
    assert "field 'chosen' is missing" in lines[0] and "not valid JSON" in lines[1]
    with pytest.raises(ValueError, match="line 2: field 'chosen' is missing") as error:
        read_examples(file_of(file, rows[:2]), load_tokenizer(TINY), 256)
    assert "\n" not in str(error.value)  # one bad row is one line


# -------------------------------------------------------------------------------- what a row says


CALLED = {"chosen": said("user", "a"), "rejected": said("user", "b")}
UNLABELLED = {"prompt": "a", "completion": "b"}
IMAGE = said("user", [part("a"), {"type": "image"}])
RUDE = said("system", "Be rude.") + ASKED


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"prompt": "a", }', "line 2, column 17: not valid JSON"),
        ('{"prompt": ' + "9" * 5000 + "}", "line 2: JSON that cannot be read"),
        ("[" * 100000, "line 2: JSON that cannot be read"),
        ('{"prompt": ' + "[" * 150 + "]" * 150 + "}", "line 2: JSON nested more than 100 deep"),
        ("[1]", "line 2: a row must be a JSON object, not list"),
        (GOOD | {"rejected": None}, "line 2: field 'rejected' is missing; a row has chosen and"),
        (UNLABELLED, "line 2: field 'label' is missing; a row has chosen and"),
        ({"conversations": []}, "field 'chosen' is missing; a row has .* with 'role' and"),
        (GOOD | UNLABELLED | {"label": True}, "line 2: field 'chosen' stands beside completion"),
        (UNLABELLED | {"label": 1}, "line 2: field 'label' must be true or false, not 1"),
        (GOOD | {"chosen": 3}, "field 'chosen' must be text or a list of messages, not int"),
        (PAIR | {"chosen": []}, "line 2: field 'chosen' is empty"),
        (PAIR | {"rejected": "c"}, "fields 'prompt' and 'rejected' must both be text"),
        (PAIR | {"rejected": ASKED}, "'rejected' begins with a message of 'user'; a response is"),
        (PAIR | {"prompt": [{"role": "user"}]}, "field 'prompt', message 1: needs text in 'role'"),
        (PAIR | {"prompt": [3]}, "field 'prompt', message 1: needs text in 'role'"),
        (PAIR | {"chosen": {"from": "gpt"}}, "field 'chosen', message 1: needs .*ShareGPT"),
        ({"chosen": "b", "rejected": "c"}, "line 2: field 'prompt' is missing, and cannot be told"),
        (CALLED, "cannot be told from"),
        (CALLED | {"rejected": CALLED["chosen"]}, "cannot be told from"),
        (GOOD | {"rejected": ["It is 9.", "8."]}, "'rejected', message 1: needs .* a row each"),
        (PAIR | {"prompt": IMAGE}, "field 'prompt', message 1: needs .* parts of the form"),
        (PAIR | {"prompt": said("user", ["a"])}, "message 1: needs .* parts of the form"),
        (PAIR | {"system": 3}, "field 'system' must be text beside a prompt of"),
        (GOOD | {"system": "Be kind."}, "a prompt that is text holds its system"),
        (PAIR | {"system": "Be kind.", "prompt": RUDE}, "field 'system' is another text than"),
        (PAIR | {"tools": "{"}, "field 'tools', column 2: not valid JSON"),
        (PAIR | {"tools": {}}, "field 'tools' must be a list of schemas"),
        (PAIR | {"tools": ["add"]}, "field 'tools' must be a list of schemas"),
        (PAIR | {"chat_template_kwargs": []}, "field 'chat_template_kwargs' must be an object"),
        (PAIR | {"chat_template_kwargs": {"messages": []}}, "which may not hold .*: messages, add"),
        (PAIR | {"chat_template_kwargs": {"tools": []}}, "which may not hold .*: messages, add"),
    ],
)
def test_a_row_that_does_not_fit_says_where_and_why(tmp_path, row, message):
    with pytest.raises(ValueError, match=message) as error:
        records(file_of(tmp_path / "rows.jsonl", [GOOD, row]))
    assert str(error.value).startswith(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    "row",
    [
        PAIR | {"chosen": PAIR["chosen"][0], "rejected": PAIR["rejected"][0], "prompt": ASKED[0]},
        PAIR | {"prompt": said("user", [part("What is "), part("3 + 4?")])},
        {"prompt": ASKED, "chosen": ASKED + RIGHT, "rejected": ASKED + WRONG},
        {"chosen": ASKED + RIGHT, "rejected": ASKED + WRONG},
        {"prompt": "What is 3 + 4?", "chosen": ASKED + RIGHT, "rejected": ASKED + WRONG},
        PAIR | {"completion": None, "label": None, "system": None, "tools": None},
        PAIR | {"system": ""},
        PAIR | {"prompt": said("user", "What is 3 + 4?", tool_calls=None)},
        {
            "chosen": said("user", "What is 3 + 4?", id="a", timestamp=1) + RIGHT,
            "rejected": said("user", "What is 3 + 4?", id="b", timestamp=2) + WRONG,
        },
    ],
)  # fmt: skip
def test_these_rows_say_the_same(row):
    """One message, text parts, the prompt repeated or implicit, nulls, ids that differ."""
    keys = ("role", "content")
    found, plain = one(row), parse_row(PAIR, "here")
    assert [{k: m[k] for k in keys} for m in found.prompt] == found.prompt[:0] + plain.prompt
    assert (found.completions, found.preferred) == (plain.completions, plain.preferred)
    assert found.variables == {} and found.unused == ()


def test_a_prompt_within_messages_is_all_that_they_share():
    ask, answer = ASKED + said("assistant", "7?"), said("user", "Sure?")
    row = {"prompt": ASKED, "chosen": ask + answer + said("assistant", "Yes."),
           "rejected": ask + answer + said("assistant", "No.")}  # fmt: skip
    assert one(row) == one({k: row[k] for k in ("chosen", "rejected")})
    assert one(row).prompt == ask + answer
    unpaired = one({"prompt": ASKED, "completion": ASKED + PAIR["chosen"], "label": True})
    assert unpaired.prompt == ASKED and unpaired.completions == [("completion", PAIR["chosen"])]
    same = one(PAIR | {"chosen": ASKED + PAIR["chosen"], "rejected": ASKED + PAIR["chosen"]})
    assert same.prompt == ASKED and same.completions[0][1] == same.completions[1][1]


def test_messages_that_differ_in_what_a_template_reads_are_no_shared_beginning():
    call = [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    calls, says_nothing = said("assistant", "", tool_calls=call), said("assistant", "")
    row = {"chosen": ASKED + calls + RIGHT, "rejected": ASKED + says_nothing + WRONG}
    assert one(row).prompt == ASKED


WORDS = st.text(st.sampled_from("ab :\n"), max_size=8)


TWO = st.tuples(WORDS, WORDS)


@given(turns=st.lists(TWO, max_size=3), last=WORDS, answers=TWO)
def test_hh_rlhf_texts_hold_their_prompt(turns, last, answers):
    prompt = "".join(f"\n\nHuman: {ask}\n\nAssistant: {answer}" for ask, answer in turns)
    prompt += f"\n\nHuman: {last}\n\nAssistant:"
    chosen, rejected = (f" {answer}" for answer in answers)
    found = one({"chosen": prompt + chosen, "rejected": prompt + rejected})
    assert found.prompt == prompt
    assert found.completions == [("chosen", chosen), ("rejected", rejected)]


def test_hh_rlhf_conversations_that_part_earlier_do_so_there():
    start = "\n\nHuman: a\n\nAssistant:"
    chosen, rejected = " b\n\nHuman: c\n\nAssistant: d", " e\n\nHuman: c\n\nAssistant: f"
    found = one({"chosen": start + chosen, "rejected": start + rejected})
    assert found.prompt == start and [text for _, text in found.completions] == [chosen, rejected]


def test_a_null_anywhere_is_absent(tmp_path):
    row = {"a": None, "b": [{"c": None, "d": {"e": None, "f": 0}}, None], "": ""}
    ((_, found),) = read_rows(file_of(tmp_path / "rows.jsonl", [row]))
    assert found == {"b": [{"d": {"f": 0}}, None], "": ""}


NAMES = "prompt chosen rejected completion label system tools chat_template_kwargs".split()
MESSAGE = st.fixed_dictionaries({}, optional={
    "role": st.sampled_from(["user", "assistant", "system", 3]), "content": CELLS,
    "tool_calls": CELLS, "from": CELLS, "value": CELLS,
})  # fmt: skip


@pytest.mark.parametrize("parse", [parse_row, partial(parse_prompt, chat=True)])
@given(row=st.dictionaries(st.sampled_from(NAMES), CELLS | MESSAGE | st.lists(MESSAGE, max_size=3)))
def test_any_row_is_a_record_or_an_error_that_names_its_place(parse, row):
    try:
        found = parse(row, "here")
    except ValueError as error:
        assert str(error).startswith("here")
        return
    said = [found.prompt, *(completion for _, completion in found.completions)]
    assert len({isinstance(value, str) for value in said}) == 1
    knows_nothing = SimpleNamespace(reads=lambda name: False, mentions=lambda key: False)
    Notes().add(found, Place(Path("here"), "line", 1), knows_nothing)


# ------------------------------------------------------------------------- columns with a meaning

TEMPLATE = (
    "{{ kind }}{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}call {{ call.function.name }}{% endfor %}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """weights/tiny with a chat template that reads tools, tool_calls and `kind`."""
    folder = tmp_path_factory.mktemp("rows") / "model"
    folder.mkdir()
    for file in TINY.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.mark.parametrize(
    "more, text",
    [
        ({}, ""),
        ({"system": "Be kind."}, "<|system|>Be kind.<|end|>"),
        ({"tools": TOOLS}, f"<|system|>{json.dumps(TOOLS)}<|end|>"),
        ({"tools": json.dumps(TOOLS)}, f"<|system|>{json.dumps(TOOLS)}<|end|>"),
        ({"chat_template_kwargs": {"kind": "Kindly."}}, "Kindly."),
    ],
)
def test_columns_with_a_meaning_reach_the_template(model, tmp_path, more, text):
    """Train, evaluate and generate read the same as the prompt of a row."""
    tokenizer, file = load_tokenizer(model), file_of(tmp_path / "rows.jsonl", [PAIR | more])
    ((example,), _) = read_examples(file, tokenizer, 256)
    (held_out,) = evaluate.tokenised(scan_rows(file), tokenizer, "preference")
    ((_, _, ids),) = generate.read_prompts(file, tokenizer, False, Notes())
    assert list(example.prompt) == list(held_out.prompt) == list(ids)
    wanted = text + "<|user|>What is 3 + 4?<|end|><|assistant|>"
    assert tokenizer.decode(ids, skip_special=False) == wanted


def test_a_message_that_only_calls_a_tool_is_read_or_refused(model, tmp_path):
    row = PAIR | {"chosen": [{"role": "assistant", "content": None, "tool_calls": CALL}]}
    file = file_of(tmp_path / "rows.jsonl", [row])
    tokenizer = load_tokenizer(model)
    ((example,), _) = read_examples(file, tokenizer, 256)
    assert tokenizer.decode(example.responses[0], skip_special=False) == "call add<|end|>"
    with pytest.raises(ValueError, match=r"line 1, field 'chosen': .* 'tool_calls', which .* not"):
        read_examples(file, load_tokenizer(TINY), 256)
    said_before = file_of(file, [PAIR | {"prompt": ASKED + row["chosen"] + said("user", "And?")}])
    with pytest.raises(ValueError, match="'tool_calls', which this model's chat template does not"):
        read_examples(said_before, load_tokenizer(TINY), 256)
    with pytest.raises(ValueError, match="'tool_calls', which this model's chat template does not"):
        generate.read_prompts(said_before, load_tokenizer(TINY), False, Notes())


UNUSED = {**PAIR, "tools": TOOLS, "chat_template_kwargs": {"kind": "", "deep": 1}, "source": "x"}


def test_columns_that_are_not_used_are_named_once(model, tmp_path, capsys):
    file = file_of(tmp_path / "rows.jsonl", [UNUSED, {**PAIR, "score": 3}])
    base = ["--model", str(TINY), "--data", str(file), "--device", "cpu"]
    names = "tools, chat_template_kwargs.kind, chat_template_kwargs.deep"
    out = tmp_path / "run"
    more = ["--eval-data", str(file), "--max-steps", "1", "--out", str(out)]
    to_file = ["--out", str(tmp_path / "o.jsonl"), "--max-new-tokens", "2"]
    for main, arguments, extra in (
        (train.main, more, "source, "),
        (evaluate.main, [], "source, "),
        (generate.main, to_file, "source, "),
    ):
        assert main([*base, *arguments]) == 0
        lines = [x.strip() for x in capsys.readouterr().out.splitlines() if "not used" in x]
        assert lines == [f"columns not used: {extra}{names}, score"]
    notes = json.loads((out / "config.json").read_text())["facts"]["notes"]
    assert notes == [f"columns not used: source, {names}, score"]


def test_what_messages_hold_and_the_template_does_not_know_is_named(tmp_path):
    """weights/tiny's template writes role and content alone."""
    chosen = [RIGHT[0] | {"reasoning_content": "3 + 4", "id": 7, "tool_calls": [{"a": 1}]}]
    file, notes = file_of(tmp_path / "rows.jsonl", [PAIR, {**PAIR, "chosen": chosen}]), Notes()
    read_examples(file, load_tokenizer(TINY), 256, notes=notes)
    names = "'reasoning_content' of messages, 'tool_calls' of messages"
    assert notes.lines() == [f"columns not used: {names}"]


def test_any_key_may_be_a_variable_of_the_template(tmp_path):
    """Also one that is the name of an argument here."""
    keys = ["prompt", "completion", "where", "field", "tokenizer", "response", "self", "variables"]
    row = {**PAIR, "chat_template_kwargs": dict.fromkeys(keys, "x"), "tools": ""}
    notes = Notes()
    read_examples(file_of(tmp_path / "rows.jsonl", [row]), load_tokenizer(TINY), 256, notes=notes)
    assert all(f"chat_template_kwargs.{key}" in notes.lines()[0] for key in keys)


def test_a_text_prompt_goes_through_no_template(model, tmp_path):
    notes, file = Notes(), file_of(tmp_path / "rows.jsonl", [GOOD | {"tools": TOOLS}])
    read_examples(file, load_tokenizer(model), 256, notes=notes)
    assert notes.lines() == ["columns not used: tools"]


def test_a_prompt_repeated_in_text_responses_is_named_once_with_its_first_line(tmp_path):
    twice = {"prompt": "Q: a\nA:", "chosen": "Q: a\nA: b", "rejected": "Q: a\nA: c"}
    file, notes = file_of(tmp_path / "rows.jsonl", [GOOD, twice, twice]), Notes()
    read_examples(file, load_tokenizer(TINY), 256, notes=notes)
    (line,) = notes.lines()
    assert "repeat the prompt" in line and line.endswith(f"twice: 2; the first: {file}, line 2")


def test_what_generate_was_given_stands_in_what_it_writes(model, tmp_path):
    row = {"prompt": ASKED, "system": "Be kind.", "tools": TOOLS, "id": 3}
    out = tmp_path / "out.jsonl"
    command = ["--model", model, "--data", file_of(tmp_path / "rows.jsonl", [row]), "--out", out]
    assert generate.main([*map(str, command), "--max-new-tokens", "2", "--device", "cpu"]) == 0
    written = json.loads(out.read_text())
    del row["id"]
    assert written == written | row
    assert written["completion"][0]["role"] == "assistant"


# ------------------------------------------------------------------------- folders of models


@pytest.mark.parametrize("name", ["name", "org--a--b"])
def test_a_hubs_cache_is_named_as_the_repository(tmp_path, name, capsys):
    top = tmp_path / f"models--{name}"
    folder = top / "snapshots" / "0a1b2c"
    folder.mkdir(parents=True)
    for file in TINY.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    file, out = file_of(tmp_path / "rows.jsonl", [PAIR]), tmp_path / "run"
    command = ["--data", str(file), "--out", str(out), "--device", "cpu", "--max-steps", "1"]
    assert train.main([*command, "--model", str(top)]) == 1
    error = capsys.readouterr().err
    assert "the top folder of a hub's cache" in error and str(folder) in error
    assert train.main([*command, "--model", str(folder)]) == 0
    card = (out / "model" / "README.md").read_text()
    repository = name.replace("--", "/", 1)
    assert f"base_model: {repository}\n" in card and f"# {repository}, trained" in card
    kept = out / "model" / "additional_chat_templates" / "rag.jinja"
    assert kept.read_text() == "{{ messages }}"


@pytest.mark.parametrize("read", [load_tokenizer, read_config])
def test_the_name_of_a_model_on_a_hub_is_told_from_a_folder(read):
    with pytest.raises(FileNotFoundError, match=r"org/name is no folder.*downloaded"):
        read("org/name")
