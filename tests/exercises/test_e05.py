import random

import pytest


def test_win_rate_by_hand(exercise):
    assert exercise.win_rate([5, 3], [3, 4, 4]) == pytest.approx((3 + 0.5) / 6)  # 5 wins, 3 ties
    assert exercise.win_rate([2], [2, 2]) == 0.5
    assert exercise.win_rate([0, 0, 0], [1]) == 0.0


def test_frontier_by_hand(exercise):
    """Of three the last is beaten in both; one of two keeps as much and gains less."""
    points = [(0.7, 0.6), (0.9, 0.5), (0.8, 0.4)]
    assert [tuple(p) for p in exercise.frontier(points)] == [(0.9, 0.5), (0.7, 0.6)]
    assert [tuple(p) for p in exercise.frontier([(0.9, 0.5), (0.9, 0.6)])] == [(0.9, 0.6)]
    assert exercise.frontier([]) == []


def test_frontier_leaves_out_what_is_beaten_and_nothing_else(exercise):
    draw = random.Random(1)
    for _ in range(50):
        numbers = [draw.randint(0, 4) / 4 for _ in range(2 * draw.randint(1, 8))]
        points = list(zip(numbers[::2], numbers[1::2], strict=True))
        found = [tuple(p) for p in exercise.frontier(points)]
        assert found == sorted(found, key=lambda p: -p[0])
        for p in points:
            beaten = any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)
            assert found.count(p) == (0 if beaten else points.count(p))
