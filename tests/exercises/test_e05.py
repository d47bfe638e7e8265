import random

import pytest


def test_win_rate_by_hand(exercise):
    found = exercise.win_rate([5, 3], [3, 4, 4])  # 5 wins against all three, 3 ties with one
    assert found == pytest.approx((3 + 0.5) / 6), "compare every answer with every one of the base"
    assert exercise.win_rate([2], [2, 2]) == 0.5, "a tie counts half"
    assert exercise.win_rate([0, 0, 0], [1]) == 0.0, "a loss counts nothing"


def test_frontier_by_hand(exercise):
    """Of three the last is beaten in both; one of two keeps as much and gains less."""
    points = [(0.7, 0.6), (0.9, 0.5), (0.8, 0.4)]
    found = [tuple(p) for p in exercise.frontier(points)]
    assert found == [(0.9, 0.5), (0.7, 0.6)], "beaten is who is beaten in both; by falling kept"
    found = [tuple(p) for p in exercise.frontier([(0.9, 0.5), (0.9, 0.6)])]
    assert found == [(0.9, 0.6)], "equal in one and better in the other beats too"
    assert exercise.frontier([]) == [], "no points have no frontier"


def test_frontier_leaves_out_what_is_beaten_and_nothing_else(exercise):
    draw = random.Random(1)
    for _ in range(50):
        numbers = [draw.randint(0, 4) / 4 for _ in range(2 * draw.randint(1, 8))]
        points = list(zip(numbers[::2], numbers[1::2], strict=True))
        found = [tuple(p) for p in exercise.frontier(points)]
        assert found == sorted(found, key=lambda p: -p[0]), "sort by falling kept"
        for p in points:
            beaten = any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)
            slip = (
                "a beaten point stays" if beaten else "equal points all stay, none beats its twin"
            )
            assert found.count(p) == (0 if beaten else points.count(p)), f"{p} of {points}: {slip}"
