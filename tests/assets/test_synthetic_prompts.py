"""What a round makes of a generator's answers: prompts of several lines, other scripts, copies of held-out prompts."""

from typing import Any

import dagster as dg
import pytest

from tests.conftest import Project, edit, write_jsonl
from tests.fake_engine import FakeEngine
from tests.fake_server import save_tokenizer
from tuneshift_dag.assets.filtered_dataset import judge

SEEDS = ["Fix:\n```python\nx = a_b[0]\n```", "Say:\n---\n  this"]
NEW = [f"Fix:\n```python\n    y = {number}\n\n---\n```" for number in range(4)]


class Writer(FakeEngine):
    """A generator that always gives the same answer; ``asked`` is what it was asked, and with which stops."""

    def __init__(self, answer: str) -> None:
        super().__init__("generator")
        self.answer = answer
        self.asked: list[tuple[str, str]] = []

    def generate(self, prompts: Any, side: Any, decoding: Any, seeds: Any = None) -> Any:
        self.asked += [("".join(map(chr, ids)), decoding.stops) for ids in prompts]
        return super().generate(prompts, side, decoding, seeds)

    def _list(self, request: str, seed: int) -> str:
        return self.answer


def grow(project: Project, answer: str, settings: dict[str, Any]) -> Writer:
    """Round 1 of the project, with a generator that gives this answer."""
    edit(project.folder, {"generator.max_new_tokens": 1000, **settings})
    project.models.generator = writer = Writer(answer)
    assert project.materialize("seed_set").success
    assert project.materialize("synthetic_prompts", round="round_01").success
    return writer


@pytest.mark.parametrize(
    ("settings", "answer", "shown", "stop"),
    [
        ({}, "\n".join(f"{n}. {text}" for n, text in enumerate(NEW, 1)), "----\n", ""),
        ({}, "\n----\n".join(NEW), "----\n", ""),
        ({"generator.format": "json"}, str(NEW), '"Say:\\n---\\n  this"', ""),
        ({"generator.mode": "continuation"}, "\n----\n".join(NEW), "----\n", ""),
        ({"generator.mode": "continuation", "generator.format": "json"}, f" {str(NEW)[1:]}", '  this"', "\n]"),
    ],
)
def test_prompts_keep_their_lines(project: Project, settings: Any, answer: str, shown: str, stop: str) -> None:
    write_jsonl(project.folder / "seeds.jsonl", [{"prompt": seed} for seed in SEEDS])
    writer = grow(project, answer, settings)
    assert all(shown in request and found == ((stop,) if stop else ()) for request, found in writer.asked)
    assert project.rows("SELECT prompt FROM synthetic_prompts ORDER BY proposal_id, position") == [(p,) for p in NEW]
    repeated = project.rows("SELECT reason, count(*) FROM rejected_prompts GROUP BY reason")
    assert repeated == [("duplicate", 2 * len(NEW))], "each of three calls gave the same answer"


def test_labelled_prompts_keep_their_lines(project: Project) -> None:
    write_jsonl(project.folder / "seeds.jsonl", [{"prompt": seed} for seed in SEEDS])
    settings = {"generator.mode": "by_response", "generator.prompts_per_call": 1}
    writer = grow(project, f" intent_1\nQuestion: {NEW[0]}\n----", settings)
    assert all(stop == ("\n----",) and "\n----\nTopic: intent_" in request for request, stop in writer.asked)
    assert project.rows("SELECT prompt FROM synthetic_prompts") == [(NEW[0],)]


@pytest.mark.parametrize(
    ("held_out", "copy", "other"),
    [
        ("我昨天给朋友转账，但是她说没有收到。", "我昨天给朋友转账但她说没有收到！", "我两周前申请的卡还没有收到。"),
        (
            "今朝のチャージが残高に反映されていません",
            "今朝のチャージが、残高に反映されてません",
            "海外でカードを使えますか",
        ),
        ("What is 12 + 5 in all?", "What's 12 + 5 in all?", "What is 12 + 7 in all?"),
    ],
)
def test_a_near_copy_of_a_held_out_prompt_is_dropped(project: Project, held_out: str, copy: str, other: str) -> None:
    write_jsonl(project.folder / "heldout.jsonl", [{"prompt": held_out, "response": "yes"}])
    grow(project, f"1. {held_out}\n2. {copy}\n3. {other}", {"generator.calls_per_round": 1})
    assert project.rows("SELECT prompt FROM synthetic_prompts") == [(other,)]
    reasons = project.rows("SELECT prompt, reason FROM rejected_prompts ORDER BY position")
    assert reasons == [(held_out, "held_out"), (copy, "near_duplicate")]


@pytest.mark.parametrize(
    ("settings", "repair"),
    [
        ({"generator.max_prompt_tokens": 20}, "raise generator.max_prompt_tokens (now 20)"),
        ({"generator.max_prompt_characters": 20}, "raise generator.max_prompt_characters (now 20)"),
        ({"response.max_new_tokens": 2040}, "lower response.max_new_tokens, or name models with longer contexts"),
    ],
)
def test_what_is_too_long_is_dropped_and_the_repair_named(
    project: Project, settings: dict[str, Any], repair: str
) -> None:
    save_tokenizer(project.folder / "models" / "tiny-base")
    write_jsonl(project.folder / "seeds.jsonl", [{"prompt": "a\nb"}])
    writer = grow(project, "---\nWhere is\nmy other card?\n---", {"prompt_template": "{prompt}", **settings})
    assert set(project.rows("SELECT reason FROM rejected_prompts")) == {("overlong",)}
    assert writer.asked
    assert project.materialize("scored_pairs", round="round_01").success
    with pytest.raises(dg.Failure) as failure:
        project.store.write("banking", lambda connection: judge(connection, project.transfer, "round_01"))
    assert repair in str(failure.value.description)
