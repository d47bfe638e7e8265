"""Generation against the plain forward; sampling against the distribution; the command."""

import json
import random
import re
import shutil
from datetime import datetime

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minibnf import generate as module
from minibnf.files.config import parse_config
from minibnf.files.rows import Notes
from minibnf.files.tokenizer import load_tokenizer
from minibnf.generate import generate, main, stream
from minibnf.model import Transformer, load, save
from minibnf.sampling import Sampling, sample
from tests.strategies import FEW

# many of these share a beginning, or are equal
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=8)


@FEW
@given(
    prompts=st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=7), min_size=1, max_size=5)
)
def test_greedy_generation_with_the_cache_is_the_plain_forwards_argmax(tiny, prompts):
    """Prompts of different lengths, some repeated, in one batch: each as if alone, uncached."""
    prompts = [*prompts, prompts[0]]
    out = generate(tiny, prompts, max_new_tokens=6, temperature=0, stop_ids=[3])
    for prompt, new in zip(prompts, out, strict=True):
        text = list(prompt)
        while len(text) < len(prompt) + 6 and (len(text) == len(prompt) or text[-1] != 3):
            text.append(int(tiny(torch.tensor([text]))[0, -1].argmax()))
        assert text[len(prompt) :] == new


@FEW
@given(prompts=PROMPTS, vocab_size=st.integers(1, 120), top_p=st.sampled_from([1, 0.7]))
def test_no_id_from_vocab_size_on_is_chosen(tiny, prompts, vocab_size, top_p):
    """Greedy: the plain forward's argmax of what is left. A tokenizer may have more ids, too."""
    out = generate(tiny, prompts, max_new_tokens=3, temperature=0, vocab_size=vocab_size)
    for prompt, new in zip(prompts, out, strict=True):
        for k, token in enumerate(new):
            z = tiny(torch.tensor([[*prompt, *new[:k]]]))[0, -1]
            assert token == int(z[:vocab_size].argmax())
    how = {"max_new_tokens": 3, "temperature": 2, "top_p": top_p, "vocab_size": vocab_size}
    out = generate(tiny, prompts, **how)
    assert all(token < vocab_size for new in out for token in new)
    if vocab_size >= 97:
        assert out == generate(tiny, prompts, **how | {"vocab_size": None})


@FEW
@given(prompts=PROMPTS, how=st.sampled_from([(0, 1, 0), (1, 1, 0), (1, 0.7, 0), (1, 0.9, 3)]))
def test_streamed_alone_a_text_is_what_a_batch_gives(tiny, prompts, how):
    """What is read together is about speed alone; a row is known by its number."""
    how = dict(zip(("temperature", "top_p", "top_k"), how, strict=True))
    how |= {"max_new_tokens": 5, "seed": 3, "stop_ids": [3]}
    out = generate(tiny, prompts, **how)
    assert out == [list(stream(tiny, prompt, row=i, **how)) for i, prompt in enumerate(prompts)]
    assert generate(tiny, prompts[1:], first_row=1, **how) == out[1:]


def test_sampling_reproduces_and_does_not_depend_on_the_batch(tiny, monkeypatch):
    prompts = [[1, 2, 3], [4], [1, 2, 3], [5, 6]]
    first = generate(tiny, prompts, max_new_tokens=8, temperature=1.0, seed=1)
    assert first == generate(tiny, prompts, max_new_tokens=8, temperature=1.0, seed=1)
    assert first != generate(tiny, prompts, max_new_tokens=8, temperature=1.0, seed=2)
    assert first[0] != first[2]  # the same prompt, another row, another draw
    monkeypatch.setattr("minibnf.generate.CACHE_BYTES", 1)  # one row a turn
    assert first == generate(tiny, prompts, max_new_tokens=8, temperature=1.0, seed=1)


