"""``tuneshift sweep --truth``: what each rule keeps against what is known to be true."""

import json
from pathlib import Path

import pytest

from tests.conftest import Project, Run, write_jsonl
from tests.fakes import CONFIDENT_PAIR
from tuneshift_dag import TuneshiftError
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.method.filters import RULES
from tuneshift_dag.method.prompting import prompt_id
from tuneshift_dag.reports.truth import sweep_truth
from tuneshift_dag.store import Store
from tuneshift_dag.store.tables import SCORED_PAIRS

# Perplexity of the fine-tuned response and truth: the surest are right, but for one that a wrong one is above.
SCORED = [(1.1, "right"), (1.2, "right"), (1.3, "wrong"), (1.4, "right"), (2.0, "off"), (3.0, "off"), (4.0, "wrong")]


@pytest.fixture
def transfer(transfer_folder: Path) -> Transfer:
    return load_transfer(transfer_folder)


@pytest.fixture
def file(store: Store, tmp_path: Path) -> Path:
    """Seven scored pairs, and a file that labels them and one more."""
    score(store, *({"ppl_fine_tuned": ppl} for ppl, _ in SCORED))
    labels = [{"prompt": f"Prompt {i}?", "truth": truth} for i, (_, truth) in enumerate(SCORED)]
    write_jsonl(tmp_path / "truth.jsonl", [*labels, {"prompt": "Never asked?", "truth": "right"}])
    return tmp_path / "truth.jsonl"


def score(store: Store, *pairs: dict) -> None:
    prompts = [f"Prompt {i}?" for i in range(len(pairs))]
    rows = [
        {
            **CONFIDENT_PAIR,
            "ppl_base": 9.0,
            "ppl_base_cross": 9.0,
            "prompt": prompt,
            "prompt_id": prompt_id(prompt),
            **p,
        }
        for prompt, p in zip(prompts, pairs, strict=True)
    ]
    store.replace("banking", SCORED_PAIRS, SCORED_PAIRS.frame(rows))


def test_precision_and_recall_count_right_responses_among_the_kept(store, transfer, file) -> None:
    (pool,) = sweep_truth(store, transfer, file, ["both"], [1.25, 1.5, 3.5])["pools"]
    assert {label: pool[label] for label in ("right", "wrong", "off")} == {"right": 3, "wrong": 2, "off": 2}
    strict, middle, loose = pool["cells"]
    assert (strict["kept"], strict["precision"], strict["recall"]) == (2, 1.0, pytest.approx(2 / 3))
    assert (middle["precision"], middle["recall"], middle["current"]) == (0.75, 1.0, True)
    assert (loose["right"], loose["wrong"], loose["off"], loose["precision"]) == (3, 1, 2, 0.5)
    assert strict["precision_low"] < 1 and strict["recall_low"] < 2 / 3 < strict["recall_high"]


def test_an_auc_is_of_the_margins_and_what_the_guards_drop_comes_last(store, transfer, file) -> None:
    (pool,) = sweep_truth(store, transfer, file)["pools"]
    found = {row["rule"]: row for row in pool["rules"]}
    assert list(found) == [rule for rule in RULES if rule != "seed_similarity"]
    # Of 3 · 4 pairs of a right one and another, one is in the wrong order.
    for rule in ("both", "ratio", "difference", "cross_ratio", "top_excess"):
        assert found[rule]["auc"] == pytest.approx(11 / 12), rule
    assert found["random"]["auc"] == found["unfiltered"]["auc"] == 0.5
    assert found["both"]["threshold"] == 1.5 and found["ratio"]["threshold"] is None
    assert found["ratio"]["low"] < 11 / 12 < found["ratio"]["high"] <= 1
    flawed = [{"ppl_fine_tuned": p} | ({} if p < 2 else {"fine_tuned_finish": "length"}) for p, _ in SCORED]
    score(store, *flawed)
    (pool,) = sweep_truth(store, transfer, file, ["random"])["pools"]
    assert pool["rules"][0]["auc"] == pytest.approx((3 * 3 + 3 * 0.5) / 12), "cut-off ones are below all others"


