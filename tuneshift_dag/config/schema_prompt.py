"""How a model is asked, as ``transfer.yaml`` says it: `source.prompt` and `target.prompt`."""

from typing import Any, Literal

from pydantic import Field, JsonValue, model_validator

from tuneshift_dag.config.schema_models import Section
from tuneshift_dag.method import PromptFormat

# What tokenizers take beside the template's own arguments, and what is decided here.
_NOT_THE_TEMPLATES = {
    "conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    "sanitize_control_tokens",
}  # fmt: skip


class Prompt(Section):
    """How a model is asked. A text alone is a raw template, or the word `chat`."""

    format: Literal["raw", "chat"]
    """`raw`: `template` is all that the model sees before its response. `chat`: the prompt is a user's message in the
    chat template that the model's tokenizer has."""
    template: str | None = Field(None, description="`raw`: must hold `{prompt}` once, and may hold `{system}`.")
    system: str | None = None
    """The system message; in a raw template it stands at `{system}`. With `chat` an empty one keeps a template from
    writing its own."""
    arguments: dict[str, JsonValue] = Field({})
    """`chat`: what the template is given beside the messages, such as `{enable_thinking: false}`."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return {"format": "chat"} if value == "chat" else {"format": "raw", "template": value}

    @model_validator(mode="after")
    def _goes_together(self) -> "Prompt":
        if self.format == "chat":
            if self.template is not None:
                raise ValueError(f"template {self.template!r} is for format: raw, and chat has the model's; remove it")
            if taken := sorted(_NOT_THE_TEMPLATES & set(self.arguments)):
                raise ValueError(f"arguments {', '.join(taken)} can't be given to a chat template; remove them")
            return self
        if self.template is None or self.template.count("{prompt}") != 1:
            raise ValueError("must be a raw template that holds {prompt} exactly once, or the word chat")
        if self.arguments:
            raise ValueError("arguments are for format: chat; remove them")
        if self.system is not None and "{system}" not in self.template:
            raise ValueError("system is shown nowhere: put {system} into the template, or remove system")
        return self

    def as_format(self, key: str, system: str | None = None) -> PromptFormat:
        """What models are asked by. ``system`` is what a raw template shows at ``{system}`` without its own."""
        if self.system is not None or "{system}" not in (self.template or ""):
            system = self.system
        return PromptFormat(self.template, system, self.arguments, key)
