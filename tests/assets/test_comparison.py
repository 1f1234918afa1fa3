"""``comparison`` in the graph with fake models."""

import polars as pl
import pytest

from tests.conftest import Project, write_jsonl
from tuneshift_dag import TuneshiftError
from tuneshift_dag.cli import rendering
from tuneshift_dag.models import encoder
from tuneshift_dag.reports import arm_tasks, conclusion, diversity, power, report
from tuneshift_dag.reports.export import model_card
from tuneshift_dag.store.cache import collect_plan
from tuneshift_dag.store.tables import COMPARISON


@pytest.fixture
def compared(project: Project, edit_config, quick_encoder) -> Project:
    project.run()
    edit_config("compare", {"arms": ["both", "top_excess"], "pairs": 8, "labelled": "labelled.jsonl", "epochs": 2})
    labelled = [{"prompt": f"Question {i}?", "response": f"intent_{i % 3}"} for i in range(9)]
    write_jsonl(project.folder / "labelled.jsonl", labelled)
    return project


def test_trains_every_arm_on_as_many_pairs_and_goes_on_after_a_failure(compared: Project, edit_config, capsys) -> None:
    current = compared.rows("SELECT model_id FROM distilled_models WHERE current")
    models = compared.models

    class Killed(Exception):
        pass

    class Few(list):
        def append(self, pairs) -> None:
            if len(self) == 5:
                raise Killed("killed")
            super().append(pairs)

    models.trained = Few(models.trained)
    with pytest.raises(TuneshiftError, match=r"comparison failed: .*killed"):
        compared.runner().compare()
    models.trained = list(models.trained)
    assert "takes 1,742 held-out prompts" in power(compared.store, compared.transfer)
    assert "heldout.jsonl has 1." in power(compared.store, compared.transfer)
    assert compared.runner().compare().materialized == [("comparison", None)]
    rows = {row["arm"]: row for row in report(compared.store, compared.transfer)["comparison"]}
    assert set(rows) == {
        "both", "top_excess", "random", "unfiltered", "oracle", "target_base", "source_fine_tuned",
    }  # fmt: skip
    assert all(len(pairs) == 8 for pairs in models.trained[1:])
    assert {rows[arm]["runs"] for arm in ("both", "top_excess", "random", "unfiltered", "oracle")} == {3}
    assert rows["random"]["shared_with_random"] == 1 and rows["oracle"]["shared_with_random"] == 0
    assert rows["random"]["vs_random"] is None and rows["target_base"]["vs_random"] is None
    assert rows["both"]["vs_random_low"] <= rows["both"]["vs_random"] <= rows["both"]["vs_random_high"]
    assert compared.rows("SELECT model_id FROM distilled_models WHERE current") == current
    oracle = [p for pairs in models.trained for p in pairs if p[0].startswith("Question")]
    assert oracle and all(response.startswith(" intent_") for _, response in oracle)
    figures = report(compared.store, compared.transfer)
    assert conclusion(figures["comparison"]) in model_card(compared.transfer, figures)
    for arm in ("both", "oracle"):
        varied = rows[arm]
        assert 0 < varied["distinct_bigrams"] <= 1 and varied["repetition"] == 0 and 0 < varied["similarity"] < 1
    assert rows["target_base"]["similarity"] is None
    assert f"| unfiltered | {rows['unfiltered']['distinct_responses']:.0f} |" in model_card(compared.transfer, figures)
    rendering.comparison(figures["comparison"])
    printed = capsys.readouterr().out
    assert "Held-out accuracy by filter" in printed and conclusion(figures["comparison"]) in printed
    assert "Diversity of the training pairs" in printed and "Standard tasks" not in printed
    table = compared.store.read("SELECT * FROM comparison", schema="banking")
    for row in table.to_dicts():
        assert {name: rows[row["arm"]][name] for name in row} == row, "what the asset stored is what is shown"
    former = table.with_columns(vs_random_low=pl.when(pl.col("vs_random").is_not_null()).then(-9.0))
    compared.store.replace("banking", COMPARISON, former)
    assert report(compared.store, compared.transfer)["comparison"] == figures["comparison"], "a store of before"
    calls = models.calls()
    assert compared.runner().compare().materialized == []
    assert models.calls() == calls
    assert compared.run().materialized == [], "`tuneshift run` trains no arm"
    edit_config("compare.seeds", 4)
    assert report(compared.store, compared.transfer)["comparison"] == [], "one of other settings"


@pytest.mark.parametrize(("pairs", "named"), [(10, "oracle"), (5000, "compare.pairs 5000")])
def test_too_many_pairs_name_the_arm_and_the_most(compared: Project, edit_config, pairs: int, named: str) -> None:
    edit_config("compare.pairs", pairs)
    with pytest.raises(TuneshiftError, match=r"lower compare\.pairs to at most \d+") as error:
        compared.runner().compare()
    assert named in str(error.value)
    assert len(compared.models.trained) == 1


