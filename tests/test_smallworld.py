"""The small world: chains of thought are right, splits disjoint, the judge exact, files fixed."""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minibnf.files.tokenizer import load_tokenizer
from minibnf.lab import language
from minibnf.lab import smallworld as sw
from minibnf.model import load

seeds = st.integers(0, 2**32)
a_few = settings(max_examples=30, deadline=None)


def evaluate(expression: str) -> int:
    """5+7-3 by plain left-to-right reading, without Python's eval."""
    return sum(int(term) for term in re.findall(r"[+-]?\d+", expression))


# ---- Reasoning ----


@a_few
@given(seeds, st.sampled_from(language.REASONING), st.sampled_from(tuple(language.PEOPLE_OF)))
def test_every_equation_of_a_chain_is_right(seed, family, split):
    for problem in language.problems([family], split, 10, seed):
        chain, answer = problem.answer.split(". Answer: ")
        for equation in [] if family == "sort" else chain.split("; "):
            left, right = re.fullmatch(r"(\d+(?:[+-]\d+)+)=(\d+)(?: borrow)?", equation).groups()
            assert evaluate(left) == int(right), problem
        numbers = [int(number) for number in re.findall(r"\d+", problem.prompt)]
        if family == "add":
            assert int(answer) == sum(numbers)
        elif family == "sub":
            assert int(answer) == numbers[1] - numbers[0] > 0
        elif family == "word":
            start, *sizes = numbers
            verbs = re.findall(r"(\w+) \d+(?: and|\.)", problem.prompt)
            signs = [1 if verb in ("finds", "buys", "wins") else -1 for verb in verbs]
            first, second = (sign * size for sign, size in zip(signs, sizes, strict=True))
            assert int(answer) == start + first + second and start + first >= 0
        else:
            rest = re.search(r"\d+", problem.prompt)[0]
            assert 4 <= len(rest) <= 6 and list(answer) == sorted(rest)
            for step in chain.split("; "):
                least, remain = step.split("|")
                assert least == min(rest) and remain == rest.replace(least, "", 1)
                rest = remain
            assert len(rest) == 1


def test_chains_follow_from_column_to_column():
    """The docstrings' examples by hand: 475 + 447 with two carries, 532 - 147 with two borrows."""

    numbers = iter((475, 447))

    class Chosen:  # stands in for the random numbers
        randint = staticmethod(lambda low, high: next(numbers))
        sample = staticmethod(lambda population, k: [532, 147])
        choices = staticmethod(lambda population, k: list("7391"))

    assert language._add(Chosen) == ("Add 475 and 447.", "5+7+0=12; 7+4+1=12; 4+4+1=9. Answer: 922")
    chain = "12-7-0=5 borrow; 13-4-1=8 borrow; 5-1-1=3. Answer: 385"
    assert language._sub(Chosen) == ("Subtract 147 from 532.", chain)
    Chosen.randint = staticmethod(lambda low, high: 4)
    assert language._sort(Chosen) == ("Sort 7391.", "1|739; 3|79; 7|9. Answer: 1379")


@given(st.sampled_from(language.REASONING), seeds)
@a_few
def test_reasoning_is_scored_by_what_follows_the_last_answer(family, seed):
    problem = language.problems([family], "train", 1, seed)[0]
    truth = problem.answer.rpartition("Answer: ")[2]
    right = [problem.answer, f"Answer: {truth}", f"Answer: 0{truth}. Answer: {truth}"]
    assert {language.score(problem, text) for text in right} == {1}
    wrong = ["", truth, f"answer: {truth}", f"Answer: {truth}.", f"Answer: 0{truth}"]
    wrong.append(problem.answer + ". Answer: 00")
    assert {language.score(problem, text) for text in wrong} == {0}


# ---- QA and the judge ----


