"""Statistics of times to an event of which some never came: curves, means, tests, effect sizes, intervals.

Small and exact, so that the benchmark needs no library of statistics; the tests hold published values.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from math import comb, erfc, exp, inf, log, sqrt
from random import Random


def kaplan_meier(times, cap):
    """(time, share that is still without the event) at each event; None in `times` is a trial that ran to `cap`."""
    events = sorted(time for time in times if time is not None and time <= cap)
    curve, alive, at_risk = [(0.0, 1.0)], 1.0, len(times)
    for time in events:
        alive *= (at_risk - 1) / at_risk
        at_risk -= 1
        curve.append((time, alive))
    return curve


def restricted_mean(times, cap):
    """The mean time without the event, up to `cap`: the area under the curve."""
    curve = [*kaplan_meier(times, cap), (cap, 0.0)]
    return sum(share * (later - time) for (time, share), (later, _) in pairwise(curve))


def a12(ours, theirs):
    """How often a time of `ours` is shorter than one of `theirs`; 0.5: no difference. Source: Vargha and Delaney."""
    return mann_whitney_u(theirs, ours) / (len(ours) * len(theirs))


def mann_whitney_u(first, second):
    """U of `first`: of how many pairs its time is the longer one, a tie is half; None is longer than any time."""
    score = 0.0
    for one in first:
        for other in second:
            left, right = (inf if time is None else time for time in (one, other))
            score += 1.0 if left > right else 0.5 if left == right else 0.0
    return score


def mann_whitney(first, second):
    """Two-sided p of U, exact: the share of all ways to deal the times out that are as far from the middle or farther.

    Ties have mid-ranks, so that trials without the event, which all tie, are counted as what they are.
    """
    n, m = len(first), len(second)
    pooled = sorted(inf if time is None else time for time in (*first, *second))
    ranks = {}  # doubled, so that halves are whole
    for time, count in Counter(pooled).items():
        below = sum(other < time for other in pooled)
        ranks[time] = 2 * below + count + 1
    ways = Counter({(0, 0): 1})
    for time in pooled:
        taken = Counter(ways)
        for (size, total), number in ways.items():
            if size < n:
                taken[size + 1, total + ranks[time]] += number
        ways = taken
    middle = n * (n + m + 1)
    seen = abs(sum(ranks[inf if time is None else time] for time in first) - middle)
    as_far = sum(number for (size, total), number in ways.items() if size == n and abs(total - middle) >= seen)
    return as_far / comb(n + m, n)


def log_rank(first, second):
    """(chi-square with one degree of freedom, p) of two samples; each is a list of (time, whether the event came).

    Source: Mantel 1966; Collett, Modelling Survival Data in Medical Research, 2.6.
    """
    difference = variance = 0.0
    for time in sorted({time for time, event in (*first, *second) if event}):
        risk, other_risk = (sum(other >= time for other, _ in sample) for sample in (first, second))
        died, other_died = (sum(event and other == time for other, event in sample) for sample in (first, second))
        risks, deaths = risk + other_risk, died + other_died
        difference += died - deaths * risk / risks
        if risks > 1:
            variance += deaths * risk * other_risk * (risks - deaths) / (risks**2 * (risks - 1))
    if not variance:
        return 0.0, 1.0
    chi_square = difference**2 / variance
    return chi_square, erfc(sqrt(chi_square / 2))


def censored(times, cap):
    """`times` as `log_rank` takes them: None ran to `cap` without the event."""
    return [(cap, False) if time is None else (time, True) for time in times]


def holm(values):
    """The p of several tests, adjusted together. Source: Holm 1979."""
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = highest
    return adjusted


def mean_ratio(pairs, cap, *, floor=0.01):
    """Geometric mean over bugs of restricted mean of `theirs` / of `ours`; times below `floor` seconds count as it."""
    ratios = [max(floor, restricted_mean(b, cap)) / max(floor, restricted_mean(a, cap)) for a, b in pairs]
    return exp(sum(map(log, ratios)) / len(ratios))


def bootstrap(pairs, cap, *, rounds=1000, seed=1):
    """The 95 % interval of `mean_ratio`, trials and bugs drawn again with replacement."""
    rng = Random(seed)
    found = []
    for _ in range(rounds):
        drawn = [pairs[rng.randrange(len(pairs))] for _ in pairs]
        found.append(mean_ratio([(rng.choices(a, k=len(a)), rng.choices(b, k=len(b))) for a, b in drawn], cap))
    found.sort()
    return found[int(0.025 * rounds)], found[int(0.975 * rounds)]
