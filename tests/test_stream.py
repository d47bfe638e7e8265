"""Decoding while ids come: the pieces, joined, are the text, and none shows half a character."""

import json
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minibnf.files.tokenizer import load_tokenizer
from tests.test_tokenizer import CORPUS, ROLES, SPECIAL, byte_level, sentence_piece, write_config

tokenizers = pytest.importorskip("tokenizers", reason="needs minibnf[hf]")
KINDS = ["byte level", "metaspace", "gemma", "unigram", "sp", "sp prefix"]
CHARACTERS = st.characters(exclude_characters="▁\ufffd", exclude_categories=["Cs"])
PROPERTY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def byte_fallback(directory, kind, special=SPECIAL + ROLES, template=None, **config):
    """A tokenizer.json that spells unknown characters by bytes.

    kind: as Llama 2's ("metaspace"), as "gemma"'s, or a "unigram" model.
    """
    models, splits, trainers = (
        tokenizers.models, tokenizers.pre_tokenizers, tokenizers.trainers
    )  # fmt: skip
    by_bytes = [f"<0x{b:02X}>" for b in range(256)]
    quiet = {"show_progress": False, "vocab_size": 120 if kind == "unigram" else 200}
    made = tokenizers.Tokenizer(models.Unigram() if kind == "unigram" else models.BPE())
    made.pre_tokenizer = splits.Metaspace(prepend_scheme="first", split=kind == "unigram")
    if kind == "unigram":
        unknown = {"unk_token": "<unk>", "special_tokens": ["<unk>"]}
        made.train_from_iterator(CORPUS, trainers.UnigramTrainer(**quiet, **unknown))
        known = json.loads(made.to_str())["model"]["vocab"]
        vocabulary = [*map(tuple, known), *((t, -20.0) for t in by_bytes)]
        made = tokenizers.Tokenizer(models.Unigram(vocabulary, 0, byte_fallback=True))
    else:
        made.train_from_iterator(CORPUS, trainers.BpeTrainer(**quiet))
        model = json.loads(made.to_str())["model"]
        ids = {t: i for i, t in enumerate(["<unk>", *by_bytes, *model["vocab"]])}
        how = {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
        made = tokenizers.Tokenizer(models.BPE(ids, [tuple(m) for m in model["merges"]], **how))
    d = tokenizers.decoders
    if kind == "gemma":
        made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        made.pre_tokenizer = splits.Split(" ", "merged_with_previous")
        made.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse()])
    else:
        made.pre_tokenizer = splits.Metaspace(prepend_scheme="first", split=False)
        steps = [d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)]
        made.decoder = d.Sequence(steps)
    made.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in special])
    made.save(str(directory / "tokenizer.json"))
    return write_config(directory, template, **config)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """{kind: Tokenizer}"""

    def make(kind, folder):
        if kind.startswith("sp"):
            return sentence_piece(folder, add_dummy_prefix=kind == "sp prefix")
        return byte_level(folder) if kind == "byte level" else byte_fallback(folder, kind)

    return {kind: load_tokenizer(make(kind, tmp_path_factory.mktemp("t"))) for kind in KINDS}


@cache
def awkward(tokenizer):
    """Ids that spell parts of characters, white space or nothing; random ids rarely meet them."""
    return [i for i in range(tokenizer.vocab_size) if not tokenizer.decode([i]).strip(" \n\ufffd")]


@pytest.mark.parametrize("kind", KINDS)
@PROPERTY
@given(data=st.data(), skip=st.booleans())
def test_the_pieces_are_the_text(loaded, kind, data, skip):
    tokenizer = loaded[kind]
    some = st.sampled_from(awkward(tokenizer)) | st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(some, max_size=14))
    pieces = list(tokenizer.stream(iter(ids), skip))
    assert "".join(pieces) == tokenizer.decode(ids, skip) and all(pieces)


@pytest.mark.parametrize("kind", KINDS)
@PROPERTY
@given(text=st.text(CHARACTERS, max_size=8))
def test_no_piece_shows_half_a_character(loaded, kind, text):
    assert not any("\ufffd" in piece for piece in loaded[kind].stream(loaded[kind].encode(text)))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_characters_come_at_once(loaded, kind):
    tokenizer, shown = loaded[kind], []
    ids = tokenizer.encode("<|im_start|>The capital of France is Paris.")

    def feed():
        for k, i in enumerate(ids):
            assert "".join(shown) == tokenizer.decode(ids[:k])
            yield i

    for piece in tokenizer.stream(feed()):
        shown.append(piece)
    assert "".join(shown) == tokenizer.decode(ids) and len(shown) > 2


def test_ids_that_do_not_exist_are_told(loaded):
    with pytest.raises(ValueError, match="is no id of"):
        list(loaded["sp"].stream([10**6]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_answer_costs_no_more_per_token_than_a_short_one(loaded, kind, monkeypatch):
    tokenizer, decoded = loaded[kind], []
    ids = tokenizer.encode("The capital of France is Paris. naïve 你好 " * 50)
    plain = tokenizer.backend.decode
    monkeypatch.setattr(
        tokenizer.backend, "decode", lambda ids, skip: decoded.extend(ids) or plain(ids, skip)
    )
    assert "".join(tokenizer.stream(ids)) == plain(ids, True)
    assert len(decoded) < 10 * len(ids)