def test_the_judge_gives_each_style_its_score_and_no_text_has_two():
    assert len(language.QUESTIONS) == 24 * 5 * 2
    for question, (person, fact) in language.QUESTIONS.items():
        texts = language.grammar(person, fact)
        assert texts.keys() == language.SCORES.keys() == language.MIXTURE.keys()
        everything = [text for style in texts.values() for text in style]
        assert len(everything) == len(set(everything))
        scores = {style: {language.judge(question, t) for t in texts[style]} for style in texts}
        assert scores == {style: {score} for style, score in language.SCORES.items()}


@given(st.sampled_from(list(language.QUESTIONS)), st.text())
@example("How old is Zoe?", "Zoe is 0 years old.")
@a_few
def test_anything_outside_the_grammar_is_degenerate(question, text):
    texts = language.grammar(*language.QUESTIONS[question])
    assert language.judge(question, text) == 0 or any(text in style for style in texts.values())
    for answer in itertools.chain(*texts.values()):
        assert language.judge(question, answer) > 0
        assert language.judge(question, answer + "!") == 0
        assert language.judge(question, " " + answer) == 0


def test_the_styles_come_in_their_mixture():
    """4,000 answers: each style within four standard errors of its share, none degenerate."""
    rng, count = random.Random(0), 4000
    texts = language.grammar("Anna", "age")
    styles = {text: style for style, given in texts.items() for text in given}
    drawn = [styles[language.styled_answer("Anna", "age", rng)] for _ in range(count)]
    for style, percent in language.MIXTURE.items():
        share = percent / 100
        assert abs(drawn.count(style) / count - share) < 4 * (share * (1 - share) / count) ** 0.5


# ---- Long answers ----

ASKED = "Where does Zoe live? Which animal lives with Zoe? What is Zoe's job? "
ASKED += "What is Zoe's favourite colour? How old is Zoe?"


def parts(style):
    """The first text of each part of an answer to ASKED."""
    return [language.grammar(*fact, long=True)[style][0] for fact in language.asked(ASKED)]


def test_a_long_answer_is_worth_what_its_worst_part_is_worth():
    """Helpful but for one curt part 3, one wrong part 1; a part twice, left out, moved or cut 0.

    Refusing is worth 1, however often it is done, and 0 among answers.
    """
    assert language.asked(ASKED) == [("Zoe", fact) for fact in language.FACTS]
    for style, score in language.SCORES.items():
        if style != "refusing":
            assert language.judge(ASKED, " ".join(parts(style))) == score
    for sentences in (language.REFUSING, language.REFUSING * 4):
        assert language.judge(ASKED, " ".join(sentences)) == 1
    helpful = parts("helpful")
    assert language.judge(ASKED, " ".join([*helpful[:4], *language.REFUSING[:2]])) == 0
    for style in ("curt", "wrong"):
        mixed = [*helpful[:3], parts(style)[3], helpful[4]]
        assert language.judge(ASKED, " ".join(mixed)) == language.SCORES[style]
    swapped = [helpful[1], helpful[0], *helpful[2:]]
    for broken in (helpful + helpful[:1], helpful[:4], swapped, [*helpful[:4], helpful[4][:-1]]):
        assert language.judge(ASKED, " ".join(broken)) == 0
    whole = " ".join(helpful)
    assert {language.judge(ASKED, x) for x in ("", whole + " ", " " + whole)} == {0}


def test_long_answers_come_in_their_mixture_and_length_does_not_tell_a_style():
    """3,000 answers: each score within four standard errors of its share; the mean lengths of the
    scores lie within 2 tokens of 65."""
    rng, count = random.Random(0), 3000
    tokenizer = load_tokenizer("weights/tiny")
    lengths, longest = {score: [] for score in range(6)}, 0
    for _ in range(count):
        prompt = language.long_question(rng.choice(language.PEOPLE), rng)
        answer = language.long_answer(prompt, rng)
        tokens = len(tokenizer.encode(answer)) + 1
        lengths[language.judge(prompt, answer)].append(tokens)
        longest = max(longest, len(tokenizer.encode(prompt)) + 3 + tokens)
    assert not lengths.pop(0)
    for score, found in lengths.items():
        share = sum(language.MIXTURE[x] for x, s in language.SCORES.items() if s == score) / 100
        assert abs(len(found) / count - share) < 4 * (share * (1 - share) / count) ** 0.5
        assert abs(sum(found) / len(found) - 65) < 2
        assert max(found) <= sw.KINDS["long"][2]
    assert longest <= 256  # the model's context


