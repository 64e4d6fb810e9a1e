"""Statistics of times to an event of which some never came: Kaplan-Meier, restricted means, effect sizes, intervals."""

from __future__ import annotations

from itertools import pairwise
from math import exp, log
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
    score = 0.0
    for one in ours:
        for other in theirs:
            first, second = (float("inf") if time is None else time for time in (one, other))
            score += 1.0 if first < second else 0.5 if first == second else 0.0
    return score / (len(ours) * len(theirs))


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
