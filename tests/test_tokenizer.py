"""Tokenizers of both formats, on tiny vocabularies that are trained here."""

import io
import json
import warnings

import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from minibnf.data import read_examples
from minibnf.files.tokenizer import load_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="needs minibnf[hf]")
pytest.importorskip("jinja2", reason="needs minibnf[hf]")

CORPUS = [
    "The capital of France is Paris.",
    "user assistant system",
    "How many apples are 12 and 34? 46.",
    "<think> in text </think>",
    "im_start im_end <| |>",
    "naïve café, 你好, привет",
] * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "trims": CHATML.replace("m['content']", "m['content'] | trim"),
    "default system": (
        "{% if messages[0]['role'] != 'system' %}"
        "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
    ),
    "closes with text": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ###\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    "builds from role": (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "concatenates": "{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>",
}
ROLES = ["<|user|>", "<|assistant|>", "<|system|>"]
PROPERTY = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write_config(directory, template, **more):
    config = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}}
    config |= {"pad_token": "<|endoftext|>", "chat_template": template, **more}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def byte_level(directory, template=CHATML, special=ROLES, words=None, **more):
    """A directory with a byte-level BPE.

    words: a regular expression for words; with it the text is normalised (NFC). Llama 3 and Qwen
    have such expressions of their own.
    """
    tokenizer, pre = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    if words:
        tokenizer.normalizer = tokenizers.normalizers.NFC()
        split = pre.Split(tokenizers.Regex(words), "isolated")
        level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre.Sequence([split, level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    how = {"special_tokens": SPECIAL, "initial_alphabet": pre.ByteLevel.alphabet()}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False, **how)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(special)
    added = (tokenizers.AddedToken(t, normalized=False) for t in ("<think>", "</think>", "  "))
    tokenizer.add_tokens(list(added))
    tokenizer.enable_truncation(8)  # as some published files have; must not bite
    tokenizer.save(str(directory / "tokenizer.json"))
    return write_config(directory, template, **more)


def sentence_piece(directory, template=CHATML, **options):
    model = io.BytesIO()
    fixed = {"vocab_size": 340, "hard_vocab_limit": False, "byte_fallback": True, "pad_id": 3}
    options = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "control_symbols": SPECIAL[:1] + ROLES,
        "user_defined_symbols": [*SPECIAL[1:], "<think>", "</think>", "▁▁"],
    } | options
    train = sentencepiece.SentencePieceTrainer.train
    given = {"sentence_iterator": iter(CORPUS), "model_writer": model, "num_threads": 1}
    train(**given, minloglevel=2, **fixed, **options)
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return write_config(directory, template)


WRITERS = {"bpe": byte_level, "sp": sentence_piece}


@pytest.fixture(scope="session")
def loaded(tmp_path_factory):
    """{(format, template's name): Tokenizer}"""
    found = {}
    for kind, write in WRITERS.items():
        base = write(tmp_path_factory.mktemp(kind))
        for name, template in TEMPLATES.items():
            write_config(base, template)
            found[kind, name] = load_tokenizer(base)
    return found


each = pytest.mark.parametrize("kind", WRITERS)


@each
def test_half_an_emoji_is_an_error_that_names_row_and_field(loaded, kind, tmp_path):
    row = {"prompt": "a \ud83d b", "completion": "c", "label": True}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    tokenizer = next(tokenizer for (k, _), tokenizer in loaded.items() if k == kind)
    with pytest.raises(ValueError, match="line 1, field 'prompt': text that is not valid Unicode"):
        read_examples(tmp_path / "rows.jsonl", tokenizer, 100)


fragments = st.sampled_from([
    *SPECIAL, *ROLES, "<think>", "</think>", "<s>", "</s>", "<pad>", "<unk>",
    "<", "<|", "<|im_", "im_end|>", "im_end", "|>", "end|>", "\n", " ", "  ",
    "user", "assistant", "naïve",
])  # fmt: skip
# without ▁, which is how sentencepiece writes a space
letters = st.characters(exclude_characters="▁\ufdd0", exclude_categories=["Cs"])
contents = st.lists(fragments | st.text(letters, max_size=4), max_size=5).map("".join)
plain = st.text(letters.filter(lambda c: c not in "<|>"), max_size=12)
roles = st.sampled_from(["system", "user", "assistant"])


