"""The converted SmolLM2-135M-Instruct against transformers: ids, chats, and every weight."""

import json
import random
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="parity needs transformers")
pytest.importorskip("tokenizers", reason="needs minibnf[hf]")
pytest.importorskip("jinja2", reason="needs minibnf[hf]")

from minibnf.files.gguf import shipped_gguf  # noqa: E402
from minibnf.files.tokenizer import load_tokenizer  # noqa: E402

DIRECTORY = Path(__file__).parents[2] / "weights" / "smollm2-135m-instruct"
pytestmark = pytest.mark.skipif(
    not DIRECTORY.is_dir(), reason=f"{DIRECTORY} is absent: run make weights"
)


@pytest.fixture(scope="module")
def ours():
    return load_tokenizer(DIRECTORY)


@pytest.fixture(scope="module")
def theirs():
    return transformers.AutoTokenizer.from_pretrained(DIRECTORY)


@pytest.fixture(scope="module")
def gguf():
    pytest.importorskip("gguf", reason="needs minibnf[weights]")
    try:
        return shipped_gguf()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def strings(count=5000, digits=True):
    """Strings of words, white space, numbers, code, many scripts, control tokens and characters.

    They are joined at random.
    """
    draw = random.Random(0)
    words = [
        "The", " capital", " of", "France", "don't", "I'LL", "naïve", "你好", "привет", "😀👍🏽",
        "עברית", "हिन्दी", "\n", "\n\n", " ", "  ", "\t", "\r\n", "def f(x):", "    return", "!=",
        "...", "<|im_start|>", "<|im_end|>", "<|im_", "<file_sep>", "|>", "1", "23", "2024",
        "3.14", "1e-5", "٣", "½", "²",
    ]  # fmt: skip
    blocks = [(32, 126), (160, 0x2FFF), (0x10000, 0x1FFFF)]
    made = []
    for _ in range(count):
        parts = draw.choices(words, k=draw.randint(0, 10))
        parts += [chr(draw.randint(*draw.choice(blocks))) for _ in range(draw.randint(0, 10))]
        made.append("".join(draw.sample(parts, len(parts))))
    return made if digits else ["".join(c for c in text if not c.isnumeric()) for text in made]


# SmolLM2 has no tokens for some characters; both leave these out, and ours warns.
unwarned = pytest.mark.filterwarnings("ignore:.* has no token for")


@unwarned
def test_ids_of_strings(ours, theirs):
    for text in strings():
        expected = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == expected, text
        for skip in (False, True):
            text = theirs.decode(
                expected, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
            assert ours.decode(expected, skip_special=skip) == text


CHATS = ["user", "system user", "user assistant", "system user assistant user"]


@unwarned
def test_ids_of_chats(ours, theirs):
    draw, texts = random.Random(1), [t for t in strings(400) if "<" not in t]
    for _ in range(100):
        roles = draw.choice(CHATS).split()
        chat = [{"role": role, "content": draw.choice(texts)} for role in roles]
        for prompt in (False, True):
            text = theirs.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
            assert ours.render(chat, prompt) == text
            expected = theirs.apply_chat_template(
                chat, add_generation_prompt=prompt, return_dict=True
            )
            assert ours.encode_chat(chat, prompt) == expected.input_ids


def test_special_ids(ours, theirs):
    assert ours.eos_id == theirs.eos_token_id
    assert ours.bos_id == theirs.bos_token_id
    assert ours.pad_id == theirs.pad_token_id
    config = json.loads((DIRECTORY / "config.json").read_text())
    assert ours.vocab_size == len(theirs) == config["vocab_size"]


@unwarned
def test_ids_of_the_tokenizer_that_transformers_makes_of_the_gguf(ours, gguf):
    """For text without digits, since transformers does not set each digit apart.

    It overlooks that the pre-tokenizer 'smollm' does.
    """
    theirs = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for text in strings(400, digits=False):
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text


def test_weights_equal_transformers_reading_of_the_gguf(gguf, monkeypatch):
    """Bit for bit, so the rows of q and k are in Hugging Face's order."""
    # The library asks for accelerate, which is not needed here.
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda: True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    ours = transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]


def test_the_likelihood_of_a_sentence_is_right(theirs):
    """With q and k left as GGUF has them it is about 0.7 nats worse, and answers stay plausible."""
    model = transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)
    said = "The capital of France is Paris, and the capital of Germany is Berlin."
    ids = theirs(said, return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(ids, labels=ids).loss.item() == pytest.approx(1.7154, abs=1e-3)
