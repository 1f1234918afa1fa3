import numpy as np
import pytest

from tuneshift_dag.method.statistics import (
    Mean,
    accuracy_of,
    auc,
    bootstrap_share,
    compared,
    holm,
    over_runs,
    prompts_needed,
    share_over_runs,
    wilson,
)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Examples of Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_an_accuracy_has_wilson_s_interval(right: int, n: int, low: float, high: float) -> None:
    found = accuracy_of([True] * right + [False] * (n - right))
    assert (found.value, found.n) == (right / n, n)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_no_prompts_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to take a share of"):
        accuracy_of([])


def test_a_share_is_never_outside_of_its_interval() -> None:
    for n in range(1, 400):
        for right in (0, 1, n - 1, n):
            found = wilson(right / n, n)
            assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(
    ("degrees", "level", "value"),
    # Any printed table of Student's t.
    [(1, 0.05, 12.706), (2, 0.05, 4.303), (2, 0.01, 9.925), (10, 0.05, 2.228), (120, 0.01, 2.617), (1e9, 0.05, 1.960)],
)
def test_few_degrees_of_freedom_have_wide_intervals(degrees: float, level: float, value: float) -> None:
    assert Mean(0.0, 1.0, degrees).quantile(level) == pytest.approx(value, abs=6e-4)
    assert Mean(value, 1.0, degrees).p_value() == pytest.approx(level, abs=1e-4)


def trained(rng: np.random.Generator, arms: int, runs: int, prompts: int, spread: float) -> list[np.ndarray]:
    """Which prompts each run of equally good arms answers right: tables (runs, prompts)."""
    difficulty = rng.normal(0.5, 1.5, prompts)
    found = []
    for _ in range(arms):
        own = difficulty + rng.normal(0, 0.5, prompts) + rng.normal(0, spread, (runs, 1))
        found.append((rng.random((runs, prompts)) < 1 / (1 + np.exp(-own))).astype(float))
    return found


@pytest.mark.parametrize(("runs", "spread"), [(3, 0.0), (3, 0.3), (3, 0.6), (5, 0.6)])
def test_the_interval_of_a_difference_holds_the_true_one_in_95_percent(runs: int, spread: float) -> None:
    """A bootstrap over runs and prompts held it in 88 % for 3 runs and a spread of 0.6."""
    rng, held = np.random.default_rng(25), []
    for _ in range(600):
        one, other = trained(rng, 2, runs, 231, spread)
        found = over_runs(one - other).interval()
        held.append(found.low <= 0 <= found.high)
    assert 0.92 <= np.mean(held) <= 0.975


def test_of_equal_arms_few_experiments_find_a_difference_after_the_correction() -> None:
    rng, found, uncorrected = np.random.default_rng(25), [], []
    arms = ["random", "a", "b", "c", "d", "e"]
    for _ in range(200):
        correct = dict(zip(arms, trained(rng, 6, 3, 231, 0.3), strict=True))
        rows = compared(correct, arms)
        found.append(any(not rows[arm]["vs_random_low"] <= 0 <= rows[arm]["vs_random_high"] for arm in arms[1:]))
        uncorrected.append(any(over_runs(correct[arm] - correct["random"]).p_value() < 0.05 for arm in arms[1:]))
    assert np.mean(found) <= 0.05 < 0.1 < np.mean(uncorrected)


def test_holm_tests_the_clearest_first_and_stops_at_the_first_that_holds_zero() -> None:
    means = {name: Mean(value, 1.0, 1e9) for name, value in {"a": 2.1, "b": 5.0, "c": 2.05}.items()}
    found = holm(means)
    assert found["b"] == means["b"].interval(0.05 / 3)
    # Alone, a and c would exclude zero; of the two that are left neither does.
    assert found["a"] == means["a"].interval(0.05 / 2) and found["c"] == means["c"].interval(0.05 / 2)
    assert means["c"].interval().low > 0 > found["c"].low
    clear = holm({**means, "a": Mean(3.0, 1.0, 1e9)})
    assert clear["c"] == means["c"].interval(0.05) and clear["c"].low > 0


def test_runs_that_differ_widen_the_interval_of_a_mean_and_stay_within_0_and_1() -> None:
    alike = np.tile([1.0] * 90 + [0.0] * 10, (3, 1))
    apart = alike.copy()
    apart[0], apart[1, 90:] = 0.0, 1.0
    assert share_over_runs(alike).low == pytest.approx(accuracy_of([True] * 90 + [False] * 10).low, abs=2e-3)
    wide = share_over_runs(apart)
    assert 0 <= wide.low < 0.3 and wide.high <= 1
    assert share_over_runs(np.ones((3, 20))).low == pytest.approx(0.8389, abs=1e-4), "all right isn't certain"
    assert vars(share_over_runs(alike[:1])).items() <= vars(accuracy_of([True] * 90 + [False] * 10)).items()


