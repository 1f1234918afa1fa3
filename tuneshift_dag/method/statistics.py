"""Intervals: of one share, of means over trainings and prompts, of an AUC; and how many prompts show a difference."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

DIFFERENCE = 0.03
"""What `tuneshift compare` says the number of prompts for."""
DISCORDANCE = 0.2
"""Share of prompts that one of two trained models answers right and the other wrong, before any were compared."""
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Accuracy(Interval):
    """Share of correct ones of ``n`` responses."""

    n: int


def wilson(value: float, n: float, quantile: float = _NORMAL.inv_cdf(0.975)) -> Interval:
    """The score interval of a share of ``n`` (Wilson, JASA 22, 1927): of 20 right answers of 20 it is 0.84 to 1."""
    if n <= 0:
        raise ValueError("nothing to take a share of")
    squared = quantile**2 / n
    middle = (value + squared / 2) / (1 + squared)
    half = quantile * math.sqrt(value * (1 - value) / n + squared / (4 * n)) / (1 + squared)
    # At 0 and at 1 one end is the value itself, which rounding may miss.
    return Interval(value, max(0.0, min(value, middle - half)), min(1.0, max(value, middle + half)))


def accuracy_of(correct: Sequence[bool]) -> Accuracy:
    """Accuracy with Wilson's interval, for new prompts."""
    n = len(correct)
    return Accuracy(**vars(wilson(sum(correct) / n if n else 0.0, n)), n=n)


@dataclass(frozen=True)
class Mean:
    """A mean, its variance over new runs and new prompts, and the degrees of freedom of that."""

    value: float
    variance: float
    degrees: float

    def quantile(self, level: float = 0.05) -> float:
        """What a t distribution exceeds to either side with this probability."""
        return float(stdtrit(self.degrees, 1 - level / 2))

    def p_value(self) -> float:
        """Of the mean being zero, two-sided."""
        if self.variance == 0:
            return float(self.value == 0)
        return float(2 * stdtr(self.degrees, -abs(self.value) / math.sqrt(self.variance)))

    def interval(self, level: float = 0.05) -> Interval:
        half = self.quantile(level) * math.sqrt(self.variance)
        return Interval(self.value, self.value - half, self.value + half)


def over_runs(values: NDArray[np.float64], others: Sequence[NDArray[np.float64]] = ()) -> Mean:
    """Mean of a table (runs, prompts), with its variance for new runs *and* new prompts.

    Runs and prompts are crossed: each run answers every prompt. From the mean squares of runs, prompts and what is left
    (Cornfield & Tukey, Annals of Mathematical Statistics 27, 1956) the variance is (runs + prompts - left) / cells,
    with Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946), so three runs count as three. By chance that
    can fall below zero, so it is at least left / 2 / cells. A single run is a sample of prompts alone.

    ``values`` are for example 1 where a run answers a prompt correctly; for a paired comparison of two arms the
    differences of such tables, with the same seed in a row of both. How often the 95 % interval of such a difference
    held the true one, in 4,000 simulated comparisons each (`tests/method/test_statistics.py` repeats a part):

        runs   spread between runs (log-odds), 231 and 400 prompts
               0              0.3            0.6
          3    95.7, 95.4     93.7, 94.0     93.7, 94.5 %
          5    95.0, 95.2     95.2, 94.8     94.6, 94.4
         10    94.7, 94.9     94.8, 95.4     95.8, 94.8

    There arms are equal, prompts' difficulty spreads by 1.5 and an arm's part in it by 0.5. In 72 other settings (arms
    that differ, no such part, accuracies above 0.9; 2,000 each) it was 93.4 to 96.2 %.

    ``others`` are such differences of other arms from the same reference. Runs are taken to differ alike in all arms,
    as in an analysis of variance, so the mean square of runs is that of all tables: with five arms of three runs the
    intervals are half as wide, corrected ones. Two tables share the reference's runs, which correlates their squares by
    1/4; the degrees of freedom count that. In 1,000 experiments each with 1 to 5 equal arms, `holm` found a difference
    in 2 to 6 %; so it did where one arm's runs spread by 0.6 and the others' by 0.15, though 17 % of that arm's own
    uncorrected intervals were wrong.
    """
    runs, prompts = values.shape
    of_runs, of_prompts, left = _mean_squares(values)
    if runs == 1 or prompts == 1:
        return Mean(float(values.mean()), max(of_prompts, of_runs) / values.size, max(1, values.size - 1))
    # The same model twice says nothing of how runs differ.
    tables = [values, *(table for table in others if table.any())]
    of_runs = sum(_mean_squares(table)[0] for table in tables) / len(tables)
    combined = max(of_runs + of_prompts - left, left / 2)
    if not combined or not values.any():
        return Mean(float(values.mean()), 0.0, values.size)
    of_all = (runs - 1) * 4 * len(tables) / (len(tables) + 3)
    parts = of_runs**2 / of_all + of_prompts**2 / (prompts - 1) + left**2 / ((runs - 1) * (prompts - 1))
    return Mean(float(values.mean()), combined / values.size, max(1.0, combined**2 / parts))