def test_similarity_to_the_seeds_is_an_arm_like_the_others(project: Project, edit_config, quick_encoder) -> None:
    edit_config("compare", {"arms": ["both", "seed_similarity"], "pairs": 4, "seeds": 2, "epochs": 1})
    project.run()
    ranked = project.rows(
        "SELECT prompt FROM scored_pairs WHERE fine_tuned_finish = 'stop' ORDER BY seed_similarity DESC"
    )
    assert len(ranked) > 8 and project.rows("SELECT count(seed_similarity) = count(*) FROM scored_pairs") == [(True,)]
    project.models.trained.clear()
    project.runner().compare()
    trained = {frozenset(prompt for prompt, _ in pairs) for pairs in project.models.trained}
    assert frozenset(prompt for (prompt,) in ranked[:4]) in trained


def test_a_filter_that_ranks_is_compared_by_what_it_keeps(ran: Project, edit_config, quick_encoder) -> None:
    edit_config("filter", {"rule": "top_excess", "threshold": 0.25})
    edit_config("compare", {"seeds": 2, "epochs": 1})
    ran.runner().compare()
    pairs = dict(ran.rows("SELECT arm, pairs FROM comparison WHERE pairs > 0"))
    usable = ran.rows("SELECT count(DISTINCT prompt_id) FROM scored_pairs WHERE fine_tuned_finish = 'stop'")[0][0]
    assert set(pairs.values()) == {round(usable / 4)}
    edit_config("filter", {"rule": "unfiltered"})
    edit_config("compare", {"arms": ["seed_similarity"], "seeds": 2, "epochs": 1})
    ran.run()
    with pytest.raises(TuneshiftError, match=r"'seed_similarity' ranks pairs, and all \d+ .* compare.pairs .*fewer"):
        ran.runner().compare()


def test_what_is_out_of_date_is_not_compared(ran: Project, edit_config, quick_encoder) -> None:
    edit_config("compare", {"seeds": 2, "epochs": 1, "pairs": 4})
    for key, value, stale in (
        ("response.max_new_tokens", 13, "scored_pairs/round_01"),
        ("distill.retain.texts", 4, "rehearsal_set"),
    ):
        edit_config(key, value)
        with pytest.raises(TuneshiftError, match=rf"{stale}.* of today's settings .*`tuneshift run banking` first"):
            ran.runner().compare()
        result = ran.materialize("distilled_model")
        assert result.success == (stale != "rehearsal_set"), "not on texts of other settings"
        ran.run()
    edit_config("filter.threshold", 2.0)
    trained = len(ran.models.trained)
    assert ran.runner().compare().materialized == [("comparison", None)], "it judges all scored pairs itself"
    assert len(ran.models.trained) > trained


@pytest.fixture
def looped(ran: Project, edit_config, quick_encoder) -> Project:
    arms = ["both", {"rule": "seed_similarity", "threshold": 0.25}]
    edit_config("compare", {"arms": arms, "loop": True, "seeds": 2, "pairs": 2, "epochs": 1})
    return ran


def test_with_a_loop_every_arm_grows_rounds_of_its_own_and_goes_on_after_a_failure(looped: Project) -> None:
    def rows(loop: str, query: str) -> list:
        return looped.store.read(query, schema=loop).rows()

    models = looped.models
    generator, before, batches = models.generator, len(models.generator.answered), []

    def killed(number: int) -> None:
        batches.append(number)
        if len(batches) == 4:
            raise RuntimeError("killed")

    generator.on_batch = killed
    with pytest.raises(TuneshiftError, match=r"synthetic_prompts of round_0\d failed: .*killed"):
        looped.runner().compare()
    done = rows("banking__both_0", "SELECT count(*) FROM steps")
    looped.runner().compare()
    assert rows("banking__both_0", "SELECT count(*) FROM steps") == done == [(7,)], (
        "the seed set and two rounds of three"
    )
    names = [loop.name for loop in looped.transfer.loops.values()]
    assert len(names) == 8
    for name in names:
        calls = "SELECT round, count(*) FROM proposals GROUP BY round ORDER BY round"
        assert rows(name, calls) == [("round_01", 3), ("round_02", 3)], "as many generator calls"
        mine = "SELECT prompt_id FROM seed_set UNION SELECT prompt_id FROM filtered_dataset WHERE round = 'round_01'"
        assert set(rows(name, "SELECT prompt_id FROM round_seeds WHERE round = 'round_02'")) <= set(rows(name, mine))
    first = [set(rows(name, "SELECT prompt FROM synthetic_prompts WHERE round = 'round_01'")) for name in names]
    assert first[0] == first[1] == first[2] == first[3] != first[4] == first[7], "by seed, whatever the arm"
    # Round 1 is asked for once a seed, and all of `both` with the first seed was there from `tuneshift run`.
    assert len(generator.answered) - before <= 3 + 7 * 3
    kept = {name: rows(name, "SELECT count(*) FROM filtered_dataset")[0][0] for name in names}
    assert kept["banking__seed_similarity_0_25_0"] < kept["banking__random_0"] == kept["banking__unfiltered_0"]

    compared = {row["arm"]: row for row in report(looped.store, looped.transfer)["comparison"]}
    assert {"both", "seed_similarity 0.25", "random", "unfiltered", "target_base"} < set(compared)
    assert compared["random"]["runs"] == 2 and compared["random"]["pairs"] == 2
    assert compared["target_base"]["general_text"] == 1 and compared["source_fine_tuned"]["general_text"] is None
    assert compared["both"]["general_text"] > 0 and "general_text" in diversity(list(compared.values()))[0]
    calls = models.calls()
    assert looped.runner().compare().materialized == [] and models.calls() == calls
    assert looped.run().materialized == [], "`tuneshift run` has rounds of its own"
    assert collect_plan(looped.store, ["banking"]) == [], "they are in use"