def test_pools_with_more_and_fewer_prompts_off_the_skill_are_drawn_from_it(store, transfer, tmp_path) -> None:
    score(store, *({"ppl_fine_tuned": 1.1 if i % 4 else 3.0} for i in range(80)))
    labels = [{"prompt": f"Prompt {i}?", "truth": "right" if i % 4 else "off"} for i in range(80)]
    write_jsonl(tmp_path / "truth.jsonl", labels)
    shares = [0.0, 0.25, 0.5, 0.75]
    found = sweep_truth(store, transfer, tmp_path / "truth.jsonl", ["top_excess", "random"], [0.5], off_skill=shares)
    assert [pool["off_skill"] for pool in found["pools"]] == pytest.approx([0.25, *shares], abs=0.01)
    assert [(pool["right"], pool["off"]) for pool in found["pools"]] == [(60, 20), (60, 0), (60, 20), (20, 20), (7, 20)]
    assert found["pools"][1]["rules"][0]["auc"] is None, "nothing to tell them from"
    # A rule that keeps half of the pairs keeps half of those drawn.
    halves = [cell["kept"] for pool in found["pools"] for cell in pool["cells"] if cell["rule"] == "top_excess"]
    assert halves == [40, 30, 40, 20, 14]
    again = sweep_truth(store, transfer, tmp_path / "truth.jsonl", ["top_excess", "random"], [0.5], off_skill=shares)
    assert again == found


