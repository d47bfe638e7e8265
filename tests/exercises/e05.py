"""Exercises of page 05, is it true?: the solutions."""


def win_rate(scores: list[float], base_scores: list[float]) -> float:
    points = [(x > y) + 0.5 * (x == y) for x in scores for y in base_scores]
    return sum(points) / len(points)


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    beats = lambda a, b: a[0] >= b[0] and a[1] >= b[1] and a != b
    return sorted((p for p in points if not any(beats(q, p) for q in points)), reverse=True)
