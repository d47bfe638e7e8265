import pytest

from minibnf.data import Example, pack


@pytest.mark.parametrize("responses", [[[7, 8, 2], [9, 2]], [[5]], [[4, 4], [2], [6, 7, 8, 2]]])
def test_flatten_is_a_group_as_pack_makes_it(exercise, responses):
    prompt = [1, 3, 3]
    examples = [Example((1, 3, 3), (tuple(r),), (True,), 1) for r in responses]
    (batch,) = pack(examples, list(range(len(examples))), 64)
    wanted = batch.tokens[0], batch.positions[0], batch.predictors, batch.targets
    found = exercise.flatten(prompt, responses)
    slips = {
        "tokens": "is each response's last token left out? it is predicted and not read",
        "positions": "does every response go on from the prompt's end, not from the one before it?",
        "predictors": "is the prompt's last token the predictor of every response's first?",
        "targets": "are all tokens of a response predicted, its last one too?",
    }
    for (name, slip), mine, theirs in zip(slips.items(), found, wanted, strict=True):
        assert list(mine) == theirs.tolist(), f"{name}: {slip}"
    assert prompt == [1, 3, 3], "the prompt was changed in place: copy it first"


def says(*words):
    roles = ["user", "assistant"] * len(words)
    return [{"role": role, "content": word} for role, word in zip(roles, words, strict=False)]


def test_split_takes_the_longest_beginning(exercise):
    chosen = says("Hi", "Hello", "Bye", "See you")
    rejected = says("Hi", "Hello", "Bye", "No", "What?")
    prompt, *rests = exercise.split(chosen, rejected)
    assert prompt == chosen[:3], "the longest common beginning, of whole messages"
    assert rests == [chosen[3:], rejected[3:]], "what is left of chosen, then of rejected"


@pytest.mark.parametrize(
    "chosen, rejected", [(["a", "b"], ["c", "b"]), (["a", "b"], ["a"]), (["a"], ["a", "b"])]
)
def test_split_refuses_what_cannot_be_told(exercise, chosen, rejected):
    try:
        found = exercise.split(says(*chosen), says(*rejected))
    except ValueError:
        return
    slip = "they share no first message, or nothing is left of one: raise ValueError"
    pytest.fail(f"{chosen} and {rejected} gave {found}: {slip}")
