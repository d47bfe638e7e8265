"""Exercises of page 00."""


def f(x):
    """Twice x."""
    return 2 * x