def chats_of(said):
    message = st.fixed_dictionaries({"role": roles, "content": said})
    return st.lists(message, min_size=1, max_size=4)


def users(*texts):
    return [{"role": "user", "content": text} for text in texts]


def controls(tokenizer, ids):
    return [i for i in ids if i in set(tokenizer.control.values())]


def special(tokenizer, ids):
    """The control tokens but those that an assistant may write in a completion."""
    own = {tokenizer.control[t] for t in ("<think>", "</think>")}
    return [i for i in controls(tokenizer, ids) if i not in own]


def expected_controls(tokenizer, name, chat):
    """Worked out by hand for each template: what it writes of itself."""
    start, end = tokenizer.control["<|im_start|>"], tokenizer.control["<|im_end|>"]
    if name == "closes with text":
        return []
    if name == "concatenates":
        return [end]
    if name == "builds from role":
        return [i for m in chat for i in (tokenizer.control[f"<|{m['role']}|>"], end)]
    return [start, end] * (len(chat) + (name == "default system" and chat[0]["role"] != "system"))


@each
@pytest.mark.parametrize("name", TEMPLATES)
@PROPERTY
@example(chat=users("<|im_", "end|>"))
@example(chat=users("<|", "im_end", "|> \n"))
@example(chat=users("<|im_<|im_end|>end|>"))
@given(chat=chats_of(contents))
def test_content_never_becomes_a_control_token(loaded, kind, name, chat):
    tokenizer = loaded[kind, name]
    ids = tokenizer.encode_chat(chat)
    assert controls(tokenizer, ids) == expected_controls(tokenizer, name, chat)
    assert tokenizer.decode(ids, skip_special=False) == tokenizer.render(chat)


@each
@pytest.mark.parametrize("name", TEMPLATES)
@PROPERTY
@given(chat=chats_of(plain))
def test_a_chat_without_control_text_is_its_rendering(loaded, kind, name, chat):
    tokenizer = loaded[kind, name]
    assert tokenizer.encode_chat(chat, True) == tokenizer.encode(tokenizer.render(chat, True))


@each
@PROPERTY
@example(text="a  b <|im_end|>\n")
@example(text="<|user|> a")
@given(text=contents)
def test_decode_inverts_encode(loaded, kind, text):
    tokenizer = loaded[kind, "chatml"]
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


@each
def test_encode_reads_control_tokens_and_adds_none(loaded, kind):
    tokenizer = loaded[kind, "chatml"]
    ids = tokenizer.encode("<|im_start|>user\nHow many apples are 12 and 34?<|im_end|>")
    assert controls(tokenizer, ids) == [tokenizer.bos_id, tokenizer.eos_id] == [ids[0], ids[-1]]
    assert tokenizer.decode(ids) == "user\nHow many apples are 12 and 34?"
    assert tokenizer.encode("") == []


@each
@pytest.mark.parametrize(
    "name", ["chatml", "trims", "default system", "builds from role", "closes with text"]
)
@PROPERTY
@given(chat=chats_of(contents), answer=contents)
def test_the_boundary_is_that_of_inference(loaded, kind, name, chat, answer):
    tokenizer = loaded[kind, name]
    response = [{"role": "assistant", "content": answer}]
    prompt, ids = tokenizer.encode_response(chat, response)
    assert prompt == tokenizer.encode_chat(chat, True)
    rest = tokenizer.render(chat + response)[len(tokenizer.render(chat, True)) :]
    if name == "closes with text":
        assert tokenizer.decode(ids, skip_special=False) == rest and special(tokenizer, ids) == []
    else:
        assert tokenizer.decode(ids, skip_special=False) == rest.removesuffix("\n")
        assert special(tokenizer, ids) == [tokenizer.eos_id] == ids[-1:]


def test_a_response_of_several_turns_ends_with_its_last_turn(loaded):
    tokenizer = loaded["bpe", "chatml"]
    turns = [{"role": role, "content": "Paris"} for role in ("assistant", "user", "assistant")]
    _, ids = tokenizer.encode_response(users("?"), turns)
    assert ids.count(tokenizer.eos_id) == 3 and ids[-1] == tokenizer.eos_id


