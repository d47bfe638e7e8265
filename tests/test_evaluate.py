"""The evaluation's arithmetic by hand, and the whole of it on a random model."""

import pytest
import torch

from minibnf.checkpoint import fresh, save
from minibnf.evaluate import main, mean_and_error, read_responses, win_rates
from minibnf.smallworld import write_base
from minibnf.tokenizer import load_tokenizer
from tests.test_train import rows, write


def test_win_rates_by_hand():
    """Scores (5, 3) against (3, 1): 5 beats both, 3 ties once and wins once: (2 + 1.5)/4. And the other way round."""
    mine, theirs = torch.tensor([[5.0, 3.0], [0.0, 0.0]]), torch.tensor([[3.0, 1.0], [0.0, 4.0]])
    assert win_rates(mine, theirs).tolist() == [0.875, 0.25]
    torch.testing.assert_close(win_rates(theirs, mine), 1 - win_rates(mine, theirs))


def test_mean_and_standard_error():
    """(1, 3): mean 2, sample deviation sqrt(2), divided by sqrt(2)."""
    assert mean_and_error(torch.tensor([1.0, 3.0])) == (pytest.approx(2), pytest.approx(1))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "model"
    write_base(folder)
    save(fresh(folder, seed=0), folder)
    return folder


def test_what_is_read_of_a_preference_file_is_what_the_plain_forward_gives(model, tmp_path):
    net, tokenizer = fresh(model, seed=0), load_tokenizer(model)
    file = write(tmp_path / "pairs.jsonl", rows(3))
    sums, preferred, logits = read_responses(net, tokenizer, file, max_tokens=60)
    expected_sums, expected_logits = {True: [], False: []}, []
    for row in rows(3):
        for side in ("chosen", "rejected"):
            prompt, response = tokenizer.encode_response(row["prompt"], row[side])
            z = net(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1].detach()
            chosen = z.gather(1, torch.tensor(response)[:, None])[:, 0]
            expected_logits.append(chosen)
            expected_sums[side == "chosen"].append((chosen - z.logsumexp(1)).sum())
    for which in (True, False):
        torch.testing.assert_close(sums[preferred == which].sort().values, torch.stack(expected_sums[which]).sort().values)
    torch.testing.assert_close(logits.sort().values, torch.cat(expected_logits).sort().values, rtol=1e-4, atol=1e-5)


def test_a_model_against_itself(model, tmp_path, capsys):
    file = write(tmp_path / "pairs.jsonl", rows(3))
    assert main(["--base", str(model), "--model", str(model), "--pairs", str(file), "--samples", "2", "--count", "3"]) == 0
    text = capsys.readouterr().out
    for line in ("QA win rate against the base", "reasoning accuracy", "log-likelihood shift, chosen (nats)", "Gini"):
        (found,) = [row for row in text.splitlines() if row.startswith(line)]
        before, after = found[38:].split()[:2]
        assert before == after, found
    assert "before" in text and "after" in text


def test_a_missing_model_is_one_line(model, tmp_path, capsys):
    assert main(["--base", str(model), "--model", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
