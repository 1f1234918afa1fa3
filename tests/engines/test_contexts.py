"""Prompts against the contexts of the models, by their tokenizers. No model is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import edit, write_jsonl
from tests.fake_server import save_tokenizer
from tuneshift_dag import TuneshiftError
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.engines.contexts import check_examples, overlong

Edit = Callable[[str, Any], None]


@pytest.fixture
def small(transfer_folder: Path) -> Path:
    """A transfer of models that read bytes: contexts of 128 (source), 256 (target) and 512 (generator), of which a
    response takes 16, a held-out answer 32 and a call's answer 212. The template adds 3."""
    for name, context in (("source", 128), ("target", 256), ("writer", 512)):
        folder = transfer_folder / "models" / name / "tiny-base"
        shutil.copytree(transfer_folder / "models" / "tiny-base", folder)
        save_tokenizer(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": context}))
    edit(
        transfer_folder,
        {
            "source.base": "models/source/tiny-base",
            "target.base": "models/target/tiny-base",
            "generator": {"model": "models/writer/tiny-base", "max_new_tokens": 212, "seeds_per_call": 2},
            "prompt_template": "Q: {prompt}",
            "response": {"max_new_tokens": 16},
        },
    )
    write_jsonl(transfer_folder / "seeds.jsonl", [{"prompt": "a\nb"}, {"prompt": "c"}])
    return transfer_folder


def test_a_prompt_is_too_long_for_the_smallest_context(small: Path) -> None:
    is_overlong = overlong(load_transfer(small))
    assert [is_overlong("x" * n) for n in (92, 100, 101)] == [False, False, True], "a third of the generator's 300"
    edit(small, {"generator.server": {"base_url": "http://127.0.0.1:9/v1"}, "generator.model": "gpt"})
    is_overlong = overlong(load_transfer(small))
    assert [is_overlong("x" * n) for n in (109, 110)] == [False, True], "128 less 16 and the template"
    edit(small, {"source.base": "models/target/tiny-base"})
    assert not overlong(load_transfer(small))("x" * 237)
    assert overlong(load_transfer(small))("x" * 238)


def test_a_limit_in_tokens_or_characters_counts_too(small: Path) -> None:
    edit(small, {"generator.max_prompt_tokens": 20})
    is_overlong = overlong(load_transfer(small))
    assert [is_overlong(text) for text in ("x" * 20, "x" * 21, "我" * 6, "我" * 7)] == [False, True, False, True]
    edit(small, {"generator": {"model": "models/writer/tiny-base", "max_prompt_characters": 20}})
    is_overlong = overlong(load_transfer(small))
    assert [is_overlong(text) for text in ("我" * 20, "我" * 21)] == [False, True]


@pytest.mark.parametrize("folder", ["models/source/tiny-base", "adapter"])
def test_what_a_chat_template_writes_takes_room_too(small: Path, folder: str) -> None:
    template = "{{ 'x' * 40 }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (small / folder / "chat_template.jinja").write_text(template)
    edit(small, {"prompt_template": None, "source": {"base": "models/source/tiny-base", "adapter": "adapter"}})
    edit(small, {"source.prompt": "chat", "target.prompt": "{prompt}"})
    edit(small, {"generator.server": {"base_url": "http://127.0.0.1:9/v1"}, "generator.model": "gpt"})
    is_overlong = overlong(load_transfer(small))
    assert [is_overlong("x" * n) for n in (72, 73)] == [False, True], "128 less 16 and 40"


def test_where_long_texts_have_other_positions_prompts_stay_short(small: Path) -> None:
    """LongRoPE reads all rows of a batch as its longest one."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config = {"model_type": "phi3", "max_position_embeddings": 4096, "original_max_position_embeddings": 128}
    file = small / "models" / "source" / "tiny-base" / "config.json"
    file.write_text(json.dumps({**config, "rope_scaling": rope}))
    edit(small, {"generator.server": {"base_url": "http://127.0.0.1:9/v1"}, "generator.model": "gpt"})
    is_overlong = overlong(load_transfer(small))
    assert [is_overlong("x" * n) for n in (109, 110)] == [False, True]


def test_short_single_lines_have_the_limit_that_they_had(transfer_folder: Path) -> None:
    """The tokenizer of this folder can't be read: nobody needs it."""
    is_overlong = overlong(load_transfer(transfer_folder))
    assert [is_overlong("x" * n) for n in (300, 301)] == [False, True]


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("seeds.jsonl", {"prompt": "x" * 110}, ["seeds.jsonl:2: ", "113 tokens", "source.base", "128", "112", "16"]),
        (
            "heldout.jsonl",
            {"prompt": "x" * 94, "response": "y"},
            ["heldout.jsonl:2: ", "97 tokens", "evaluation", "96"],
        ),
    ],
)
def test_an_example_that_leaves_no_room_is_named_by_its_line(
    small: Path, name: str, row: dict[str, str], words: list[str]
) -> None:
    write_jsonl(small / name, [{"prompt": "a\nb" if name == "seeds.jsonl" else "d", "response": "y"}, row])
    with pytest.raises(TuneshiftError) as error:
        check_examples(load_transfer(small))
    for word in words:
        assert word in str(error.value)
    edit(small, {"response.max_new_tokens": 15, "evaluation": {"max_new_tokens": 31}})
    check_examples(load_transfer(small))


def test_seeds_that_leave_the_generator_no_room_are_refused(small: Path) -> None:
    edit(small, {"source.base": "models/target/tiny-base"})
    write_jsonl(small / "seeds.jsonl", [{"prompt": letter * 150} for letter in "abc"])
    with pytest.raises(TuneshiftError, match=r"generator.seeds_per_call: the 2 longest .* 301 tokens, .* 512.* 300 "):
        check_examples(load_transfer(small))
    edit(small, {"generator.max_new_tokens": 211})
    check_examples(load_transfer(small))