def test_a_loop_makes_the_comparison_out_of_date_when_its_rounds_change(looped: Project, edit_config) -> None:
    edit_config("compare.arms", ["both"])
    edit_config("rounds", 1)
    looped.runner().compare()
    (before,) = looped.rows("SELECT inputs FROM materializations WHERE asset = 'comparison'")
    edit_config("generator.instruction", "Write {count} others like these {seed_count}:")
    assert ("comparison", None) in looped.runner().compare().materialized
    assert looped.rows("SELECT inputs FROM materializations WHERE asset = 'comparison'") != [before]


def test_an_arm_that_keeps_nothing_is_named(looped: Project, edit_config) -> None:
    edit_config("compare", {"arms": [{"rule": "ratio", "threshold": 500}], "loop": True, "seeds": 2})
    with pytest.raises(TuneshiftError, match=r"lower the threshold of ratio in compare.arms \(now 500\)"):
        looped.runner().compare()


def test_a_loop_that_wasn_t_run_is_named(looped: Project) -> None:
    result = looped.materialize("comparison")
    assert not result.success
    message = next(event for event in result.all_events if event.is_step_failure).step_failure_data
    assert "rounds of both_0 have kept nothing yet: `tuneshift compare banking`" in str(message.user_failure_data)


def test_without_the_section_says_what_to_add(project: Project) -> None:
    with pytest.raises(TuneshiftError, match=r"compare: missing\. Add `compare: \{\}`"):
        project.runner().compare()


def test_each_prompt_is_embedded_once_and_installing_the_encoder_adds_similarities(
    compared: Project, edit_config, quick_encoder, monkeypatch, capsys
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "missing_packages", lambda: "Run `pip install it`.")
        compared.runner().compare()
        rows = report(compared.store, compared.transfer)["comparison"]
        assert {row["similarity"] for row in rows} == {None}
        assert "similarity" not in diversity(rows)[0] and "distinct_bigrams" in diversity(rows)[0]
        assert metadata(compared)["similarity_skipped"].value == "Run `pip install it`."
        assert "similarity |" not in model_card(compared.transfer, report(compared.store, compared.transfer))
        rendering.comparison(rows)
        assert "Without similarity" in capsys.readouterr().err
        assert compared.runner().compare().materialized == []
    trained = len(compared.models.trained)
    assert compared.runner().compare().materialized == [("comparison", None)]
    assert len(compared.models.trained) == trained
    (embedded,) = quick_encoder
    assert len(set(embedded)) == len(embedded) > 8
    assert all(
        0 < float(row["similarity"]) < 1 for row in diversity(report(compared.store, compared.transfer)["comparison"])
    )
    assert "similarity_skipped" not in metadata(compared)


def metadata(project: Project):
    event = project.instance.get_latest_materialization_event(project.key("comparison"))
    return event.asset_materialization.metadata


def test_every_target_is_measured_on_standard_tasks_and_none_twice(asked, compared: Project, capsys) -> None:
    models = compared.models
    assert len(asked) == 4, "the target before and after, on two tasks"
    models.failing_task = "words"
    with pytest.raises(TuneshiftError, match=r"comparison failed: .*killed"):
        compared.runner().compare()
    assert len(asked) == 5
    models.failing_task = ""
    compared.runner().compare()
    # `random` and `unfiltered` may train the same model: it is measured once.
    adapters = {pairs for (pairs,) in compared.rows("SELECT model_id FROM distilled_models")}
    assert len(set(asked)) == len(asked) == 2 + 2 * len(adapters)
    rows = {row["arm"]: row for row in report(compared.store, compared.transfer)["comparison"]}
    for task in rows["both"]["tasks"]:
        assert (task["metric"], task["value"], task["by_run"], task["n"]) == ("acc", 0.5, [0.5] * 3, 3)
    assert [task["task"] for task in rows["both"]["tasks"]] == ["sums", "words"]
    assert [task["by_run"] for task in rows["target_base"]["tasks"]] == [[0.5]] * 2
    assert rows["source_fine_tuned"]["tasks"] == []
    assert arm_tasks(list(rows.values()))[0]["both"] == "0.500 (0.500 to 0.500)"
    figures = report(compared.store, compared.transfer)
    assert "| sums | acc | none | 3 | 0.500 (0.500 to 0.500) |" in model_card(compared.transfer, figures)
    rendering.comparison(figures["comparison"])
    assert "Standard tasks, mean over trainings" in capsys.readouterr().out
    assert {row["model"] for row in figures["tasks"]} == {"target_base", "target_distilled"}
    assert compared.run().materialized == [], "the evaluation's own scores are as they were"