def test_sampling_frequencies_are_the_distribution():
    """Chi-squared with at most 9 degrees of freedom over 20,000 draws; 40 is beyond one in 10^5."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(10, generator=g)
    u = torch.rand(20000, generator=g)
    settings = [(1.0, 1.0, 0), (0.5, 1.0, 0), (1.0, 0.8, 0), (1.0, 1.0, 4), (1.0, 0.7, 4)]
    for temperature, top_p, top_k in settings:
        p = (logits / temperature).softmax(0)
        order = p.argsort(descending=True)[: top_k or 10]
        p[order] /= p[order].sum()
        kept = order[: int((p[order].cumsum(0) - p[order] < top_p).sum())]
        expected = torch.zeros(10)
        expected[kept] = p[kept] / p[kept].sum() * len(u)
        drawn = sample(logits.expand(len(u), -1), u, temperature, top_p, top_k)
        found = drawn.bincount(minlength=10)
        assert not found[expected == 0].any()
        some = expected > 0
        assert ((found - expected)[some] ** 2 / expected[some]).sum() < 40


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_a_draw_at_either_end_takes_a_token_of_the_nucleus(u):
    logits = torch.tensor([[0.0, 5.0, -torch.inf, 4.0]])
    assert sample(logits, torch.tensor([u]), 1.0, 1.0).item() in (0, 1, 3)
    assert sample(logits, torch.tensor([u]), 1.0, 0.5).item() == 1
    assert sample(logits, torch.tensor([u]), 1e-38).item() == 1  # the coldest is greedy


@pytest.mark.parametrize(
    "how, message",
    [
        ({"temperature": -1}, "temperature = -1: it must be 0"),
        ({"top_p": 0}, "top_p = 0: it must be above 0"),
        ({"top_k": -1}, "top_k = -1"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: it must be 1"),
    ],
)
def test_impossible_settings_of_generation(tiny, how, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny, [[1]], **{"max_new_tokens": 2, **how})
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(tiny, [[1], []], max_new_tokens=2)


@pytest.fixture
def shapes_read(tiny, monkeypatch):
    """The shape of the tokens of each forward of tiny."""
    shapes, forward = [], type(tiny).forward

    def noted(self, tokens, *rest, **options):
        shapes.append(tuple(tokens.shape))
        return forward(self, tokens, *rest, **options)

    monkeypatch.setattr(type(tiny), "forward", noted)
    return shapes


def test_equal_prompts_are_read_once(tiny, shapes_read):
    generate(tiny, [[1, 2, 3, 4, 5, 6]] * 7, max_new_tokens=1)
    generate(tiny, [[1, 2, 3], [4, 5], [1, 2, 3]], max_new_tokens=1)
    assert shapes_read == [(1, 6), (1, 2 + 3)]


def test_more_prompts_than_a_forward_takes_are_read_in_several(tiny, monkeypatch, shapes_read):
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10]]
    together = generate(tiny, prompts, max_new_tokens=4, seed=1)
    for tokens, read in {6: [(1, 6), (1, 4)], 1: [(1, 3), (1, 3), (1, 4)]}.items():
        monkeypatch.setattr("minibnf.generate.PREFILL_TOKENS", tokens)
        shapes_read.clear()
        assert generate(tiny, prompts, max_new_tokens=4, seed=1) == together
        assert shapes_read[: len(read)] == read


def test_rows_that_ended_are_no_longer_computed(tiny, shapes_read):
    prompts = [[i] for i in range(12)]
    first = [new[0] for new in generate(tiny, prompts, max_new_tokens=1, temperature=0)]
    shapes_read.clear()
    out = generate(tiny, prompts, max_new_tokens=4, temperature=0, stop_ids=first[:1])
    alive = [sum(len(new) > step for new in out) for step in (1, 2, 3)]
    assert [rows for rows, _ in shapes_read] == [1, *filter(None, alive)] and alive[0] < 12


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
def test_the_nucleus_does_not_depend_on_how_many_tokens_are_sorted(top_p):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 200, generator=g) * torch.rand(50, 1, generator=g) * 5
    u = torch.rand(50, generator=g)
    found = [sample(logits, u, 1.0, top_p, look=look).tolist() for look in (200, 8, 1)]
    assert found[0] == found[1] == found[2]


def test_a_row_among_others_draws_what_it_draws_alone_even_where_tokens_are_equally_probable():
    g = torch.Generator().manual_seed(0)
    logits, u = torch.randint(0, 3, (50, 200), generator=g).float(), torch.rand(50, generator=g)
    logits[::2] *= 9  # half have a small nucleus, half a wide one
    for top_p in (0.01, 0.3, 0.9):
        together = sample(logits, u, 1.0, top_p, look=8)
        for z, draw, token in zip(logits, u, together, strict=True):
            assert sample(z[None], draw[None], 1.0, top_p, look=8).item() == token


FAMILIES = {
    "llama3": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}},
    "mistral": {"model_type": "mistral", "sliding_window": 4},
    "gemma2": {"model_type": "gemma2", "sliding_window": 4, "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 4, "query_pre_attn_scalar": 8},
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4,
        "max_window_layers": 1},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_family_generates_as_its_plain_forward_does(family, kv_heads, monkeypatch):
    """Windows, soft caps, layers without positions: packed and cached, against sequences."""
    raw = FAMILIES[family] | {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": kv_heads, "head_dim": 8,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": 256,
    }  # fmt: skip
    model = Transformer(parse_config(raw, family), {}).init_weights(0).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.dim() > 1 else 1)
    rng = random.Random(1)
    prompts = [[rng.randrange(3) for _ in range(rng.randint(1, 14))] for _ in range(6)]
    prompts += [prompts[0], prompts[0] + [5], prompts[0] + [5, 6]]
    seen, choose = [], Sampling.choose
    monkeypatch.setattr(Sampling, "choose", lambda *of: seen.append(of[1]) or choose(*of))
    out = generate(model, prompts, max_new_tokens=6, temperature=0, stop_ids=[3])
    seen = torch.cat(seen)
    for prompt, new in zip(prompts, out, strict=True):
        for k, token in enumerate(new):
            text = prompt + new[:k]
            z = model(torch.tensor([text]))[0, -1]
            assert int(z.argmax()) == token
            assert torch.isclose(seen, z, rtol=1e-9, atol=1e-9).all(1).any()


# ------------------------------------------------------------------------------------ the command


CHATS = [
    {"prompt": "What is 3 + 4?"},
    {"prompt": [{"role": "user", "content": "Which city is Will's home?"}]},
    {"prompt": "Emma has 9 pens, drops 4 and finds 7. How many now?"},
]


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, CHATS)) + "\n")
    return file


def command(data, out, *flags):
    files = ["--model", "weights/tiny", "--data", str(data), "--out", str(out)]
    files += ["--device", "cpu"]
    return main([*files, "--max-new-tokens", "30", *flags])


def test_by_default_no_more_is_made_than_the_context_has_room_for(tmp_path):
    """weights/tiny reads 256 tokens, so 256 new ones would leave no room for any prompt."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "What pet does Vera have?"}\n')
    words = ["--model", "weights/tiny", "--data", tmp_path / "prompts.jsonl", "--device", "cpu"]
    words += ["--out", tmp_path / "out.jsonl", "--chat", "--temperature", "0"]
    assert main([str(word) for word in words]) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["finish"] == "stop"
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    asked = [{"role": "user", "content": "What pet does Vera have?"}]
    ids = load_tokenizer("weights/tiny").encode_chat(asked, add_generation_prompt=True)
    assert settings["max_new_tokens"] == 256 - len(ids)


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_file_of_prompts_becomes_a_file_of_completions(questions, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert command(questions, out, "--chat", "--top-k", "1", "--samples", "2") == 0
    assert "6 completions" in capsys.readouterr().out
    rows = rows_of(out)
    assert [row["line"] for row in rows] == [1, 1, 2, 2, 3, 3]
    assert [row["sample"] for row in rows] == [0, 1] * 3
    assert [row["prompt"] for row in rows[::2]] == [row["prompt"] for row in CHATS]
    (answer,) = rows[2]["completion"]
    assert answer["role"] == "assistant" and "Dublin" in answer["content"]
    assert rows[4]["completion"].endswith("Answer: 12") and rows[4]["finish"] == "stop"
    assert command(questions, tmp_path / "cut.jsonl", "--chat", "--max-new-tokens", "2") == 0
    assert {row["finish"] for row in rows_of(tmp_path / "cut.jsonl")} == {"length"}


def test_a_text_is_continued_as_it_stands_unless_asked_as_a_message(questions):
    tokenizer = load_tokenizer("weights/tiny")
    read = module.read_prompts(questions, tokenizer, False, Notes())
    assert read[0][1:] == (CHATS[0], tokenizer.encode(CHATS[0]["prompt"]))
    asked = [{"role": "user", "content": CHATS[0]["prompt"]}]
    as_chat = module.read_prompts(questions, tokenizer, True, Notes())
    assert as_chat[0][2] == tokenizer.encode_chat(asked, add_generation_prompt=True)


@pytest.mark.parametrize("kept", [0, 1, 3, 5, 6])
def test_interrupted_anywhere_and_resumed_it_writes_the_same_file(
    questions, tmp_path, kept, capsys
):
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    flags = ["--chat", "--samples", "2", "--batch-size", "2"]
    assert command(questions, whole, *flags) == 0
    assert command(questions, torn, *flags) == 0
    lines = torn.read_bytes().splitlines(keepends=True)
    torn.write_bytes(b"".join(lines[:kept]) + b'{"line": 9, "sam' * (kept < 6))
    assert command(questions, torn, *flags) == 1 and "--resume goes on" in capsys.readouterr().err
    assert command(questions, torn, *flags, "--resume", "--seed", "1") == 1
    assert "seed was 0 and is 1 now" in capsys.readouterr().err
    assert command(questions, torn, *flags, "--resume") == 0
    assert torn.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "?"}, "line 2: field 'prompt' is missing"),
        ({"prompt": ""}, "line 2: field 'prompt' is empty"),
        ({"prompt": 3}, "line 2: field 'prompt' must be text or a list of messages"),
        ({"prompt": [{"role": "user"}]}, "line 2: field 'prompt', message 1: needs text in 'role'"),
        ({"prompt": "word " * 2000}, "line 2: the prompt has .* tokens; with 30 new ones, more"),
    ],
)
def test_a_row_that_does_not_fit_is_named_before_anything_is_made(tmp_path, row, message, capsys):
    file, out = tmp_path / "bad.jsonl", tmp_path / "out.jsonl"
    file.write_text(json.dumps(CHATS[0]) + "\n" + json.dumps(row))
    assert command(file, out) == 1 and not out.exists()
    assert re.search(message, capsys.readouterr().err)