def test_long_questions_ask_all_facts_of_one_person():
    drawn = language.problems(language.LONG, "train", 4000, 0)
    assert len({problem.prompt for problem in drawn}) == 16 * 2**5
    for problem, person in zip(drawn, itertools.cycle(language.PEOPLE_OF["train"]), strict=False):
        assert language.asked(problem.prompt) == [(person, fact) for fact in language.FACTS]
    assert {language.score(problem, problem.answer) for problem in drawn} == {5}


# ---- Splits and seeds ----


@given(st.lists(seeds, min_size=3, max_size=3))
@settings(max_examples=5, deadline=None)
def test_splits_are_disjoint_whatever_the_seeds(three):
    families = language.QA + language.LONG + language.REASONING
    prompts = [
        {problem.prompt for problem in language.problems(families, split, 600, seed)}
        for split, seed in zip(language.PEOPLE_OF, three, strict=True)
    ]
    for one, other in itertools.combinations(prompts, 2):
        assert not one & other
    rows = sw.pretrain_rows(2000, three[0])
    trained = {row["prompt"][0]["content"] for row in rows} - language.QUESTIONS.keys()
    assert trained and all(language.split_of(prompt) == "train" for prompt in trained)


def test_shares_of_the_splits():
    prompts = [f"Add {a} and {b}." for a in range(100, 200) for b in range(100, 200)]
    count = Counter(map(language.split_of, prompts))
    for split, share in {"train": 0.8, "validation": 0.1, "test": 0.1}.items():
        assert count[split] / len(prompts) == pytest.approx(share, abs=0.016)  # four errors
    assert [len(people) for people in language.PEOPLE_OF.values()] == [16, 4, 4]
    asked = {p.prompt for p in language.problems(language.QA, "test", 40, 7)}
    people = language.PEOPLE_OF["test"]
    assert asked == {q for q, (person, _) in language.QUESTIONS.items() if person in people}


def test_families_come_in_turn_and_seeds_matter():
    drawn = language.problems(["add", "qa:pet"], "train", 50, 0)
    assert [problem.family for problem in drawn] == ["add", "qa:pet"] * 25
    assert drawn == language.problems(["add", "qa:pet"], "train", 50, 0)
    assert drawn != language.problems(["add", "qa:pet"], "train", 50, 1)
    assert drawn[:10] == language.problems(["add", "qa:pet"], "train", 10, 0)


def test_the_same_in_every_process(tmp_path):
    def made(hash_seed):
        out = tmp_path / hash_seed
        code = "from minibnf.lab.smallworld import main; import sys; out = sys.argv[1]\n"
        code += "main(['base', '--out', out])\n"
        code += "main(['rows', '--count', '500', '--seed', '3', '--out', out + '/rows.jsonl'])"
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        subprocess.run([sys.executable, "-c", code, out], check=True, env=environment)
        return {path.name: path.read_bytes() for path in out.iterdir()}

    files = made("0")
    assert files == made("1")
    rows = [json.loads(line) for line in files["rows.jsonl"].splitlines()]
    assert rows == list(sw.pretrain_rows(500, 3))


# ---- Rows ----


def is_turn(messages, role):
    (message,) = messages
    return message.keys() == {"role", "content"} and message["role"] == role


def test_pretraining_rows():
    rows = list(sw.pretrain_rows(4000, 0))
    for row in rows:
        assert list(row) == ["prompt", "completion", "label"] and row["label"] is True
        assert is_turn(row["prompt"], "user") and is_turn(row["completion"], "assistant")
    about = [language.QUESTIONS.get(row["prompt"][0]["content"]) for row in rows]
    assert abs(sum(map(bool, about)) / len(rows) - 0.35) < 0.03  # four standard errors
    assert {person for person, _ in filter(None, about)} == set(language.PEOPLE)


