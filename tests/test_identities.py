"""BNF's three identities, its bound and rbnf's potential by computer algebra: proven, not sampled.

One position with a vocabulary of three: y and two others. p, a, b > 0 are the policy's
probabilities (b = 1 - p - a), r the reference's of y. Below the reference is written p = r t with 0
< t < 1.
"""

import sympy as sp

p, a, r, t, s, n = sp.symbols("p a r t s n", positive=True)
x, y, z = sp.symbols("x y z", real=True)  # logits of y and of two other tokens


def odds(q):
    return q / (1 - q)


def zero(expression):
    return sp.simplify(expression) == 0


def softmax():
    total = sp.exp(x) + sp.exp(y) + sp.exp(z)
    return [sp.exp(v) / total for v in (x, y, z)]


def test_the_target_distribution_is_a_distribution():
    for q_y in (p / r, sp.Integer(1)):
        rest = (1 - q_y) / (1 - p)
        assert zero(q_y + rest * a + rest * (1 - p - a) - 1)


def test_identity_1_the_published_gradient_is_fine_tunings_with_a_weight():
    """∂/∂z_v of -(s/n) Σ_v q(v) log π(v), q held constant, is (s/n)(π_v - q_v); that it is -(s/n) w
    (1[v=y] - π_v), with w = o(p)/o(r) below the reference (q_y = p/r) and 1 above it (q_y = 1), in
    every logit."""
    pi = softmax()
    q = sp.symbols("q0:3")  # constants to the derivative: the stop-gradient
    loss = -(s / n) * sum(q_v * sp.log(pi_v) for q_v, pi_v in zip(q, pi, strict=True))
    for q_y, w in ((p / r, odds(p) / odds(r)), (sp.Integer(1), sp.Integer(1))):
        rest = (1 - q_y) / (1 - p)
        target = [q_y, rest * a, rest * (1 - p - a)]
        probabilities = [p, a, 1 - p - a]
        for v, logit in enumerate((x, y, z)):
            derivative = sp.simplify(sp.diff(loss, logit))
            for name, pi_v in zip((x, y, z), probabilities, strict=True):
                # softmax of log-probabilities is the probabilities
                derivative = derivative.subs(sp.exp(name), pi_v)
            derivative = derivative.subs(dict(zip(q, target, strict=True)))
            assert zero(derivative + (s / n) * w * ((1 if v == 0 else 0) - probabilities[v]))


def below(q):
    """Φ below the reference."""
    return sp.log(r) + (sp.log(1 - r) - sp.log(1 - q)) / odds(r)


def test_identity_2_the_potential_has_that_weight_as_its_slope_and_is_continuous():
    """dΦ/dlog p = p dΦ/dp: o(p)/o(r) below the reference and 1 above it; both branches meet at p =
    r, slopes too."""
    assert zero(p * sp.diff(below(p), p) - odds(p) / odds(r))
    assert zero(p * sp.diff(sp.log(p), p) - 1)
    assert zero(below(r) - sp.log(r))
    assert zero((odds(p) / odds(r)).subs(p, r) - 1)


def test_the_form_that_the_code_computes_is_the_same():
    """With u = 1 - p/r and E = expm1(-log r) = 1/o(r): Φ = log r - E log(1 + u/E), w = (p/r)/(1 +
    u/E)."""
    u, E = 1 - p / r, 1 / r - 1
    assert zero(E - 1 / odds(r))
    assert zero(1 + u / E - (1 - p) / (1 - r))
    assert zero((p / r) / (1 + u / E) - odds(p) / odds(r))


def test_identity_3_the_feedback_is_a_tent():
    """w (1 - p) is p (1-r)/r below the reference, rising from 0, and 1 - p above, falling to 0; its
    peak, at p = r, is 1 - r.

    The pushes on the other logits, w π_v, add up to the same number."""
    rising = odds(p) / odds(r) * (1 - p)
    assert zero(rising - p * (1 - r) / r)
    assert zero(sp.diff(rising, p) - (1 - r) / r)  # a straight line, and 0 < r < 1 makes it rise
    assert zero(rising.subs(p, r) - (1 - r)) and rising.subs(p, 0) == 0
    assert zero(odds(p) / odds(r) * (a + (1 - p - a)) - rising)


def test_from_the_reference_down_a_token_is_worth_at_most_a_nat():
    """Φ(r) - Φ(0) = -(1 - r) log(1 - r)/r. Its limits are 1 at r -> 0 and 0 at r -> 1, and in
    between it falls."""
    drop = below(r) - below(sp.Integer(0))
    assert zero(drop + (1 - r) * sp.log(1 - r) / r)
    assert sp.limit(drop, r, 0, "+") == 1 and sp.limit(drop, r, 1, "-") == 0
    # r² d(drop)/dr = log(1 - r) + r, which is 0 at r = 0 and has the derivative -r/(1 - r) < 0
    falling = sp.simplify(r**2 * sp.diff(drop, r))
    assert zero(falling - (sp.log(1 - r) + r)) and zero(sp.diff(falling, r) + r / (1 - r))


def test_rbnf_continues_with_slope_r_from_where_the_weight_is_r():
    """w(p*) = r at p* = r²/(1 - r + r²); with c = 1 - r + r², log p* = 2 log r - log c and Φ(p*) =
    log r + log(c)/o(r)."""
    star, c = r**2 / (1 - r + r**2), 1 - r + r**2
    assert zero(odds(star) / odds(r) - r)
    assert zero(star - r**2 / c) and zero(c - (1 - r * (1 - r)))
    assert zero((1 - r) / (1 - star) - c)  # so log(1 - r) - log(1 - p*) = log c
    continued = below(star) + r * (sp.log(p) - sp.log(star))
    assert zero(p * sp.diff(continued, p) - r)
    assert zero(continued.subs(p, star) - below(star))


def test_the_weight_family_has_these_potentials():
    """p dΦ/dp = w for topr below r, tnpo and power.

    topr's Φ joins log p at r, with its slope; power's tends to log p; below r BNF's ratio of odds
    is topr's ratio times (1 - r)/(1 - p)."""
    topr, tnpo = sp.log(r) + p / r - 1, 2 / n * sp.log(1 + (p / r) ** n)
    weights = {topr: p / r, tnpo: 2 * p**n / (p**n + r**n), (p**n - 1) / n: p**n}
    for potential, w in weights.items():
        assert zero(p * sp.diff(potential, p) - w)
    assert zero(topr.subs(p, r) - sp.log(r)) and zero((p / r).subs(p, r) - 1)
    assert zero(sp.limit((p**n - 1) / n, n, 0) - sp.log(p))
    assert zero(odds(p) / odds(r) - p / r * (1 - r) / (1 - p))
