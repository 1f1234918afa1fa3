"""Tokenizers whose files don't quite fit their models."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from tuneshift_dag import TuneshiftError
from tuneshift_dag.engines.rows import Rows
from tuneshift_dag.method import Decoding
from tuneshift_dag.models.loading import load_tokenizer
from tuneshift_dag.models.references import ModelFiles

ROWS = 258


def saved(folder: Path, **special: str | None) -> ModelFiles:
    """A tokenizer of bytes with two special tokens beside a model with an embedding for each of them."""
    vocabulary = ["</s>", "<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["</s>", "<s>"])
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    LlamaConfig(vocab_size=ROWS, eos_token_id=None, bos_token_id=None).save_pretrained(folder)
    return ModelFiles("some/model", folder, str(folder))


def add(files: ModelFiles, **tokens: Any) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(files.path)
    tokenizer.add_special_tokens(tokens)
    tokenizer.save_pretrained(files.path)


def test_a_token_without_an_embedding_is_read_as_plain_text(tmp_path: Path) -> None:
    files = saved(tmp_path / "plain", eos_token="</s>")
    plain = load_tokenizer(files)
    more = saved(tmp_path / "more", eos_token="</s>")
    add(more, pad_token="[PAD]", extra_special_tokens=["<sep>"])
    text = "a [PAD] b<sep> 模型</s>"
    assert max(PreTrainedTokenizerFast.from_pretrained(more.path)(text).input_ids) >= ROWS, "it would be looked up"
    tokenizer = load_tokenizer(more)
    assert tokenizer(text).input_ids == plain(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == ("</s>", "</s>", ROWS)


def test_tokens_with_embeddings_stay(tmp_path: Path) -> None:
    files = saved(tmp_path, eos_token="</s>")
    add(files, pad_token="[PAD]")
    LlamaConfig(vocab_size=ROWS + 1).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(files)
    assert (tokenizer.pad_token, tokenizer("[PAD]").input_ids) == ("[PAD]", [ROWS])


@pytest.mark.parametrize(
    ("file", "ids"), [("generation_config.json", 1), ("generation_config.json", [1, 0]), ("config.json", 1)]
)
def test_the_model_says_which_token_ends_a_text_where_the_tokenizer_does_not(
    tmp_path: Path, file: str, ids: object
) -> None:
    files = saved(tmp_path)
    settings = json.loads((tmp_path / file).read_text()) if (tmp_path / file).is_file() else {}
    (tmp_path / file).write_text(json.dumps({**settings, "eos_token_id": ids}))
    tokenizer = load_tokenizer(files)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token) == ("<s>", 1, "<s>")


def test_an_end_that_is_no_special_token_is_no_text_of_the_response(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(tmp_path, eos_token="</s>"))
    ids = tokenizer("yes.").input_ids
    rows = Rows(tokenizer, {ids[-1]}, 1, Decoding(9))
    for token in ids:
        rows.add([0], [token], [-1.0])
    (response,) = rows.responses()
    assert (response.text, response.token_ids, response.eos_logprob) == ("yes", ids, -1.0)


def test_no_end_at_all_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        TuneshiftError, match=r"some/model: neither its tokenizer .* Set eos_token in .*tokenizer_config"
    ):
        load_tokenizer(saved(tmp_path))


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_my.MyTokenizer", None]}},
        {"tokenizer_class": 3},
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_one_line(tmp_path: Path, settings: dict[str, Any]) -> None:
    files = saved(tmp_path, eos_token="</s>")
    (tmp_path / "tokenization_my.py").write_text("raise SystemExit('its code ran')")
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(
        TuneshiftError, match=r"^some/model: its tokenizer can't be loaded \(.*\. Save that of its base"
    ):
        load_tokenizer(files)


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_that_only_the_settings_name_is_read_as_plain_text(tmp_path: Path, special: bool) -> None:
    files = saved(tmp_path, eos_token="</s>")
    settings = tmp_path / "tokenizer_config.json"
    token = {"content": "card", "special": special, "lstrip": False, "rstrip": False, "normalized": False}
    added = {"added_tokens_decoder": {str(ROWS): {**token, "single_word": False}}}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **added}))
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path)("card").input_ids == [ROWS], "it would be looked up"
    tokenizer = load_tokenizer(files)
    assert max(tokenizer("a card").input_ids) < ROWS and tokenizer.decode(tokenizer("a card").input_ids) == "a card"


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    files = saved(tmp_path, eos_token="</s>")
    LlamaConfig(vocab_size=ROWS - 8).save_pretrained(tmp_path)
    with pytest.raises(TuneshiftError, match=rf"some/model: its tokenizer has {ROWS} tokens .* have {ROWS - 8} rows"):
        load_tokenizer(files)


def test_an_end_beyond_the_vocabulary_is_passed_over(tmp_path: Path) -> None:
    files = saved(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [50_000, 1]}))
    assert load_tokenizer(files).eos_token == "<s>"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 50_000}))
    with pytest.raises(TuneshiftError, match="neither its tokenizer nor"):
        load_tokenizer(ModelFiles("some/model", tmp_path, "another"))


def test_what_an_adapter_does_not_say_its_base_says(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", eos_token="</s>")
    adapter = ModelFiles("adapter", tmp_path / "adapter", "adapter")
    saved(adapter.path)
    (adapter.path / "config.json").unlink()
    assert load_tokenizer(adapter, base).eos_token == "</s>"
    with pytest.raises(TuneshiftError, match=r"^adapter: neither its tokenizer"):
        load_tokenizer(adapter)


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_an_adapter_may_bring_a_chat_template_alone(tmp_path: Path, file: str) -> None:
    base = saved(tmp_path / "base", eos_token="</s>")
    adapter = ModelFiles("adapter", tmp_path / "adapter", file)
    adapter.path.mkdir()
    assert load_tokenizer(adapter, base) is load_tokenizer(base), "read twice"
    template = "{{ messages[0].content }}!"
    written = f"\ufeff{template}" if file.endswith(".jinja") else json.dumps({"chat_template": template})
    (adapter.path / file).write_text(written, "utf-8")
    own = load_tokenizer(ModelFiles("adapter", adapter.path, f"{file} with a template"), base)
    assert own.apply_chat_template([{"role": "user", "content": "yes"}], tokenize=False) == "yes!"
    assert own("yes").input_ids == load_tokenizer(base)("yes").input_ids
    assert load_tokenizer(base).chat_template is None