def test_an_expected_response_says_whether_the_fine_tuned_one_is_right(store, transfer, tmp_path) -> None:
    score(store, *({"fine_tuned_response": text} for text in (" yes", " no", " yes")))
    rows = [("Prompt 0?", "yes"), ("Prompt 1?", "yes"), ("Prompt 2?", None)]
    write_jsonl(tmp_path / "t.jsonl", [{"prompt": prompt, "response": response} for prompt, response in rows])
    (tmp_path / "t.csv").write_text("response,prompt\n" + "".join(f"{r or ''},{p}\n" for p, r in rows))
    (tmp_path / "T.CSV").write_bytes((tmp_path / "t.csv").read_bytes())
    for name in ("t.jsonl", "t.csv", "T.CSV"):
        (pool,) = sweep_truth(store, transfer, tmp_path / name, ["both"])["pools"]
        assert (pool["right"], pool["wrong"], pool["off"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("t.jsonl", '{"prompt": "A?", "truth": "yes"}', ["t.jsonl:1", "'truth'", "right, wrong or off", "'yes'"]),
        ("t.jsonl", '\n{"prompt": "A?"}', ["t.jsonl:2", "neither 'truth' nor 'response'", "Write one"]),
        ("t.jsonl", '{"prompt": "A?", "truth": "off", "response": "x"}', ["t.jsonl:1", "both 'truth' and 'response'"]),
        ("t.jsonl", '{"prompt": "A?", "response": 3}', ["t.jsonl:1", "'response'", "found 3"]),
        ("t.jsonl", '{"prompt": "", "truth": "off"}', ["t.jsonl:1", "'prompt'", "non-empty"]),
        ("t.jsonl", '{"prompt": "A?", "truth": ["off"]}', ["t.jsonl:1", "'truth'", "['off']"]),
        ("t.jsonl", '{"prompt": "A?", "truth": "off"}\n{"prompt": "a?", "truth": "off"}', ["t.jsonl:2", "t.jsonl:1"]),
        ("t.jsonl", '{"prompt": "A?", "truth": "off"}', ["t.jsonl", "none of its 1 prompts", "banking"]),
        ("t.csv", "prompt,truth\nA?,\n", ["t.csv:2", "'truth'", "None"]),
        ("t.csv", "prompt,response\nA?,x\nB?\n", ["t.csv:3", "fewer cells", "comma"]),
        ("t.csv", "question,truth\nA?,off\n", ["t.csv", "'prompt'", "'question'"]),
        (".", None, ["is no file", "'truth'".replace("'", '"')]),
        ("absent.csv", None, ["absent.csv doesn't exist", "'truth'".replace("'", '"')]),
    ],
)
def test_a_bad_file_is_one_error_that_names_line_and_repair(
    store, transfer, tmp_path: Path, name: str, text: str | None, named: list[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(TuneshiftError) as error:
        sweep_truth(store, transfer, tmp_path / name)
    assert all(part in str(error.value) for part in named), error.value


def test_a_numeric_truth_must_hold_a_number(store, transfer_folder, edit_config, tmp_path) -> None:
    edit_config("evaluation.metric", "numeric")
    write_jsonl(transfer_folder / "heldout.jsonl", [{"prompt": "1 + 1?", "response": "2"}])
    write_jsonl(tmp_path / "t.jsonl", [{"prompt": "A?", "response": "two"}])
    with pytest.raises(TuneshiftError, match=r"t\.jsonl:1: 'response' gives no number \(found 'two'\)"):
        sweep_truth(store, load_transfer(transfer_folder), tmp_path / "t.jsonl")


@pytest.mark.parametrize("share", [1.0, -0.5, 0.25])
def test_a_share_that_can_t_be_drawn_is_named(store, transfer, file, share: float) -> None:
    write_jsonl(file, [{"prompt": "Prompt 0?", "truth": "right"}])
    with pytest.raises(
        TuneshiftError, match=rf"--off-skill {share:g} can't be drawn.* 1 are in the skill and 0 off it"
    ):
        sweep_truth(store, transfer, file, off_skill=[share])


def test_the_command_prints_pools_beside_one_another_and_what_it_could_not_judge(
    finished: Project, tuneshift: Run, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("TUNESHIFT_HOME", str(finished.store.path.parent))
    monkeypatch.setenv("TUNESHIFT_TRANSFERS", str(finished.folder.parent))
    prompts = [prompt for (prompt,) in finished.rows("SELECT DISTINCT prompt FROM scored_pairs ORDER BY prompt")]
    labels = ["right", "off", "wrong", "off"] * len(prompts)
    rows = [{"prompt": prompt, "truth": label} for prompt, label in zip(prompts[1:], labels, strict=False)]
    write_jsonl(tmp_path / "t.jsonl", [*rows, {"prompt": "Never asked?", "truth": "off"}])
    arguments = ("sweep", "banking", "--truth", str(tmp_path / "t.jsonl"), "--rule", "both", "--rule", "ratio")
    status, out, err = tuneshift(*arguments, "--off-skill", "0.25", "--off-skill", "0", "--json")
    found = json.loads(out)
    assert status == 0 and len(found["pools"]) == 3 and found["pairs_without_truth"] >= 1
    assert found["prompts_not_scored"] == 1
    status, out, err = tuneshift(*arguments, "--off-skill", "0")
    assert status == 0 and "AUC" in out and "* 1.5" in out and "0% off" in out
    assert "1 prompts of the file aren't scored pairs" in err and "scored pairs have no truth" in err
    picture = finished.store.path.parent / "output" / "banking" / "precision_recall.png"
    assert picture.is_file() and "precision_recall.png" in err
    status, _, err = tuneshift("sweep", "banking", "--off-skill", "0.5")
    assert status == 1 and "--off-skill needs --truth" in err


def test_a_rule_that_ranks_judges_all_pairs_also_those_without_a_truth(store, transfer, tmp_path) -> None:
    """Of six pairs the three with the highest perplexity of the base are kept; only two of them are labelled."""
    score(store, *({"ppl_base_cross": 9.0 - i} for i in range(6)))
    labels = {0: "right", 2: "wrong", 4: "right", 5: "off"}
    write_jsonl(tmp_path / "t.jsonl", [{"prompt": f"Prompt {i}?", "truth": truth} for i, truth in labels.items()])
    whole, drawn = sweep_truth(store, transfer, tmp_path / "t.jsonl", ["top_excess"], [0.5], [0.25])["pools"]
    assert [(cell["right"], cell["wrong"], cell["off"]) for cell in whole["cells"]] == [(1, 1, 0)]
    assert sum(whole[label] for label in ("right", "wrong", "off")) == 4
    assert [cell["kept"] for cell in drawn["cells"]] == [2], "a pool that is drawn is judged by itself"


def test_a_share_of_which_there_is_no_pair_is_refused(store, transfer, tmp_path) -> None:
    score(store, {}, {})
    rows = [{"prompt": "Prompt 0?", "truth": "right"}, {"prompt": "Prompt 1?", "truth": "off"}]
    write_jsonl(tmp_path / "t.jsonl", rows)
    assert len(sweep_truth(store, transfer, tmp_path / "t.jsonl", ["both"], off_skill=[0.5])["pools"]) == 2
    for share in (0.25, 0.9):
        with pytest.raises(TuneshiftError, match="can't be drawn"):
            sweep_truth(store, transfer, tmp_path / "t.jsonl", ["both"], off_skill=[share])
