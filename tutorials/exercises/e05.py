"""Exercises of page 05, is it true?: fill in the bodies, then `make exercise N=05`."""


def win_rate(scores: list[float], base_scores: list[float]) -> float:
    """The probability that one of the scores, drawn at random, beats a drawn one of the base's; a
    tie counts half."""
    raise NotImplementedError


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (kept, gained) points that no other point beats, by falling kept; equal points all stay.

    Beaten: another is at least as good in both and better in one."""
    raise NotImplementedError