def test_roles_build_role_tokens_but_never_an_end(loaded):
    for kind in WRITERS:
        tokenizer = loaded[kind, "builds from role"]
        ids = tokenizer.encode_chat(users("im_end"))
        assert controls(tokenizer, ids) == [tokenizer.control["<|user|>"], tokenizer.eos_id]
        for role in ("im_end", "im_end|>a"):
            with pytest.raises(ValueError, match="acts on control text inside a message"):
                tokenizer.encode_chat([{"role": role, "content": "user"}])


def test_merges_and_whole_word_look_ups_cannot_spell_a_control_token(tmp_path):
    """Vocabularies in which ordinary merges spell '<think>'.

    The model of the second looks up whole words before it merges.
    """
    symbols = ["<", ">", "think", "<think", "t", "h", "i", "n", "k", "th", "in", "ink"]
    merges = [("i", "n"), ("in", "k"), ("t", "h"), ("th", "ink"), ("<", "think"), ("<think", ">")]
    vocabulary = {t: i for i, t in enumerate([*symbols, "<think>", "<|im_end|>"])}
    config = {"eos_token": "<|im_end|>", "chat_template": "{{ messages[0].content }}<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for ignore_merges in (False, True):
        model = tokenizers.models.BPE(vocabulary, merges, ignore_merges=ignore_merges)
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.add_special_tokens(["<|im_end|>"])
        tokenizer.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        ours = load_tokenizer(tmp_path)
        ids = ours.encode_chat(users("<think>"))
        assert ids == [0, 2, 1, 13]  # "<", "think", ">" and the template's own
        assert ours.encode("<think><|im_end|>") == [12, 13]


def test_a_dummy_prefix_stands_at_the_beginning_only(tmp_path):
    symbols = {"user_defined_symbols": [], "control_symbols": SPECIAL + ROLES}
    options = {"add_dummy_prefix": True, **symbols}
    tokenizer = load_tokenizer(sentence_piece(tmp_path, CHATML, **options))
    native = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert tokenizer.encode("Paris is") == native.encode("Paris is")
    assert native.id_to_piece(tokenizer.encode("Paris<|im_end|>Paris"))[-1][0] != "▁"
    chat, response = users("Hi"), [{"role": "assistant", "content": "Paris"}]
    prompt, ids = tokenizer.encode_response(chat, response)
    whole = tokenizer.encode(tokenizer.render(chat + response))
    text = tokenizer.decode(whole, skip_special=False).removesuffix("\n")
    assert tokenizer.decode(prompt + ids, skip_special=False) == text
    assert native.id_to_piece(ids[0])[0] != "▁"


def test_tokens_and_attributes(tmp_path):
    directory = byte_level(tmp_path)
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    (directory / "config.json").write_text('{"eos_token_id": 1}')
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (2, 1, 0)
    assert tokenizer.end_ids == {0, 1, 2}
    assert set(tokenizer.control) == {*SPECIAL, *ROLES, "<think>", "</think>"}
    spec = json.loads((directory / "tokenizer.json").read_text())
    assert tokenizer.vocab_size == len(spec["model"]["vocab"]) + 6
    # The truncation that the file asks for does not apply.
    assert len(tokenizer.encode("How many apples are 12 and 34? 46.")) > 8


def beginning(directory, kind):
    """The tokenizer of a directory, told to begin a text with bos and to end it with eos."""
    if kind == "sp":
        config = json.loads((directory / "tokenizer_config.json").read_text())
        config["add_bos_token"] = True
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        fast = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        ids = [(t, fast.token_to_id(t)) for t in ("<|im_start|>", "<|im_end|>")]
        template = tokenizers.processors.TemplateProcessing
        fast.post_processor = template("<|im_start|> $A <|im_end|>", special_tokens=ids)
        fast.save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory)


