"""Exercises of page 07, packed tokens: fill in the bodies, then `make exercise N=07`."""


def flatten(prompt, responses):
    """One group: prompt, a list of ids, and responses, a list of such lists -> (tokens, positions,
    predictors, targets).

    tokens: what is read, the prompt, then each response less its last token; positions: of those,
    each response's go on from the prompt's end; predictors: for each response token, the index in
    tokens that predicts it; targets: that token."""
    raise NotImplementedError


def split(chosen, rejected):
    """Two lists of messages -> (prompt, rest of chosen, rest of rejected), the prompt being their
    longest common beginning.

    Raises ValueError if they share no message, or if nothing is left of one of them.
    """
    raise NotImplementedError
