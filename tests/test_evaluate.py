"""The arithmetic of evaluate by hand and by other definitions; the command on a random model."""

import json
import math
from decimal import Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minibnf.data import Example, pair, read_examples
from minibnf.evaluate import (
    Figure,
    Measured,
    figures,
    interval,
    last_number,
    main,
    measure,
    paired_interval,
    per_token,
    table_of,
    task_of,
    tokenised,
)
from minibnf.feedback import target_logits
from minibnf.files.rows import scan_rows
from minibnf.files.tokenizer import load_tokenizer
from minibnf.lab.smallworld import write_base
from minibnf.model import fresh, save
from minibnf.step import read_responses
from tests.strategies import FEW, examples
from tests.test_train import rows, write


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "model"
    write_base(folder)
    save(fresh(folder, seed=0), folder)
    return folder


def test_what_is_read_of_a_preference_file_is_what_the_plain_forward_gives(model, tmp_path):
    net, tokenizer = fresh(model, seed=0), load_tokenizer(model)
    read, _ = read_examples(write(tmp_path / "pairs.jsonl", rows(3)), tokenizer, 256)
    logps = read_responses(net, read, max_tokens=60)
    logits = read_responses(net, read, read=target_logits)
    sides = [(row["prompt"], row[side]) for row in rows(3) for side in ("chosen", "rejected")]
    for (prompt, response), logp, logit in zip(sides, logps, logits, strict=True):
        prompt, response = tokenizer.encode_response(prompt, response)
        z = net(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1].detach()
        chosen = z.gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(logp, chosen - z.logsumexp(1))
        torch.testing.assert_close(logit, chosen, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------- intervals


def share(rows):
    return Figure(torch.tensor(rows).double(), share=True)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_holds_the_shares_that_the_score_test_does_not_reject(counts):
    """Its ends solve |share - p| = 1.96 sqrt(p (1 - p) / n)."""
    right, n = counts
    ends = interval(share([1.0] * right + [0.0] * (n - right)))
    low, high = ends
    assert 0 <= low <= right / n + 1e-12 and right / n <= high + 1e-12 and low < high <= 1
    for p in ends:
        assert (right / n - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n, abs=1e-9)


def test_the_interval_of_a_mean_by_hand():
    """(1, 3): 2 ± 1.96 sqrt(2) / sqrt(2); of one row nothing is known."""
    assert interval(Figure(torch.tensor([1.0, 3.0]))) == pytest.approx((0.04, 3.96))
    assert all(map(math.isnan, interval(Figure(torch.tensor([1.0])))))


def test_paired_intervals_by_hand():
    """10 rows, 3 won and 1 lost: cells 3.5 and 1.5 of 12, so 2/12 ± 1.96 sqrt(5 - 4/12) / 12.

    The same rows: 0 ± 1.96 / 12.
    """
    mine, theirs = share([1.0] * 8 + [0.0] * 2), share([0.0] * 3 + [1.0] * 5 + [1.0, 0.0])
    half = 1.96 * math.sqrt(5 - 4 / 12) / 12
    assert paired_interval(mine, theirs) == pytest.approx((2 / 12 - half, 2 / 12 + half))
    assert paired_interval(mine, mine) == pytest.approx((-1.96 / 12, 1.96 / 12))
    x, y = Figure(torch.tensor([1.0, 5.0, 3.0])), Figure(torch.tensor([0.0, 2.0, 2.0]))
    assert paired_interval(x, y) == interval(Figure(torch.tensor([1.0, 3.0, 1.0])))
    found = table_of({"x": x, "alone": x}, {"x": y})
    assert found["x"]["difference"] == pytest.approx(5 / 3)
    assert found["x"]["base"] == pytest.approx(4 / 3)
    assert "base" not in found["alone"]


LIKELIHOODS = st.lists(st.tuples(st.floats(-50, -0.01), st.integers(1, 9)), min_size=2, max_size=8)


@given(LIKELIHOODS)
def test_rows_of_a_ratio_and_of_a_perplexity_are_their_derivatives_in_each_rows_weight(drawn):
    """value + n d value / d weight, by autograd: so the interval is the delta method's."""
    sums, lengths = (torch.tensor(x).double() for x in zip(*drawn, strict=True))
    weights = torch.ones_like(sums, requires_grad=True)
    ratio = (weights * sums).sum() / (weights * lengths).sum()
    found = figures("likelihood", pretend([1] * len(drawn)), Measured(sums, lengths))
    pairs = [(per_token(sums, lengths), ratio), (found["perplexity"], (-ratio).exp())]
    for figure, value in pairs:
        (slope,) = torch.autograd.grad(value, weights, retain_graph=True)
        torch.testing.assert_close(figure.rows, value.detach() + len(drawn) * slope)
        assert figure.rows.mean().item() == pytest.approx(value.item())


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    "text, number",
    [
        ("He has 3 apples and 4 pears.", "4"), ("#### 42\nThe answer is: 42.", "42"),
        ("none", None), ("", None), ("-", None), ("$", None), ("٣", None), ("7 and ...", "7"),
        ("1,234,567.50", "1234567.5"), ("12,34", "34"), ("1,2345", "2345"),
        ("0.50", ".5"), (".5", "0.5"), ("5. So", "5"), ("-0", "0"), ("-4", "-4"),
        ("x=-4", "-4"), ("is -4.5!", "-4.5"), ("−4", "-4"), ("10-9", "9"), ("10 - 9", "9"),
        ("(2)-1", "1"), ("a-1", "1"), ("$5", "5"), ("-$5.20", "-5.2"), ("$-5", "-5"),
        ("3-$5", "5"), ("€1,000", "1000"), ("**-7**", "-7"), ("\\boxed{-12}", "-12"),
        ("50%", "50"), ("1/2", "2"), ("4th", "4"),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


@given(
    st.decimals(-(10**9), 10**9, places=2),
    st.sampled_from(["{}", "${}", "{} dollars.", "so {}."]),
    st.text("ab 12,.-$", max_size=9),
)
def test_the_last_number_is_read_however_it_is_written(value, form, before):
    spellings = [f"{value}", f"{value:,}", f"{value.normalize():f}"]
    for text in spellings:
        assert last_number(f"{before} = " + form.format(text)) == value


# ------------------------------------------------------------------------------------------ figures


def pretend(sizes, preferred=None):
    """Rows of so many responses each; the first is preferred unless said otherwise."""
    preferred = preferred or [0] * len(sizes)
    return [
        Example((1,), ((2,),) * n, tuple(k == right for k in range(n)), line)
        for line, (n, right) in enumerate(zip(sizes, preferred, strict=True), 1)
    ]


def doubles(*values):
    return torch.tensor(values).double()


def means(found):
    return {name: figure.rows.mean().item() for name, figure in found.items()}


def test_preference_by_hand():
    """Pairs (-2, -3) of 1 and 3 tokens and (-4, -4) of 2 and 1, a bad single response between."""
    two = pair((1,), (2,), (2,), 1)
    rows = [two, *pretend([1], [1]), two]
    now = Measured(doubles(-2, -3, -7, -4, -4), doubles(1, 3, 1, 2, 1))
    base = Measured(doubles(-1, -3, -7, -5, -4), now.lengths)
    found = means(figures("preference", rows, now, base))
    assert found == {
        "accuracy by log-likelihood": 0.75,  # won and tied
        "accuracy by log-likelihood / token": 0.5,  # -2 against -1, -2 against -4
        "accuracy by shift against the base": 0.5,  # -1 against 0, 1 against 0
        "chosen minus rejected (nats)": 0.5,
        "log-likelihood, chosen (nats)": -3,
        "log-likelihood, chosen (nats / token)": pytest.approx(-6 / 3),
        "log-likelihood, rejected (nats)": pytest.approx(-14 / 3),
        "log-likelihood, rejected (nats / token)": pytest.approx(-14 / 5),
    }


@FEW
@given(examples(), st.randoms(use_true_random=False), st.integers(16, 200))
def test_neither_the_order_of_rows_nor_how_many_are_read_at_once_matters(
    tiny, asked, random, max_tokens
):
    shuffled = random.sample(asked, len(asked))
    at_once, apart = measure(tiny, asked), measure(tiny, shuffled, max_tokens)
    one = figures("preference", asked, at_once, at_once)
    other = figures("preference", shuffled, apart, apart)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name].rows.sort().values, other[name].rows.sort().values)
        assert interval(one[name]) == pytest.approx(interval(other[name]), nan_ok=True)
    assert all(x["difference"] == 0 for x in table_of(one, one).values())  # a model against itself
    if any(example.pairs for example in asked):
        assert (one["accuracy by shift against the base"].rows == 0.5).all()