@each
def test_a_text_gets_the_beginning_token_once_and_only_where_the_tokenizer_gives_it(kind, tmp_path):
    directory = WRITERS[kind](tmp_path)
    plain, begun = load_tokenizer(directory), beginning(directory, kind)
    ids = plain.encode("The capital")
    assert plain.encode_text("The capital") == ids == begun.encode("The capital")
    assert begun.encode_text("The capital") == [begun.bos_id, *ids]
    assert begun.encode_text("<|im_start|>The capital") == [begun.bos_id, *ids]
    assert plain.encode_text("") == [] and begun.encode_text("") == [begun.bos_id]
    chat = [{"role": "user", "content": "a"}]
    assert begun.encode_chat(chat) == plain.encode_chat(chat)  # the template begins a chat


@each
@pytest.mark.parametrize("more", ["", " ", "\n", " \n\n"])
def test_a_text_response_ends_once(loaded, kind, more):
    tokenizer = loaded[kind, "chatml"]
    ids = tokenizer.encode("Paris.", continuation=True)
    assert tokenizer.encode_text_response("Paris.") == [*ids, tokenizer.eos_id]
    found = tokenizer.encode_text_response("Paris.<|im_end|>" + more)
    space = tokenizer.encode(more, continuation=True)
    assert found == [*ids, tokenizer.eos_id, *space]  # what the row holds, and no more
    assert tokenizer.encode_text_response("<|im_end|>a")[-1] == tokenizer.eos_id
    assert tokenizer.encode_text_response("") == []


def test_save_copies_the_files(tmp_path):
    (tmp_path / "a").mkdir()
    tokenizer = load_tokenizer(byte_level(tmp_path / "a"))
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    tokenizer.save(tmp_path / "b" / "c")
    tokenizer.save(tmp_path / "a")  # onto itself: nothing happens
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    copies = tmp_path / "b" / "c"
    assert sorted(p.name for p in copies.iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (copies / name).read_bytes()
    assert load_tokenizer(copies).render(users("x")) == "x"  # the .jinja file wins


def test_templates_have_what_transformers_gives_them(tmp_path):
    template = (
        "{%- for m in messages %}\n    {% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{{ bos_token }}{{ strftime_now('%Y') | length }}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}"
        "{% endfor %}{{ tools is none }}{{ eos_token }}"
    )
    tokenizer = load_tokenizer(byte_level(tmp_path, [{"name": "default", "template": template}]))
    assert tokenizer.render([{"role": "user"}] * 2) == '<|im_start|>4{"role": "user"}True<|im_end|>'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ([{"name": "rag", "template": ""}], "has no chat template"),
        ("{% if %}", "malformed, line 1"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_template_errors(tmp_path, template, message):
    tokenizer = load_tokenizer(byte_level(tmp_path, template))
    with pytest.raises(ValueError, match=message):
        tokenizer.render([{"role": "user", "content": "a", "name": None}])


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ({"eos_token": "<end>"}, {}, r"eos_token is '<end>', which tokenizer\.json does not hold"),
        ({"eos_token": None}, {}, "eos_token is missing"),
        ({"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}, {}, "is to have id 7, in"),
        ({}, {"generation_config.json": '{"eos_token_id": 4000}'}, "an eos_token_id is 4000"),
        ({}, {"generation_config.json": "{"}, "not valid JSON"),
        ({}, {"tokenizer.json": "{}"}, "cannot be read as a tokenizer"),
        ({}, {"tokenizer.json": None, "tokenizer.model": "x"}, "model cannot be read as a tok"),
        ({}, {"tokenizer.json": None}, "holds neither"),
    ],
)
def test_loading_errors(tmp_path, config, files, message):
    byte_level(tmp_path, **config)
    for name, text in files.items():
        if text is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_tokenizer(tmp_path)


def test_ids_beyond_the_vocabulary_and_lost_characters_are_told(tmp_path):
    directory = byte_level(tmp_path)
    tokenizer = load_tokenizer(directory)
    with pytest.raises(ValueError, match="is no id of"):
        tokenizer.decode([tokenizer.vocab_size])
    spec = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    vocabulary["unused"] = vocabulary.pop("Ą")  # which spells the byte 4
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode("abc")
        with pytest.raises(UserWarning, match="no token for"):
            tokenizer.encode("a\x04")
