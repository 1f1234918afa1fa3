"""Whether prompts fit into the contexts of the models that read them. No weights are read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tuneshift_dag import TuneshiftError
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.examples import HELD_OUT_SHAPE, SEED_SHAPE, read_jsonl

Key = Literal["source.base", "target.base", "generator.model"]
# Tokens that a tokenizer or a chat template puts around a text.
_AROUND = 32
# More than a chat template writes of its own; where a context leaves less, it is asked.
_TEMPLATE = 1000
_READERS: tuple[Key, Key] = ("source.base", "target.base")


@dataclass(frozen=True)
class Reader:
    """A model by its key of ``transfer.yaml``, and what it can read at once."""

    transfer: Transfer
    key: Key

    @property
    def context(self) -> int | None:
        """Tokens; None when the model has no such limit, or isn't on this machine yet. Where a longer text has other
        positions (LongRoPE) it is what the model was first made for: what a text is answered must not depend on those
        that are read beside it."""
        from transformers import AutoConfig

        file = self.transfer.named(self.key).config_file()
        text = AutoConfig.from_pretrained(file.parent).get_text_config() if file else None
        scaled = getattr(text, "rope_parameters", None) or {}
        first = scaled.get("original_max_position_embeddings") if scaled.get("rope_type") == "longrope" else None
        return first or getattr(text, "max_position_embeddings", None)

    def _shown(self, prompt: str, most: int) -> str:
        """What they see of a prompt; of a chat with room to spare below ``most`` tokens its messages."""
        config = self.transfer.config
        format = config.target_format if self.key == "target.base" else config.source_format
        if format.template is not None:
            return prompt.join(format.around())
        messages = "\n".join(message["content"] for message in format.messages(prompt))
        if len(messages.encode()) + _TEMPLATE <= most:
            return messages
        from tuneshift_dag.models.prompts import chat_text

        return chat_text(self._tokenizer(), format, prompt)

    def __str__(self) -> str:
        return f"{self.key} {self.transfer.reference(self.key)!r}"

    def lacks(self, prompt: str, most: int) -> int:
        """The tokens of what source or target see of a prompt, which are more than ``most``; else 0."""
        return self.too_long(self._shown(prompt, most), most)

    def too_long(self, text: str, most: int) -> int:
        """The tokens of a text, which are more than ``most``; else 0."""
        # A token is a byte or more, beside those around a text: of most texts nobody needs to know the tokens.
        if len(text.encode()) + _AROUND <= most:
            return 0
        tokens = len(self._tokenizer()(text).input_ids)
        return tokens if tokens > most else 0

    def _tokenizer(self) -> Any:
        from tuneshift_dag.models.loading import load_tokenizer

        files, tuned = self.transfer.named(self.key, "tokenizer").files(), self.transfer.tuned("tokenizer")
        # The fine-tune's may have more tokens, and the chat template.
        own = self.key == "source.base" and tuned.is_here
        return load_tokenizer(tuned.files(), files) if own else load_tokenizer(files)


def overlong(transfer: Transfer) -> Callable[[str], bool]:
    """Whether a generated prompt is too long, by the limit that ``transfer.yaml`` sets, or for the models."""
    generator, most_characters = transfer.config.generator, transfer.max_prompt_characters
    new_tokens = transfer.config.response.max_new_tokens
    readers = [(reader, context - new_tokens) for reader, context in _contexts(transfer, *_READERS)]
    alone = [(Reader(transfer, "source.base"), generator.max_prompt_tokens)] if generator.max_prompt_tokens else []
    if most_characters is None:
        # It must be possible to show it as a seed among the others, under the instruction.
        for reader, context in _contexts(transfer, "generator.model"):
            alone.append((reader, (context - generator.max_new_tokens) // (generator.seeds_per_call + 1)))

    def is_overlong(prompt: str) -> bool:
        if most_characters is not None and len(prompt) > most_characters:
            return True
        return any(reader.too_long(prompt, most) for reader, most in alone) or any(
            reader.lacks(prompt, most) for reader, most in readers
        )

    return is_overlong


def check_examples(transfer: Transfer) -> None:
    """Raise `TuneshiftError`, naming file and line, when a seed or held-out prompt leaves no room for a response, or
    naming the key when the seeds of a generator call leave none for its answer."""
    config, generator = transfer.config, transfer.config.generator
    held_out = [prompt for prompt, _ in transfer.heldout]
    files = (
        ("seeds.jsonl", SEED_SHAPE, transfer.seeds, "response", config.response.max_new_tokens),
        ("heldout.jsonl", HELD_OUT_SHAPE, held_out, "evaluation", config.evaluation.max_new_tokens),
    )
    for reader, context in _contexts(transfer, *_READERS):
        for name, shape, prompts, section, new_tokens in files:
            most = context - new_tokens
            for number, prompt in enumerate(prompts):
                if tokens := reader.lacks(prompt, most):
                    at, _ = read_jsonl(transfer.folder / name, shape)[number]
                    raise TuneshiftError(
                        f"{at}: the prompt has {tokens} tokens, and the context of {reader} is {context}, which leaves"
                        f" {most} beside {section}.max_new_tokens ({new_tokens}). Shorten it, lower"
                        f" {section}.max_new_tokens, or name a model with a longer context."
                    )
    longest = sorted(transfer.seeds, key=len)[-generator.seeds_per_call :]
    for reader, context in _contexts(transfer, "generator.model"):
        if tokens := reader.too_long("\n".join(longest), context - generator.max_new_tokens):
            raise TuneshiftError(
                f"{transfer.folder / 'transfer.yaml'}: generator.seeds_per_call: the {len(longest)} longest seeds have"
                f" {tokens} tokens, and the context of {reader} is {context}, which leaves"
                f" {context - generator.max_new_tokens} beside generator.max_new_tokens ({generator.max_new_tokens})."
                " Lower one of the two, or name a model with a longer context."
            )


def _contexts(transfer: Transfer, *keys: Key) -> list[tuple[Reader, int]]:
    known = (Reader(transfer, key) for key in keys if key in transfer.fingerprints)
    return [(reader, context) for reader in known if (context := reader.context)]
