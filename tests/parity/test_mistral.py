"""Real vocabularies of mistral-common: sentencepiece models, and a BPE of 131,072 tokens.

Three judges: sentencepiece itself; transformers' class over sentencepiece, for every string; and
transformers' AutoTokenizer, which turns the model into a tokenizer.json. In version 5.23 this last
one is not faithful in three things:
- it merges spaces first, although their pieces have the lowest score of all;
- it adds no space before a text that begins with one;
- it reads '<unk>' in a text as the unknown token.
Strings with these are left to the other two judges.
"""

import base64
import importlib.util
import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece

transformers = pytest.importorskip("transformers", reason="parity needs transformers")
tokenizers = pytest.importorskip("tokenizers", reason="needs minibnf[hf]")
pytest.importorskip("google.protobuf", reason="protobuf is not installed: make parity")

from minibnf.files.tokenizer import load_tokenizer  # noqa: E402
from tests import test_templates  # noqa: E402
from tests.parity.test_tokenizer import strings  # noqa: E402
from tests.test_tokenizer import controls  # noqa: E402

# Its data files are all that is used; it is not imported.
SPEC = importlib.util.find_spec("mistral_common")
DATA = Path(SPEC.submodule_search_locations[0]) / "data" if SPEC else None
pytestmark = pytest.mark.skipif(SPEC is None, reason="mistral-common is not installed: make parity")
MODELS = sorted(p.name for p in DATA.glob("*.model*")) if SPEC else []
TEKKEN = "tekken_240911.json"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ m.content|trim + eos_token }}{% endif %}{% endfor %}"
)
SPELT = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CONFIG = SPELT | {"add_bos_token": False, "chat_template": TEMPLATE}


def byte_level_bpe(path):
    """The tokenizer that tekken's ranked byte strings make.

    Every way to split a token into two others is a merge, of the token's rank.
    """
    spec = json.loads(path.read_text(encoding="utf-8"))
    config, special = spec["config"], ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    count = config["default_num_special_tokens"]
    special += [f"<SPECIAL_{i}>" for i in range(len(special), count)]
    size = config["default_vocab_size"] - len(special)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    spelt = dict(zip(printable + others, map(chr, printable + list(range(256, 512))), strict=False))
    words = [base64.b64decode(entry["token_bytes"]) for entry in spec["vocab"][:size]]
    tokens = ["".join(spelt[b] for b in word) for word in words]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        splits = [(token[:k], token[k:]) for k in range(1, len(token))]
        splits = [(a, b) for a, b in splits if a in ranks and b in ranks]
        merges += sorted(splits, key=lambda split: (ranks[split[0]], ranks[split[1]]))
    vocabulary = {token: i for i, token in enumerate([*special, *tokens])}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, ignore_merges=True))
    pre = tokenizers.pre_tokenizers
    words = pre.Split(tokenizers.Regex(config["pattern"]), "isolated")
    level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre.Sequence([words, level])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(special)
    return bpe


@pytest.fixture(scope="module")
def directory(request, tmp_path_factory):
    """A directory in Hugging Face layout of the data file named."""
    path = tmp_path_factory.mktemp("mistral")
    fast = request.param == TEKKEN
    if fast:
        byte_level_bpe(DATA / TEKKEN).save(str(path / "tokenizer.json"))
    else:
        shutil.copy(DATA / request.param, path / "tokenizer.model")
    name = "PreTrainedTokenizerFast" if fast else "LlamaTokenizer"
    kind = {"tokenizer_class": name, "legacy": False}
    (path / "tokenizer_config.json").write_text(json.dumps(CONFIG | kind))
    return path


def mixed(tokenizer, count=5000):
    """Strings, half of which hold a control token or a part of one somewhere."""
    draw = random.Random(0)
    tokens = [*list(tokenizer.control)[:12], "[INS", "T]", "/INST]", "[/INST"]
    texts = []
    for text in strings(count):
        if draw.random() >= 0.5:
            at = draw.randint(0, len(text))
            text = text[:at] + draw.choice(tokens) + text[at:]
        texts.append(text)
    return texts


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def over_sentencepiece(directory, control, legacy):
    """transformers' own class over sentencepiece.

    legacy: it adds a space before every text, and otherwise before none.
    """
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    more = dict(legacy=legacy, additional_special_tokens=list(control))
    return SentencePieceBackend(vocab_file=str(directory / "tokenizer.model"), **SPELT, **more)


