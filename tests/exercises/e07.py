"""Exercises of page 07, packed tokens: the solutions."""


def flatten(prompt, responses):
    """One group: prompt, a list of ids, and responses, a list of such lists -> (tokens, positions,
    predictors, targets).

    tokens: what is read, the prompt, then each response less its last token; positions: of those,
    each response's go on from the prompt's end; predictors: for each response token, the index in
    tokens that predicts it; targets: that token."""
    n = len(prompt)
    tokens, positions, predictors, targets = [*prompt], [*range(n)], [], []
    for response in responses:
        read = response[:-1]
        predictors += [n - 1, *range(len(tokens), len(tokens) + len(read))]
        tokens += read
        positions += range(n, n + len(read))
        targets += response
    return tokens, positions, predictors, targets


def split(chosen, rejected):
    """Two lists of messages -> (prompt, rest of chosen, rest of rejected), the prompt being their
    longest common beginning.

    Raises ValueError if they share no message, or if nothing is left of one of them.
    """
    n = 0
    while n < min(len(chosen), len(rejected)) and chosen[n] == rejected[n]:
        n += 1
    if n in (0, len(chosen), len(rejected)):
        raise ValueError("the prompt cannot be told from the two conversations")
    return chosen[:n], chosen[n:], rejected[n:]