def test_equal_responses_tie_however_rounding_differs_between_their_places(tiny):
    for n in range(2, 12):
        rows = [pair((0,), (0,) * n, (0,) * n, 1), pair((0,), (0,), (0,) * 4, 2)]
        sums = measure(tiny, rows).sums
        assert sums[0] == sums[1], n


# --------------------------------------------------------------------------------- rows and command

QUESTION = {"question": "How many are 40 and 2?", "answer": "40+2=<<40+2=42>>42\n#### 42"}
GIVEN = {"prompt": "Red is", "completion": " a colour."}
CHOICE = {"question": "Which is red?", "choices": ["A poppy.", "The sea."], "answer": "A"}


@pytest.mark.parametrize(
    "row, task",
    [
        (rows(1)[0], "preference"),
        ({**GIVEN, "label": False}, "preference"),
        (GIVEN, "likelihood"),
        (QUESTION, "likelihood"),
    ],
)
def test_a_rows_fields_name_its_task(model, tmp_path, capsys, row, task):
    assert task_of(row, "here") == task
    file, out = write(tmp_path / "rows.jsonl", [row] * 3), tmp_path / "new" / "found.json"
    words = ["--model", model, "--base", model, "--data", file, "--limit", 2, "--out", out]
    words += ["--device", "cpu"]
    assert main(list(map(str, words))) == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text())
    assert found["settings"]["task"] == task and f"2 rows of {task}" in text
    assert len(found["settings"]["data_sha256"]) == 64
    if task == "likelihood":
        assert {"log-likelihood, given answer (nats)", "perplexity"} < set(found["figures"])
    assert ("accuracy by shift against the base" in found["figures"]) == ("chosen" in row)
    for name, x in found["figures"].items():
        assert x["rows"] in (2, 4) and x.get("difference", 0) == 0
        (line,) = [line for line in text.splitlines() if line[:44].strip() == name]
        assert f"{x['value']:.3f}" in line


