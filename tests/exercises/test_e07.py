import pytest

from minibnf.data import Example, pack


@pytest.mark.parametrize("responses", [[[7, 8, 2], [9, 2]], [[5]], [[4, 4], [2], [6, 7, 8, 2]]])
def test_flatten_is_a_group_as_pack_makes_it(exercise, responses):
    prompt = [1, 3, 3]
    examples = [Example((1, 3, 3), (tuple(r),), (True,), 1) for r in responses]
    (batch,) = pack(examples, list(range(len(examples))), 64)
    wanted = batch.tokens[0], batch.positions[0], batch.predictors, batch.targets
    assert [list(x) for x in exercise.flatten(prompt, responses)] == [x.tolist() for x in wanted]
    assert prompt == [1, 3, 3], "the prompt was changed"


def says(*words):
    roles = ["user", "assistant"] * len(words)
    return [{"role": role, "content": word} for role, word in zip(roles, words, strict=False)]


def test_split_takes_the_longest_beginning(exercise):
    chosen = says("Hi", "Hello", "Bye", "See you")
    rejected = says("Hi", "Hello", "Bye", "No", "What?")
    assert exercise.split(chosen, rejected) == (chosen[:3], chosen[3:], rejected[3:])


@pytest.mark.parametrize(
    "chosen, rejected", [(["a", "b"], ["c", "b"]), (["a", "b"], ["a"]), (["a"], ["a", "b"])]
)
def test_split_refuses_what_cannot_be_told(exercise, chosen, rejected):
    with pytest.raises(ValueError):
        exercise.split(says(*chosen), says(*rejected))