class NextYear(datetime):
    @classmethod
    def now(cls):
        return cls(2040, 1, 1)


def test_a_dated_template_is_resumed_with_the_date_of_the_first_run(
    questions, tmp_path, monkeypatch, capsys
):
    model, whole, torn = tmp_path / "model", tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    shutil.copytree("weights/tiny", model)
    template = json.loads((model / "tokenizer_config.json").read_text())["chat_template"]
    dated = "<|system|>{{ strftime_now('%d %B %Y') }}<|end|>" + template
    (model / "chat_template.jinja").write_text(dated)
    flags = ["--chat", "--batch-size", "1", "--model", str(model)]
    assert command(questions, whole, *flags) == 0
    assert command(questions, torn, *flags) == 0
    torn.write_bytes(torn.read_bytes().splitlines(keepends=True)[0])
    monkeypatch.setattr("minibnf.files.tokenizer.datetime", NextYear)
    assert command(questions, torn, *flags, "--resume") == 0
    assert torn.read_bytes() == whole.read_bytes()
    assert command(questions, torn, *flags, "--overwrite") == 0
    assert torn.read_bytes() != whole.read_bytes()


def test_the_file_holds_what_one_call_of_generate_gives(questions, tmp_path):
    """However it is split into batches; with every setting handed on."""
    out = tmp_path / "out.jsonl"
    flags = "--temperature 1.3 --top-k 7 --top-p 0.8 --seed 5 --samples 3 --batch-size 2"
    assert command(questions, out, "--chat", *flags.split()) == 0
    model, tokenizer = load("weights/tiny"), load_tokenizer("weights/tiny")
    read = module.read_prompts(questions, tokenizer, True, Notes())
    prompts = [ids for _, _, ids in read for _ in range(3)]
    how = {"max_new_tokens": 30, "temperature": 1.3, "top_k": 7, "top_p": 0.8, "seed": 5}
    expected = generate(model, prompts, stop_ids=tokenizer.end_ids, **how)
    for row, ids in zip(rows_of(out), expected, strict=True):
        answer = row["completion"]
        said = answer if isinstance(answer, str) else answer[0]["content"]
        whole = ids[:-1] if ids[-1] in tokenizer.end_ids else ids
        assert said == tokenizer.decode(whole, False)


