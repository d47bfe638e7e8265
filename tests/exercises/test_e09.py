import random

import pytest
import torch

from minibnf.lab.exam import win_rates


def test_win_rate_by_hand(exercise):
    assert exercise.win_rate([5, 3], [3, 4, 4]) == pytest.approx(
        (3 + 0.5) / 6
    )  # 5 beats all, 3 ties once
    assert exercise.win_rate([2], [2, 2]) == 0.5
    assert exercise.win_rate([0, 0, 0], [1]) == 0.0


def test_win_rate_is_the_library_s(exercise):
    draw = random.Random(0)
    for _ in range(20):
        mine, base = ([draw.randint(0, 5) for _ in range(draw.randint(1, 6))] for _ in "ab")
        (expected,) = win_rates(torch.tensor([mine]), torch.tensor([base])).tolist()
        assert exercise.win_rate(mine, base) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0.9, 0.5)], [(0.9, 0.5)]),
        (
            [(0.7, 0.6), (0.9, 0.5), (0.8, 0.4)],
            [(0.9, 0.5), (0.7, 0.6)],
        ),  # the last is beaten in both
        ([(0.9, 0.5), (0.9, 0.6)], [(0.9, 0.6)]),  # as much kept, less gained
        ([(0.9, 0.5), (0.8, 0.5)], [(0.9, 0.5)]),  # as much gained, less kept
        ([(0.9, 0.5), (0.9, 0.5)], [(0.9, 0.5), (0.9, 0.5)]),  # neither beats the other
        ([], []),
    ],
)
def test_frontier_by_hand(exercise, points, expected):
    assert [tuple(p) for p in exercise.frontier(points)] == expected


def test_frontier_leaves_out_what_is_beaten_and_nothing_else(exercise):
    draw = random.Random(1)
    for _ in range(50):
        points = [
            (draw.randint(0, 4) / 4, draw.randint(0, 4) / 4) for _ in range(draw.randint(1, 8))
        ]
        found = [tuple(p) for p in exercise.frontier(points)]
        assert found == sorted(found, key=lambda p: -p[0])
        for p in points:
            beaten = any(
                q[0] >= p[0] and q[1] >= p[1] and (q[0] > p[0] or q[1] > p[1]) for q in points
            )
            assert found.count(p) == (0 if beaten else points.count(p))
