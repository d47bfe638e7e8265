"""Model folders that people have, each with one peculiarity of published checkpoints.

Every command takes them, and transformers computes the same of them.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minibnf import chat, check, evaluate, generate, train
from minibnf.files.tokenizer import load_tokenizer
from minibnf.lab.smallworld import sampler
from minibnf.model import load
from tests.test_train import rows, write

ROOT = Path(__file__).parents[1]
TINY = ROOT / "weights" / "tiny"
EMBED = "model.embed_tokens.weight"
PAIR = {"prompt": "Red is", "chosen": " a colour.", "rejected": " a number."}
QUESTION = {"question": "How many are 40 and 2?", "answer": "#### 42"}


def folder_like_tiny(out, tensors=(), **fields):
    """weights/tiny in another folder, with other tensors and fields of config.json."""
    load_tokenizer(TINY).save(out)
    raw = json.loads((TINY / "config.json").read_text()) | fields
    (out / "config.json").write_text(json.dumps(raw))
    weights = load_file(TINY / "model.safetensors") | dict(tensors)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def frequencies(out):
    names = (f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(4))
    return folder_like_tiny(out, {name: torch.rand(16) for name in names})


def unknown_fields(out):
    return folder_like_tiny(out, unsloth_fixed=True, _model_name_or_path="x\x1b[2J", mlp_biases=3)


def token_without_a_row(out):
    embed = load_file(TINY / "model.safetensors")[EMBED]
    return folder_like_tiny(out, {EMBED: embed[:-1].clone()}, vocab_size=len(embed) - 1)


def loud_rows_without_a_token(out):
    """Eight rows more than tokens, of which one has the largest logit nearly everywhere."""
    embed = load_file(TINY / "model.safetensors")[EMBED]
    more = torch.zeros(8, embed.shape[1])
    for i in range(4):
        more[2 * i, i], more[2 * i + 1, i] = 1000, -1000
    return folder_like_tiny(out, {EMBED: torch.cat([embed, more])}, vocab_size=len(embed) + 8)


MAKERS = [frequencies, unknown_fields, token_without_a_row, loud_rows_without_a_token]


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__)
def folder(request, tmp_path):
    return request.param(tmp_path / "model")


def succeeds(main, *words):
    assert main([str(word) for word in words]) == 0


def test_every_command_takes_it_and_names_what_is_ignored_once(folder, tmp_path, capsys):
    cpu = ("--device", "cpu")
    pairs = write(tmp_path / "pairs.jsonl", [*rows(3), PAIR])
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": PAIR["prompt"]}])
    questions = write(tmp_path / "questions.jsonl", [QUESTION])
    raw = json.loads((folder / "config.json").read_text())
    added = [name for name in raw if name not in json.loads((TINY / "config.json").read_text())]

    def announced():
        lines = [line for line in capsys.readouterr().err.splitlines() if "ignored" in line]
        assert len(lines) == bool(added)
        assert all(repr(name) in line for line in lines for name in added)

    succeeds(check.main, folder)
    announced()
    run = ("--max-steps", 2, "--batch-size", 2, "--out", tmp_path / "run", *cpu)
    succeeds(train.main, "--model", folder, "--data", pairs, *run)
    announced()
    before_and_after = [folder, tmp_path / "run" / "model"]
    for model in before_and_after:
        asked = ("--data", prompts, "--samples", 4, "--max-new-tokens", 20, "--overwrite", *cpu)
        succeeds(generate.main, "--model", model, "--out", tmp_path / "out.jsonl", *asked)
        announced()
        assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4
        succeeds(evaluate.main, "--model", model, "--data", pairs, *cpu)
        announced()
        succeeds(evaluate.main, "--model", model, "--data", questions, *cpu)
        announced()
    assert sampler(load(folder), load_tokenizer(folder))(["Hi?"], 3, 0)
    side = chat.Side(str(folder), chat.parse(["--model", str(folder), *cpu]))
    announced()
    assert "".join(side.ask("Which city is Will's home?"))


def test_transformers_computes_the_same(folder):
    transformers = pytest.importorskip("transformers", reason="the parity extra is not installed")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(0, 671, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        # 1e-5 of the largest logit, which loud rows make a thousand times larger
        atol = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(load(folder)(tokens), expected, rtol=0, atol=atol)


# ------------------------------------------------------------------------ a token without a row


@pytest.mark.parametrize(
    "row, field",
    [
        (PAIR | {"rejected": " zzz"}, "rejected"),
        (PAIR | {"prompt": "zzz"}, "prompt"),
        (rows(1)[0] | {"chosen": [{"role": "assistant", "content": "zzz"}]}, "chosen"),
        (rows(1)[0] | {"prompt": [{"role": "user", "content": "zzz"}]}, "prompt"),
    ],
)
def test_a_row_that_needs_a_token_without_a_row_is_named(tmp_path, capsys, row, field):
    folder = token_without_a_row(tmp_path / "model")
    data = write(tmp_path / "rows.jsonl", [PAIR, row])
    token = "token 'z' has the id 671, and the model"
    command = ["--model", str(folder), "--data", str(data)]
    assert train.main([*command, "--out", str(tmp_path / "run"), "--device", "cpu"]) == 1
    assert f"{data}, line 2, field '{field}': {token}" in capsys.readouterr().err
    assert evaluate.main([*command, "--device", "cpu"]) == 1
    assert f"{data}, line 2, field '{field}': {token}" in capsys.readouterr().err


def test_a_prompt_that_needs_a_token_without_a_row_is_named(tmp_path, capsys, monkeypatch):
    folder = token_without_a_row(tmp_path / "model")
    data = write(tmp_path / "prompts.jsonl", [{"prompt": "Hi"}, {"prompt": "zzz"}])
    token = "token 'z' has the id 671, and the model"
    out = str(tmp_path / "out.jsonl")
    command = ["--model", str(folder), "--data", str(data), "--out", out, "--device", "cpu"]
    assert generate.main([*command, "--max-new-tokens", "9"]) == 1
    assert f"{data}, line 2, field 'prompt': {token}" in capsys.readouterr().err

    typed = iter(["zzz", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert chat.main(["--model", str(folder), "--device", "cpu"]) == 0
    assert f"error: {token}" in capsys.readouterr().out


def test_check_says_which_tokens_have_no_row(tmp_path, capsys):
    succeeds(check.main, token_without_a_row(tmp_path / "model"))
    said = capsys.readouterr().out
    assert "671 of them in tokenizer.model; data that needs one from id 671 on is refused" in said


def test_a_token_that_ends_texts_must_have_a_row(tmp_path):
    with pytest.raises(ValueError, match=r"token '<\|end\|>' has the id 2, .* only 2 rows"):
        load_tokenizer(folder_like_tiny(tmp_path / "model", vocab_size=2))


# ------------------------------------------------------------------------ rows without a token


def test_rows_without_a_token_would_win_and_are_never_chosen(tmp_path):
    folder = loud_rows_without_a_token(tmp_path / "model")
    model, tokenizer = load(folder), load_tokenizer(folder)
    ids = tokenizer.encode("Red is")
    (loud,) = generate.generate(model, [ids], max_new_tokens=4, temperature=0)
    assert max(loud) >= tokenizer.vocab_size == 672

    data = write(tmp_path / "prompts.jsonl", [{"prompt": "Red is"}, {"prompt": "Hi"}])
    command = ["--data", data, "--max-new-tokens", 9, "--chat"]
    out = tmp_path / "out.jsonl"

    def written(directory, *flags):
        how = ["--model", directory, "--out", out, "--overwrite", "--device", "cpu", *flags]
        succeeds(generate.main, *command, *how)
        return out.read_text()

    assert written(folder, "--temperature", "0") == written(TINY, "--temperature", "0")
    assert written(folder, "--top-p", "0.9") == written(TINY, "--top-p", "0.9")