def test_other_prompts_and_another_model_are_not_gone_on_with(questions, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert command(questions, out, "--chat") == 0
    other = tmp_path / "other"
    load_tokenizer("weights/tiny").save(other)
    model = load("weights/tiny")
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    save(model, other)
    assert command(questions, out, "--chat", "--resume", "--model", str(other)) == 1
    assert "model_sha256 was" in capsys.readouterr().err
    shutil.copyfile(questions, tmp_path / "more.jsonl")
    with open(tmp_path / "more.jsonl", "a") as more:
        more.write(json.dumps(CHATS[0]))
    assert command(tmp_path / "more.jsonl", out, "--chat", "--resume") == 1
    assert "prompts_sha256 was" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(questions, tmp_path / "twice.jsonl", "--samples", "2", "--temperature", "0")
    assert "would write the same answer 2 times" in capsys.readouterr().err


@pytest.mark.parametrize("temperature", ["0", "1"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, 3e38])
def test_weights_that_make_no_numbers_make_no_text(
    questions, tmp_path, capsys, number, temperature
):
    """Those that are not finite are named; those whose logits are not are said to be too large."""
    model = load("weights/tiny")
    with torch.no_grad():
        model.model.norm.weight.fill_(number)
    save(model, tmp_path / "model")
    load_tokenizer("weights/tiny").save(tmp_path / "model")
    flags = ["--chat", "--model", str(tmp_path / "model"), "--temperature", temperature]
    assert command(questions, tmp_path / "out.jsonl", *flags, "--top-p", "0.9") == 1
    said = capsys.readouterr().err
    whole = number == 3e38
    assert (
        "logits are not finite at new token 1" if whole else "'model.norm.weight' holds"
    ) in said
    assert said.count("\n") == 1


def test_a_tokenizer_with_more_tokens_than_the_model_generates_what_the_model_has(tmp_path, capsys):
    """A prompt that needs a token beyond the model's rows is one line that names it."""
    model, rows = load("weights/tiny"), 650
    beyond = load_tokenizer("weights/tiny").decode([660])
    model.model.embed_tokens.weight = torch.nn.Parameter(model.unembed[:rows].clone())
    model.raw = model.raw | {"vocab_size": rows}
    save(model, tmp_path / "model")
    load_tokenizer("weights/tiny").save(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model")]
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"prompt": f"a {beyond}"}))
    assert command(short, tmp_path / "out.jsonl", *flags, "--chat") == 1
    assert re.search("has the id .* only 650 rows: it cannot read", capsys.readouterr().err)
    short.write_text('{"prompt": "a"}\n')
    assert command(short, tmp_path / "out.jsonl", *flags, "--samples", "8") == 0
    assert len(rows_of(tmp_path / "out.jsonl")) == 8