def test_equal_models_differ_by_nothing_and_the_untrained_are_not_compared() -> None:
    one, other = trained(np.random.default_rng(0), 2, 3, 50, 0.3)
    rows = compared({"both": one, "random": one, "top": other, "base": one[:1]}, ["both", "random", "top"])
    assert [rows["both"][f"vs_random{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]
    assert "vs_random" not in rows["random"] and rows["base"].keys() == {"value", "low", "high"}
    alone = compared({"random": one, "top": other}, ["random", "top"])
    assert rows["top"] == alone["top"], "the same model twice adds nothing to what is known of runs, and is no test"
    rows = compared({"both": np.ones_like(one), "random": one, "unfiltered": one}, ["both", "random", "unfiltered"])
    assert rows["both"]["vs_random_low"] > 0, "a finding, and no test is left"
    assert [rows["unfiltered"][f"vs_random{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]


def test_prompts_that_a_difference_needs() -> None:
    # 1.96 and 0.8416: (1.96 √0.2 + 0.8416 √(0.2 - 0.0009))² / 0.0009.
    assert prompts_needed(0.03, 0.2) == 1742
    assert prompts_needed(0.03, 0.1) < 900 < 6000 < prompts_needed(0.015, 0.2)
    assert prompts_needed(0.1, 0.0) == prompts_needed(0.1, 0.1), "as many as the difference itself are discordant"


def test_that_many_prompts_find_the_difference_in_four_of_five_experiments() -> None:
    rng, n = np.random.default_rng(0), prompts_needed(0.1, 0.3)
    found = []
    for _ in range(2000):
        better, worse, _same = rng.multinomial(n, [0.2, 0.1, 0.7])
        found.append(abs(better - worse) / (better + worse) ** 0.5 > 1.96)
    assert np.mean(found) == pytest.approx(0.8, abs=0.02)


def test_an_auc_counts_pairs_in_the_right_order_and_ties_half() -> None:
    positive, negative = np.array([3.0, 2.0, 2.0, -np.inf]), np.array([1.0, 2.0, -np.inf])
    order = [(p > n) + (p == n) / 2 for p in positive for n in negative]
    assert auc(positive, negative).value == pytest.approx(np.mean(order))
    assert auc(negative, positive).value == pytest.approx(1 - np.mean(order))


def test_the_variance_of_an_auc_is_delong_s() -> None:
    """By its definition, with all pairs; the interval is Wilson's with the number of pairs that has this variance."""
    rng = np.random.default_rng(3)
    positive, negative = rng.normal(1, 1, 40), rng.normal(0, 1, 60)
    wins = (positive[:, None] > negative).astype(float)
    variance = wins.mean(axis=1).var(ddof=1) / 40 + wins.mean(axis=0).var(ddof=1) / 60
    found = auc(positive, negative)
    n = found.value * (1 - found.value) / variance
    z = 1.959964
    middle = (found.value + z**2 / 2 / n) / (1 + z**2 / n)
    half = z * (variance + z**2 / 4 / n**2) ** 0.5 / (1 + z**2 / n)
    assert (found.low, found.high) == (pytest.approx(middle - half), pytest.approx(middle + half))


def test_the_interval_of_an_auc_holds_the_true_one_in_95_percent_and_of_a_perfect_one_isn_t_a_point() -> None:
    rng, held = np.random.default_rng(4), []
    for _ in range(1000):
        found = auc(rng.normal(0.9539, 1, 60), rng.normal(0, 1, 120))  # 0.75
        held.append(found.low <= 0.75 <= found.high)
    assert 0.93 <= np.mean(held) <= 0.97
    perfect = auc(np.array([3.0] * 20), np.array([1.0] * 30))
    assert (perfect.value, perfect.high) == (1, 1) and perfect.low == pytest.approx(0.839, abs=1e-3)


def test_many_resamples_are_those_of_one_call_in_little_memory() -> None:
    ours, theirs = ([i % 3 > 0 for i in range(40)], [i % 4 > 0 for i in range(40)])
    found = bootstrap_share(ours, theirs, 2500, 7)
    drawn = np.random.default_rng(7).multinomial(40, np.full(40, 1 / 40), 2500)
    shares = drawn @ np.array(ours, float) / (drawn @ np.array(theirs, float))
    assert found is not None and [found.low, found.high] == pytest.approx(list(np.percentile(shares, [2.5, 97.5])))


def test_a_share_is_of_the_other_model_s_accuracy_and_its_interval_is_paired():
    theirs = [True] * 80 + [False] * 20
    same = bootstrap_share(theirs, theirs, samples=2000, seed=0)
    assert (same.value, same.low, same.high) == (1, 1, 1), "the same answers have no spread"
    share = bootstrap_share([True] * 60 + [False] * 40, theirs, samples=5000, seed=0)
    assert share.value == 0.75
    # Of 80 answers that the other one has right, 60: 0.75 ± 1.96 · sqrt(0.75 · 0.25 / 80).
    assert share.low == pytest.approx(0.655, abs=0.015) and share.high == pytest.approx(0.845, abs=0.015)
    assert bootstrap_share([True] * 3, [False] * 3, samples=100, seed=0) is None