def test_a_question_is_what_a_user_says_and_without_a_chat_template_plain_text(model, tmp_path):
    tokenizer, file = load_tokenizer(model), write(tmp_path / "a.jsonl", [QUESTION])

    def read():
        (row,) = tokenised(scan_rows(file), tokenizer, "likelihood")
        return [tokenizer.decode(ids, skip_special=False) for ids in (row.prompt, row.responses[0])]

    prompt, answer = read()
    assert prompt == f"<|user|>{QUESTION['question']}<|end|><|assistant|>"
    assert answer.endswith("#### 42<|end|>")
    tokenizer.source, tokenizer.begin = None, [tokenizer.bos_id]  # as the tokenizer begins a text
    prompt, answer = read()
    assert prompt == f"<s>Question: {QUESTION['question']}\nAnswer:"
    assert answer.startswith(" 40+2=")
    for field in QUESTION:
        write(file, [QUESTION | {field: "a<|end|>b"}])
        with pytest.raises(ValueError, match=f"'{field}' spells the control token '<.end.>'"):
            read()


def test_weights_too_large_for_a_number_are_an_error_and_no_figure(model, tmp_path, capsys):
    broken = fresh(model, seed=0)
    with torch.no_grad():
        broken.model.norm.weight.fill_(3e38)
    save(broken, tmp_path / "model")
    load_tokenizer(model).save(tmp_path / "model")
    data = write(tmp_path / "a.jsonl", [QUESTION])
    assert main(["--model", str(tmp_path / "model"), "--data", str(data), "--device", "cpu"]) == 1
    assert "log-probabilities in line 1 of the data are not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row, task, says",
    [
        ({"text": "a"}, "auto", "'text' fit no task"),
        (CHOICE, "auto", "lm-eval measures multiple choice"),
        (QUESTION | {"question": ""}, "auto", "'question'"),
        (QUESTION | {"answer": 42}, "auto", "'answer'"),
        ({**GIVEN, "completion": None}, "likelihood", "'completion'"),
        (GIVEN, "preference", "'label'"),
        ({"chosen": "a"}, "auto", "'rejected'"),
        ({"question": "a", "answer": "b" * 900}, "auto", "and the model reads 256"),
    ],
)
def test_a_row_that_does_not_fit_is_named(model, tmp_path, capsys, row, task, says):
    good = {"preference": rows(1)[0], "likelihood": GIVEN, "auto": None}[task]
    file = write(tmp_path / "rows.jsonl", [good, row] if good else [row])
    command = ["--model", str(model), "--data", str(file), "--device", "cpu"]
    assert main([*command, "--task", task]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    assert f"line {2 if good else 1}" in error and says in error


def test_max_tokens_bounds_what_is_read_at_once_and_one_row_has_no_interval(
    model, tmp_path, capsys
):
    file, out = write(tmp_path / "rows.jsonl", [GIVEN]), tmp_path / "o.json"
    command = ["--model", str(model), "--data", str(file), "--out", str(out), "--device", "cpu"]
    assert main([*command, "--max-tokens", "3"]) == 1
    assert "pass --max-tokens" in capsys.readouterr().err
    assert main(command) == 0
    found = json.loads(out.read_text(), parse_constant=pytest.fail)["figures"]
    assert found["perplexity"]["low"] is None and found["perplexity"]["value"] > 1


def test_a_base_that_reads_other_tokens_is_refused(model, tmp_path, capsys):
    write_base(tmp_path / "other", seed=1)
    save(fresh(tmp_path / "other", seed=0), tmp_path / "other")
    file = write(tmp_path / "pairs.jsonl", rows(2))
    command = ["--model", model, "--base", tmp_path / "other", "--data", file, "--device", "cpu"]
    assert main(list(map(str, command))) == 1
    assert "make different tokens of" in capsys.readouterr().err