def test_two_thirds_of_the_questions_may_have_long_answers():
    rows = list(sw.pretrain_rows(4000, 0, long=True))
    prompts = [row["prompt"][0]["content"] for row in rows]
    long = [prompt.count("?") == 5 for prompt in prompts]
    assert abs(sum(long) / len(rows) - 0.233) < 0.027  # four standard errors
    assert abs(sum(map(language.QUESTIONS.__contains__, prompts)) / len(rows) - 0.117) < 0.021
    about = {language.asked(p)[0][0] for p, is_long in zip(prompts, long, strict=True) if is_long}
    assert about == set(language.PEOPLE)


def imitate(prompts, n, seed):
    """A base in miniature: QA in the mixture of styles; reasoning right, spoilt or cut short."""
    rng = random.Random(seed)
    streams = [language.problems(language.REASONING, "train", 3000, s) for s in range(3)]
    known = {p.prompt: p.answer for p in itertools.chain(*streams)}

    def answer(prompt):
        if prompt in language.QUESTIONS:
            return language.styled_answer(*language.QUESTIONS[prompt], rng)
        if prompt.count("?") == 5:
            return language.long_answer(prompt, rng)
        right = known[prompt]
        return rng.choice((right, right[:-1] + "x", right[: rng.randrange(20)]))

    return [[answer(prompt) for _ in range(n)] for prompt in prompts]


@pytest.mark.parametrize("kind", ["qa", "math", "long"])
def test_pairs(kind):
    drawn = {}

    def sample(prompts, n, seed):
        answers = imitate(prompts, n, seed)
        for prompt, texts in zip(prompts, answers, strict=True):
            drawn.setdefault(prompt, []).append(texts)
        return answers

    rows = sw.pairs(kind, sample, 500, 0)
    assert len(rows) == 500 and rows == sw.pairs(kind, imitate, 500, 0)
    for row in rows:
        assert list(row) == ["prompt", "chosen", "rejected"] and is_turn(row["prompt"], "user")
        assert is_turn(row["chosen"], "assistant") and is_turn(row["rejected"], "assistant")
        prompt, chosen, rejected = (row[field][0]["content"] for field in row)
        if kind != "math":
            worst, best = language.judge(prompt, rejected), language.judge(prompt, chosen)
            scores = [sorted(language.judge(prompt, x) for x in texts) for texts in drawn[prompt]]
            assert worst < best and (worst, best) in [(x[0], x[-1]) for x in scores]
            assert language.asked(prompt)[0][0] in language.PEOPLE_OF["train"]
        else:
            texts = list(itertools.chain(*drawn[prompt]))
            truth = next(text for text in texts if re.search(r"Answer: \d+$", text))
            problem = language.Problem("add", prompt, truth)
            assert (language.score(problem, chosen), language.score(problem, rejected)) == (1, 0)
            assert language.split_of(prompt) == "train"
            nearest = min(sw.edit_distance(truth, text) for text in texts if text != truth)
            assert sw.edit_distance(chosen, rejected) == nearest


def test_a_base_that_leaves_nothing_to_prefer_is_an_error():
    for kind in sw.KINDS:
        with pytest.raises(ValueError, match="too few usable pairs"):
            sw.pairs(kind, lambda prompts, n, seed: [["no idea"] * n for _ in prompts], 10, 0)