@pytest.mark.parametrize("directory", MODELS, indirect=True)
def test_ids_of_sentencepiece_models(directory):
    ours = load_tokenizer(directory)
    native = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    prefixing = over_sentencepiece(directory, ours.control, legacy=True)
    plain = over_sentencepiece(directory, ours.control, legacy=False)
    converted = transformers.AutoTokenizer.from_pretrained(directory)
    assert ours.vocab_size == len(native)
    assert (ours.bos_id, ours.eos_id) == (native.bos_id(), native.eos_id())
    counts = [0, 0]
    for text in mixed(ours):
        found = ours.encode(text)
        assert ours.encode(text, continuation=True) == ids(plain, text), text
        if not ours._spelling.pattern.search(text):
            assert found == native.encode(text) == ids(prefixing, text), text
            assert ours.decode(found) == native.decode(found)
            counts[0] += 1
        if "  " not in text and not text.startswith(" "):
            assert found == ids(converted, text), text
            counts[1] += 1
        assert ours.decode(found, skip_special=False) == text
        assert ours.decode(found) == converted.decode(
            found, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    assert min(counts) > 3000


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer"])
@pytest.mark.parametrize("add", [None, False, True])
@pytest.mark.parametrize("directory", MODELS[-1:], indirect=True)
def test_the_beginning_of_text_prompts(directory, kind, add):
    """By add_bos_token, and by what each class does without it."""
    config = CONFIG | {"tokenizer_class": kind, "legacy": False, "add_bos_token": add}
    if add is None:
        del config["add_bos_token"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = load_tokenizer(directory)
    begun = theirs("The capital").input_ids[:1] == [theirs.bos_token_id]
    first = [ours.bos_id] if begun else []
    assert ours.encode_text("The capital") == first + ours.encode("The capital")
    if kind == "LlamaTokenizer":
        for text in ("The capital of France", "naïve", "你好 a"):
            assert ours.encode_text(text) == theirs(text).input_ids


@pytest.mark.parametrize("directory", [TEKKEN], indirect=True)
def test_ids_of_a_byte_level_bpe(directory):
    ours, theirs = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    for text in mixed(ours):
        found = ours.encode(text)
        assert found == ids(theirs, text), text
        for skip in (False, True):
            assert ours.decode(found, skip) == theirs.decode(
                found, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )


@pytest.mark.parametrize(
    "directory", [MODELS[0], MODELS[-1], TEKKEN] if MODELS else [], indirect=True
)
def test_chats_streams_and_5000_strings(directory):
    ours, theirs = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    expected = controls(ours, ours.encode_chat([{"role": "user", "content": "a"}]))
    spare = list(ours.control)[:40]
    parts = [*spare, *(t[:-1] for t in spare), *(t[1:] for t in spare)]
    for text in test_templates.strings(5000, parts):
        chat = [{"role": "user", "content": text}]
        found = ours.encode_chat(chat)
        assert controls(ours, found) == expected, text
        if "▁" not in text:
            assert ours.decode(found, skip_special=False) == ours.render(chat)
    for text in strings(500):
        said = text.strip(" ")
        chat = [{"role": role, "content": said} for role in ("user", "assistant", "user")]
        assert ours.render(chat) == theirs.apply_chat_template(chat, tokenize=False)
        found = ours.encode_chat(chat)
        assert found == ours.encode(ours.render(chat))
        if "  " not in text:
            assert found == theirs.apply_chat_template(chat, return_dict=True).input_ids
        prompt, response = ours.encode_response(chat, [{"role": "assistant", "content": text}])
        assert prompt == found and response == ours.encode(text.strip() + "</s>", continuation=True)
        assert "".join(ours.stream(prompt + response)) == ours.decode(prompt + response)
