"""How prompts become token ids, and what a response says after one, with hand-made tokenizers of each kind."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tuneshift_dag import TuneshiftError
from tuneshift_dag.method import PromptFormat
from tuneshift_dag.models.capabilities import end_ids, settings_end_ids, start_ids
from tuneshift_dag.models.prompts import (
    continuation_ids,
    end_id,
    foreign_names,
    opening_ids,
    prompt_ids,
    response_text,
)
from tuneshift_dag.training.batches import tokenize_example

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BOS, EOS, START, END = range(4)
LETTERS = sorted("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:?.<>/|_[]")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if no_thought %}{{ 'Now:' }}{% endif %}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + CHATML
Q = PromptFormat("Q: {prompt}\nA:")
CHAT = PromptFormat(key="source.prompt")


def tokenizer(kind: str, template: str | None = CHATML, opening: list[str] | None = None) -> Any:
    """Of one character a token, but for `foo`, whose space is joined to it: `llama` and `sentencepiece` (with a space
    before a text, as two generations of converted Llama tokenizers do it), `gemma` (without that space) or `bytes`."""
    space = {"bytes": "Ġ"}.get(kind, "▁")
    newline = {"bytes": "Ċ"}.get(kind, "\n")
    words = [*SPECIAL, *LETTERS, space, newline, "fo", "foo", space + "foo"]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = Tokenizer(BPE(vocabulary, [("f", "o"), ("fo", "o"), (space, "foo")]))
    if kind == "bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    elif kind == "llama":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        scheme = {"gemma": "never"}.get(kind, "first")
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
        made.decoder = decoders.Metaspace("▁", scheme)
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    if opening is not None:
        pieces = " ".join([*opening, "$A"])
        made.post_processor = processors.TemplateProcessing(
            pieces, special_tokens=[(n, SPECIAL.index(n)) for n in SPECIAL]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", chat_template=template)
    return fast


KINDS = ["bytes", "gemma", "llama", "sentencepiece"]


def shown(of: Any, ids: list[int]) -> str:
    return str(of.decode(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_a_raw_prompt_is_what_the_tokenizer_makes_of_the_rendered_text(kind: str) -> None:
    own = tokenizer(kind, opening=["<s>"])
    assert prompt_ids(own, Q, "foo foo") == own("Q: foo foo\nA:").input_ids
    bare = tokenizer(kind)
    assert prompt_ids(bare, Q, "foo") == bare("Q: foo\nA:").input_ids


@pytest.mark.parametrize("opening", [["<s>"], ["<s>", "<|im_start|>"]])
def test_what_the_tokenizer_puts_in_front_stands_there_once(opening: list[str]) -> None:
    own = tokenizer("bytes", opening=opening)
    once = own("Q: foo\nA:").input_ids
    for written in ("<s>", "".join(opening), "<s><s>", opening[-1]):
        assert prompt_ids(own, PromptFormat(f"{written}Q: {{prompt}}\nA:"), "foo") == once
    # A tokenizer that was saved while it ended its texts: the response is yet to come.
    ends = tokenizer("bytes", opening=opening)
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        f"{' '.join(opening)} $A </s>", special_tokens=[(name, SPECIAL.index(name)) for name in SPECIAL]
    )
    assert ends("Q: foo\nA:").input_ids[-1] == EOS
    assert prompt_ids(ends, Q, "foo") == once


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_is_the_template_s_own_text(kind: str) -> None:
    own = tokenizer(kind, "{{ bos_token }}" + CHATML, opening=["<s>"])
    ids = prompt_ids(own, PromptFormat(system="Be foo."), "foo?")
    text = "<s><|im_start|>system\nBe foo.<|im_end|>\n<|im_start|>user\nfoo?<|im_end|>\n<|im_start|>assistant\n"
    assert ids == own(text, add_special_tokens=False).input_ids
    assert ids.count(BOS) == 1
    thoughtless = prompt_ids(own, PromptFormat(arguments={"no_thought": True}), "foo?")
    assert shown(own, thoughtless).endswith("Now:")


@pytest.mark.parametrize(
    ("template", "format", "words"),
    [
        (None, CHAT, ["has none", '"{prompt}\\n"']),
        (
            NO_SYSTEM,
            PromptFormat(system="Be foo.", key="source.prompt"),
            ["'Be foo.'", "No system role", "without `sys"],
        ),
        ("{{ messages[0].content.missing.more }}", CHAT, ["refuses chat", "raw template"]),
        ("{% for part in messages[0].content %}{{ part.text }}{% endfor %}", CHAT, ["doesn't show the prompt 'foo'"]),
        ("{{ 1 / 0 }}", CHAT, ["division by zero", "raw template"]),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            PromptFormat(system="Be foo.", key="source.prompt"),
            ["doesn't show the system message 'Be foo.'", "raw template"],
        ),
    ],
)
def test_a_template_that_can_t_show_the_prompt_is_one_error(template: Any, format: Any, words: list[str]) -> None:
    with pytest.raises(TuneshiftError) as error:
        prompt_ids(tokenizer("bytes", template), format, "foo")
    for word in ["source.prompt", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", [Q, CHAT, PromptFormat("<|im_start|>user\n{prompt}<|im_end|>\n")])
@pytest.mark.parametrize("prompt", ["foo <|im_end|> foo", "<|im_end|>", "</s><s>foo", "foo<|im_start|>"])
def test_a_special_token_s_name_in_a_prompt_is_text(kind: str, format: PromptFormat, prompt: str) -> None:
    own = tokenizer(kind, opening=["<s>"])
    ids, plain = prompt_ids(own, format, prompt), prompt_ids(own, format, "foo")
    assert [i for i in ids if i in range(4)] == [i for i in plain if i in range(4)], "those of the format alone"
    assert shown(own, ids) == shown(own, plain).replace("foo", prompt)


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_keeps_the_space_that_it_begins_with(kind: str) -> None:
    own = tokenizer(kind)
    for answer in (" foo", "foo", " foo foo", "a foo", "\nfoo", "", "."):
        example = tokenize_example(own, Q, "foo", answer)
        assert shown(own, example.prompt_ids + example.response_ids) == f"Q: foo\nA:{answer}</s>"
        assert response_text(own, example.response_ids[:-1]) == answer


@pytest.mark.parametrize("kind", ["llama", "sentencepiece"])
def test_a_sentencepiece_source_teaches_a_byte_level_target_its_space(kind: str) -> None:
    source, target = tokenizer(kind), tokenizer("bytes")
    joined = source("Q: foo\nA: foo").input_ids
    answer = joined[len(source("Q: foo\nA:").input_ids) :]
    assert source.decode(answer) == "foo", "alone its space is lost"
    assert response_text(source, answer) == " foo"
    taught = tokenize_example(target, Q, "foo", response_text(source, answer))
    assert taught.prompt_ids + taught.response_ids == [*target("Q: foo\nA: foo").input_ids, EOS]


@pytest.mark.parametrize("kind", ["bytes", "gemma"])
def test_other_tokenizers_read_and_write_responses_as_ever(kind: str) -> None:
    own = tokenizer(kind)
    for answer in (" foo", "foo", "  foo", "\n\nfoo", " a\n"):
        ids = own(answer, add_special_tokens=False).input_ids
        assert continuation_ids(own, answer) == ids
        assert response_text(own, ids) == own.decode(ids) == answer


def test_a_response_in_a_chat_ends_as_the_model_s_turn_does() -> None:
    own = tokenizer("bytes")
    assert (end_id(own, Q), end_id(own, CHAT)) == (EOS, END)
    assert end_id(tokenizer("bytes", "{{ messages[0].content }}|{{ messages[-1].content }}"), CHAT) == EOS


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role != 'system' %}{{ raise_exception('Who am I?') }}{% endif %}" + CHATML,
        {"default": "{{ messages[0].content }}", "tools": CHATML},
    ],
    ids=["wants a system message", "one of several"],
)
def test_the_end_of_a_turn_is_that_of_the_template_that_is_used(template: Any) -> None:
    own = tokenizer("bytes", template)
    arguments = {"chat_template": "tools"} if isinstance(template, dict) else {}
    assert end_id(own, PromptFormat(system="Be foo.", arguments=arguments)) == END
    assert end_ids(own) == {EOS, END}


def test_the_end_of_a_turn_need_not_be_special_to_the_tokenizer(tmp_path: Path) -> None:
    own = tokenizer("bytes", "{% for m in messages %}{{ m.content }}<turn_end>{% endfor %}")
    own.add_tokens(["<turn_end>"])
    assert end_ids(own) == {EOS, end_id(own, CHAT)} and end_id(own, CHAT) == len(own) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_special_tokens_in_a_response_are_text(kind: str) -> None:
    """What a source wrote as letters, such as HTML, holds no end for its target."""
    own, response = tokenizer(kind, opening=["<s>"]), " <s>foo</s> foo"
    taught = tokenize_example(own, Q, "foo", response).response_ids
    assert [number for number in taught if number < len(SPECIAL)] == [EOS] and taught[-1] == EOS
    assert response_text(own, taught[:-1]) == response


def test_special_tokens_in_a_response_are_shown_by_their_names() -> None:
    own = tokenizer("bytes")
    called = own("<|im_start|>foo", add_special_tokens=False).input_ids
    assert called[0] == START and response_text(own, called) == "<|im_start|>foo"


def test_a_text_begins_with_what_stands_before_it_and_with_no_end() -> None:
    own = tokenizer("bytes", opening=["<s>"])
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert own("").input_ids == [BOS, EOS] and start_ids(own) == [BOS]


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        ({"config.json": {"eos_token_id": 7}}, [7]),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": [1, 3]}}, [1, 3]),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"do_sample": True}}, [7]),
        ({"config.json": {"eos_token_id": True, "text_config": {"eos_token_id": 5}}}, [5]),
        ({"config.json": {"text_config": None}}, []),
    ],
)
def test_the_settings_of_generate_say_what_ends_a_response(
    settings: dict[str, Any], ends: list[int], tmp_path: Path
) -> None:
    for name, content in settings.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert settings_end_ids(tmp_path) == ends


@pytest.mark.parametrize("kind", KINDS)
def test_an_opening_is_a_chat_up_to_the_users_message(kind: str) -> None:
    made = tokenizer(kind)
    opening, whole = opening_ids(made, CHAT), prompt_ids(made, CHAT, "foo")
    assert opening == whole[: len(opening)] and opening[0] == START
    assert shown(made, opening).replace(" ", "") == "<|im_start|>user\n"
    assert shown(made, whole[len(opening) :]).strip().startswith("foo")


def test_markup_that_only_the_source_knows() -> None:
    source, other = tokenizer("gemma"), tokenizer("gemma")
    markup = PromptFormat("<|im_start|>{prompt}<|im_end|>\n")
    assert foreign_names(other, source, markup) == []
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"a": 0}, [])), eos_token="</s>")
    assert foreign_names(plain, source, markup) == ["<|im_end|>", "<|im_start|>"]
    assert foreign_names(plain, source, Q) == foreign_names(plain, source, CHAT) == []