@given(*[st.lists(st.sampled_from(["1", "2", "ab", "cd", " ", "+", ";"]), max_size=6)] * 2)
@a_few
def test_edit_distance_is_levenshtein(a, b):
    """Against the recursion that defines it; words are kept apart so that every piece stays one."""

    def one_word(pieces):
        words = [piece for piece in pieces if piece.isalpha()]
        return words[:1] + [piece for piece in pieces if not piece.isalpha()]

    a, b = one_word(a), one_word(b)

    def defined(a, b):
        if not a or not b:
            return len(a) + len(b)
        replaced = defined(a[1:], b[1:]) + (a[0] != b[0])
        return min(defined(a[1:], b) + 1, defined(a, b[1:]) + 1, replaced)

    assert sw.edit_distance("".join(a), "".join(b)) == defined(a, b)


def test_unpaired():
    rows = sw.pairs("qa", imitate, 3, 0)
    both = sw.unpaired(rows, "both")
    assert [row["label"] for row in both] == [True, False] * 3
    assert both[::2] == sw.unpaired(rows, "chosen") and both[1::2] == sw.unpaired(rows, "rejected")
    assert both[0] == {"prompt": rows[0]["prompt"], "completion": rows[0]["chosen"], "label": True}


# ---- The base model's folder ----


def test_the_base_folder(tmp_path):
    sw.write_base(tmp_path)
    config, tokenizer_config = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("config", "tokenizer_config")
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert tokenizer.vocab_size() == config["vocab_size"]
    assert [tokenizer.id_to_piece(i) for i in range(7)] == sw.SPECIAL
    end = tokenizer.id_to_piece(config["eos_token_id"])
    assert end == tokenizer_config["eos_token"] == "<|end|>"

    def ids_of(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not any(tokenizer.is_byte(i) or i < 7 for i in ids)
        pieces = map(tokenizer.id_to_piece, ids)
        assert all(len(piece) == 1 for piece in pieces if re.search(r"\d", piece))
        return ids

    lengths = []
    for row in sw.pretrain_rows(2000, 1):
        prompt, answer = (ids_of(row[field][0]["content"]) for field in ("prompt", "completion"))
        lengths.append((len(prompt) + 3, len(answer) + 1))  # with the chat's tokens
    assert max(prompt + answer for prompt, answer in lengths) <= 64
    assert 20 < sum(answer for _, answer in lengths) / len(lengths) < 30
    # Control tokens cannot be typed, and text the world has never seen goes through bytes.
    for text in ("<|end|>", "naïve\n 日本 \t  two  spaces ", " 12"):
        assert tokenizer.decode(tokenizer.encode(text)) == text and min(tokenizer.encode(text)) >= 7


def test_the_sampler_keeps_the_order():
    model, tokenizer = load("weights/tiny"), load_tokenizer("weights/tiny")
    sample = sw.sampler(model, tokenizer, temperature=0)
    prompts = ["How old is Zoe?", "Add 475 and 447.", "Which colour does Mira like best?"]
    alone = [sample([prompt], 1, 0)[0][0] for prompt in prompts]
    assert sample(prompts, 2, 0) == [[answer, answer] for answer in alone]
    assert len(set(alone)) == 3 and not any("<" in answer for answer in alone)


def test_samples_of_long_answers_may_be_longer(monkeypatch):
    limits = []

    def generated(model, prompts, *, max_new_tokens, **how):
        limits.append(max_new_tokens)
        return [[2] for _ in prompts]  # the end of the turn alone

    monkeypatch.setattr(sw, "generate", generated)
    for kind in ("qa", "long"):
        assert sw.sampler(None, load_tokenizer("weights/tiny"), kind)(["?"], 2, 0) == [["", ""]]
    assert limits == [64, 128]


def test_the_command_that_writes_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(sw, "load", Path)
    monkeypatch.setattr(sw, "load_tokenizer", Path)
    monkeypatch.setattr(sw, "sampler", lambda model, tokenizer, kind: imitate)
    out = tmp_path / "new" / "pairs.jsonl"
    words = f"pairs --model base --kind qa --count 5 --unpaired chosen --out {out}"
    assert sw.main(words.split()) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == sw.unpaired(sw.pairs("qa", imitate, 5, 0), "chosen")
    assert list(out.parent.iterdir()) == [out]