def _mean_squares(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Of runs, of prompts, and of what is left."""
    runs, prompts = values.shape
    by_run, by_prompt = values.mean(axis=1), values.mean(axis=0)
    left = ((values - by_run[:, None] - by_prompt + values.mean()) ** 2).sum() / max(1, (runs - 1) * (prompts - 1))
    of_runs = prompts * by_run.var(ddof=1) if runs > 1 else 0.0
    return float(of_runs), float(runs * by_prompt.var(ddof=1) if prompts > 1 else 0.0), float(left)


def share_over_runs(correct: NDArray[np.float64]) -> Interval:
    """Accuracy over runs and prompts: Wilson's interval of as many answers as have the variance of `over_runs`, with
    its t quantile, as Korn & Graubard do for surveys (Survey Methodology 24, 1998). One run has the interval of
    `accuracy_of`.

    In the settings of `over_runs`, at accuracies of 0.6 and 0.9, it held the true one in 93 to 97 % of 1,500
    simulations each; of three runs in 91 to 97 %.
    """
    mean = over_runs(correct)
    if len(correct) == 1 or not mean.variance:
        return wilson(mean.value, correct.shape[1])
    return wilson(mean.value, min(correct.size, mean.value * (1 - mean.value) / mean.variance), mean.quantile())


def holm(means: Mapping[str, Mean]) -> dict[str, Interval]:
    """Each mean with its interval at the level at which Holm's procedure tests it (Scandinavian Journal of Statistics
    6, 1979): the clearest of m at 0.05 / m, the next at 0.05 / (m - 1) if that was found, and so on. The intervals that
    exclude zero are its findings: in 95 % of all experiments none of them is false, however many arms there are."""
    # A model that is the reference itself can't differ from it, so it is no test, and comes last.
    found, left = dict[str, Interval](), sum(mean.variance > 0 or mean.value != 0 for mean in means.values())
    for name, mean in sorted(means.items(), key=lambda item: item[1].p_value()):
        found[name] = mean.interval(0.05 / max(1, left))
        left -= not found[name].low <= 0 <= found[name].high
    return found


def compared(correct: Mapping[str, NDArray[np.float64]], arms: Collection[str]) -> dict[str, dict[str, float]]:
    """What the table ``comparison`` says of each model's accuracy and, of the ``arms``, of its differences, corrected
    by `holm` over all that are compared with one reference. ``correct`` are tables of `over_runs` by model."""
    rows = {name: dict(vars(share_over_runs(table))) for name, table in correct.items()}
    for reference in {"random", "unfiltered"} & rows.keys():
        tables = {arm: correct[arm] - correct[reference] for arm in arms if arm != reference}
        differences = {
            arm: over_runs(table, [other for name, other in tables.items() if name != arm])
            for arm, table in tables.items()
        }
        for arm, found in holm(differences).items():
            against = f"vs_{reference}"
            rows[arm] |= {against: found.value, f"{against}_low": found.low, f"{against}_high": found.high}
    return rows


def prompts_needed(difference: float, discordance: float) -> int:
    """Held-out prompts with which McNemar's test, two-sided at 5 %, finds a difference of two accuracies in 80 % of all
    experiments (Connor, Biometrics 43, 1987). ``discordance``: the share that just one of the two answers right."""
    discordance = max(discordance, difference)
    one, other = _NORMAL.inv_cdf(0.975), _NORMAL.inv_cdf(0.8)
    spread = one * math.sqrt(discordance) + other * math.sqrt(discordance - difference**2)
    return math.ceil((spread / difference) ** 2)


def auc(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> Interval:
    """How likely a positive has a higher score than a negative, ties counting half, with the variance of DeLong, DeLong
    & Clarke-Pearson (Biometrics 44, 1988), in Wilson's interval of as many pairs as have it: it stays within 0 and 1.

    Of normal scores, 30 to 300 on either side, it held the true AUC in 94 to 96 % of 2,000 simulations each for AUCs of
    0.5 to 0.9, in 91 to 94 % at 0.97 and in 90 to 97 % at 0.99."""
    above, below = _wins(positive, negative), _wins(negative, positive)
    value, fewest = float(above.mean()), min(len(positive), len(negative))
    variance = sum(float(wins.var(ddof=1)) / len(wins) for wins in (above, below)) if fewest > 1 else 0.0
    return wilson(value, value * (1 - value) / variance if variance else fewest)


def _wins(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each of our scores, the share of theirs that it is above."""
    ranked = np.sort(theirs)
    places = np.searchsorted(ranked, ours, "left") + np.searchsorted(ranked, ours, "right")
    return np.asarray(places / (2 * len(theirs)), np.float64)


def bootstrap_share(ours: Sequence[bool], theirs: Sequence[bool], samples: int, seed: int) -> Interval | None:
    """How much of another model's accuracy a model has, with the 2.5 and 97.5 percentiles over resamples of the prompts
    that both have answered; None when the other one answers none of them right."""
    if not any(theirs):
        return None
    pairs = np.array([ours, theirs], np.float64)
    rng, even = np.random.default_rng(seed), np.full(len(ours), 1 / len(ours))
    # Some at a time, for memory; the draws are those of one call.
    parts = [pairs @ rng.multinomial(len(ours), even, min(1000, samples - at)).T for at in range(0, samples, 1000)]
    of_ours, of_theirs = np.concatenate(parts, axis=1)
    shares = of_ours[of_theirs > 0] / of_theirs[of_theirs > 0]
    low, high = np.percentile(shares, [2.5, 97.5])
    return Interval(float(pairs[0].sum() / pairs[1].sum()), float(low), float(high))
