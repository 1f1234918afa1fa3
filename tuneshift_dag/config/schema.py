"""``transfer.yaml`` as pydantic sections: what a key means, its unit, its default and which values go together.

Nothing here reads a file; errors are plain ValueErrors, to which ``files.py`` adds file, key and value.
"""

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tuneshift_dag.config.schema_models import (
    EngineConfig,
    Generator,
    Models,
    Probability,
    Prompt,
    Quantization,
    Section,
    check_template,
)
from tuneshift_dag.method import PromptFormat
from tuneshift_dag.method.evaluation import Metric
from tuneshift_dag.method.filters import KEEP_RULES, Rule, needs_cross_scores


class Source(Section):
    """Model A: the base model, and what holds the skill: an adapter for it, or a whole fine-tuned model."""

    base: str = Field(description="Model reference of the source base model.")
    adapter: str | None = Field(None, description="PEFT adapter: a folder (relative to this one) or a hub id.")
    fine_tuned: str | None = Field(None, exclude_if=lambda value: value is None)
    """Model reference of the fine-tuned model, merged or fully tuned, in place of `adapter`."""
    prompt: Prompt | None = Field(None, exclude_if=lambda value: value is None)
    """How the source is asked, as its fine-tune was (docs/howto_port_your_adapter.md): a raw template, `chat`, or a
    mapping. In its place `prompt_template` does for a raw template."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "Source":
        if (self.adapter is None) == (self.fine_tuned is None):
            given = "neither is given" if self.adapter is None else "both are given"
            raise ValueError(f"needs source.adapter, or source.fine_tuned for a whole model; {given}")
        if self.fine_tuned == self.base:
            raise ValueError(f"fine_tuned is the base itself, {self.base!r}; name the fine-tuned model")
        return self

    @property
    def tuned(self) -> tuple[str, str]:
        """Key of `transfer.yaml` and reference of what holds the skill."""
        if self.adapter is not None:
            return "source.adapter", self.adapter
        return "source.fine_tuned", str(self.fine_tuned)


class Target(Section):
    """Model B: the new base model that shall learn the skill."""

    base: str = Field(description="Model reference of the target base model.")
    prompt: Prompt | None = Field(None, exclude_if=lambda value: value is None)
    """How the target is asked and trained. By default as the source: with the same raw template, or with the same
    messages in the target's own chat template."""


class Response(Section):
    """How the source models answer."""

    max_new_tokens: int = Field(64, ge=1, description="Longest response, in tokens; longer ones are truncated.")
    stop: tuple[str, ...] = Field((), exclude_if=lambda value: not value)
    """Texts before the first of which a response ends, beside the model's end tokens, such as `["\\nQuestion:"]`: for
    scoring and evaluation."""

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value):
            raise ValueError("holds an empty text, before which every response ends; remove it")
        return value


class Filter(Section):
    """Which scored pairs are kept. f is the fine-tuned model, b the base, y_f and y_b their responses."""

    rule: Rule = "both"
    """`both`: PPL_f(y_f) < threshold < PPL_b(y_b). `difference`: PPL_b(y_b) - PPL_f(y_f) > threshold. `ratio`:
    PPL_b(y_b) / PPL_f(y_f) > threshold. `cross_ratio`: PPL_b(y_f) / PPL_f(y_f) > threshold. `surprise_ratio`:
    log PPL_b(y_f) / log PPL_f(y_f) > threshold, how many times as many nats y_f takes the base. `top_excess`: the pairs
    with the largest mean of log p_f - log p_b over the tokens of y_f (TiTok, arXiv 2510.04682). `balanced_confidence`:
    the pair with the lowest PPL_f(y_f) of every distinct response, then the second of each, and so on.
    `seed_similarity`: the pairs whose prompts are most like a seed, by meaning (needs the extra `encoder`). `random`: a
    draw by hash from the pairs that pass the guards. `unfiltered`: every pair with a response, the guards off too."""
    threshold: float = Field(1.5, gt=0)
    """The cut of the first five rules (paper: 1.5, for its only rule). Of `top_excess`, `balanced_confidence`,
    `seed_similarity` and `random`, which have no default, how much is kept, and `keep` is another spelling: up
    to 1, the share of each round's pairs that pass the guards (TiTok: 0.5); above 1, the number of pairs in all rounds,
    of which every round has an equal quota, since its kept pairs seed the next round before that one exists."""
    allow_truncated: bool = False
    """Keep pairs whose fine-tuned response was cut off by `response.max_new_tokens`."""
    max_repetition: Probability = 0.5
    """Drop pairs of whose fine-tuned response more than this share of word 4-grams repeats (from 16 tokens on); 1
    switches this off."""
    refusals: tuple[str, ...] = (
        "as an ai language model", "i can't assist with", "i cannot assist with", "i can't help with that",
        "i cannot help with that", "i'm unable to assist", "i'm not able to help with that",
    )  # fmt: skip
    """Drop pairs whose fine-tuned response holds one of these phrases, in any case; `[]` for none."""

    @model_validator(mode="before")
    @classmethod
    def _one_threshold(cls, data: Any) -> Any:
        """The data with its ``keep``, or what `unfiltered` stands for, as ``threshold``."""
        if not isinstance(data, dict):
            return data
        rule, keep, given = data.get("rule", "both"), data.get("keep"), data.get("threshold")
        data = {key: value for key, value in data.items() if key != "keep"}
        if keep is not None and rule not in KEEP_RULES:
            repair = f"remove it, or use one of the rules {' and '.join(KEEP_RULES)}"
            raise ValueError(f"keep {keep} has no meaning for rule {rule!r}; {repair}")
        if keep is not None and given is not None:
            raise ValueError(f"keep {keep} and threshold {given} are two spellings of one setting; remove one of them")
        if rule == "unfiltered" and given is not None:
            raise ValueError(f"threshold {given} has no meaning for rule 'unfiltered'; remove it")
        if rule in KEEP_RULES and keep is None and given is None:
            raise ValueError(f"rule {rule!r} needs filter.threshold: a share of the pairs, like 0.5, or a number, 1000")
        if rule == "unfiltered":
            data["threshold"] = 1.0
        return data if keep is None else {**data, "threshold": keep}

    @model_validator(mode="after")
    def _possible(self) -> "Filter":
        if not all(phrase.strip() for phrase in self.refusals):
            raise ValueError("refusals holds an empty phrase, which every response contains; remove it")
        check_threshold(self.rule, self.threshold)
        return self


def check_threshold(rule: Rule, threshold: float) -> None:
    """Raise ValueError, saying which values are possible, when a rule can't separate anything at this threshold."""
    impossible = f"threshold {threshold:g} is impossible for rule {rule!r}: "
    if rule in KEEP_RULES:
        if not (0 < threshold <= 1 or (threshold > 1 and float(threshold).is_integer())):
            raise ValueError(f"{impossible}use a share up to 1, like 0.5, or a whole number of pairs")
    elif rule == "difference":
        if not 0 < threshold < math.inf:
            raise ValueError(f"{impossible}use a number above 0")
    elif rule != "unfiltered" and not 1 < threshold < math.inf:
        raise ValueError(f"{impossible}no perplexity is below 1; use a value above 1 (the paper: 1.5)")


class Retain(Section):
    """Rehearsal: in every training step the target is also held to what it predicted before, in texts that it has
    written itself. A number in the place of the section is its weight; 0 is off."""

    weight: float = Field(0.3, ge=0, le=10)
    """Weight of the divergence from the target without its adapter (KL, nats) beside the responses' loss. More keeps
    more of what it knew, and of the skill less."""
    texts: int = Field(384, ge=2)
    """Texts of up to 64 tokens that the target writes, once: for one that is asked in its chat format half of them are
    answers to questions of its own."""


class Distill(Section):
    """LoRA training of the target. The paper doesn't publish its values."""

    # `exclude_if`: keys that came later aren't hashed at their defaults, so that earlier models stay current.
    quantization: Quantization = "none"
    """4-bit type of the frozen target while it is trained (QLoRA); `none` for the dtype. Best is what it will be served
    in: `evaluation` serves it in `models.quantization`."""
    rank: int = Field(16, ge=1, description="LoRA rank, on every linear layer.")
    alpha: int = Field(32, ge=1, description="LoRA alpha; the update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="LoRA dropout.")
    learning_rate: float = Field(5e-4, gt=0, description="Peak learning rate of AdamW.")
    epochs: int = Field(5, ge=1, description="Passes over the dataset.")
    batch_size: int = Field(16, ge=1, description="Pairs in one forward pass.")
    max_length: int = Field(2048, ge=8, exclude_if=lambda value: value == 2048)
    """Longest training example in tokens: a longer response is cut there, without its end token, and a pair whose
    prompt alone reaches it is left out. How many were is said, and shown with `distilled_model`."""
    gradient_accumulation: int = Field(1, ge=1, exclude_if=lambda value: value == 1)
    """Forward passes in one optimizer step, so that it is on `batch_size` times as many pairs; its loss is the mean
    over all their tokens."""
    gradient_checkpointing: bool = Field(False, exclude_if=lambda value: value is False)
    """Keep only each layer's input for the backward pass, compute the rest again: less memory, slower."""
    optimizer: Literal["adamw", "paged_adamw_8bit"] = Field("adamw", exclude_if=lambda value: value == "adamw")
    """`paged_adamw_8bit` keeps AdamW's moments in 8 bits, and in memory that the GPU moves to the CPU's when its own is
    full (bitsandbytes, QLoRA); needs CUDA."""
    processes: int = Field(1, ge=1)
    """Processes that share every batch, each with the whole target on a GPU of its own; the adapter is that of one, up
    to rounding. Without a GPU they share the CPU."""
    balance: Literal["response", "none"] = "none"
    """For tasks with a fixed set of answers `response` draws each epoch's pairs so that a response comes in proportion
    to the square root of its pairs, and over the epochs nearly every pair; one of a response with less than a quarter
    of the mean number of pairs is drawn as often as if there were that many. `none` takes every pair once."""
    retain: Retain = Field(Retain(), exclude_if=lambda value: value.weight == 0)
    """Keeps what the target knew."""
    keep: float | None = Field(None, gt=0)
    """The most that the perplexity of general text may become, as a multiple of the base's, such as 1.05: of the scales
    of the adapter that keep it, the one with the best held-out accuracy is evaluated and exported. Nothing is trained
    again. Without it, or when no scale keeps it, the adapter is taken as it was trained."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Share of the steps with a rising learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping norm.")
    validation_fraction: float = Field(0.05, ge=0, lt=1, description="Share of the pairs held back from training.")

    @field_validator("retain", mode="before")
    @classmethod
    def _weight_alone(cls, value: Any) -> Any:
        return {"weight": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


class Arm(Section):
    """One filter in a comparison; written as a rule's name alone, or with its own threshold."""

    rule: Rule = Field(description="A filter rule.")
    threshold: float | None = None
    """Its cut; without one, that of `filter`. With `compare.pairs` a rule that ranks takes so many of all pairs."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"rule": value} if isinstance(value, str) else value

    @property
    def name(self) -> str:
        return self.rule if self.threshold is None else f"{self.rule} {self.threshold:g}"


class Compare(Section):
    """``tuneshift compare``: models trained on what rival filters keep."""

    arms: tuple[Arm, ...] = ()
    """The filters beside `random` and `unfiltered`: a rule's name, or `{rule: ratio, threshold: 2}`. A rule without a
    threshold takes that of `filter`. Without arms, the rule of `filter`."""
    loop: bool = Field(False, exclude_if=lambda value: value is False)
    """Without it all arms choose from the scored pairs of `tuneshift run`. With it each arm first runs rounds of its
    own from the same seeds, with as many generator calls, and what it keeps seeds its next round. `random` then keeps
    all that pass the guards; rules that rank keep their threshold, by default half."""
    pairs: int | None = Field(None, ge=2)
    """Training pairs of every arm; by default as many as the arm with the fewest has."""
    seeds: int = Field(3, ge=2)
    """Trainings of every arm, each with a seed and a draw of pairs of its own, and with `loop` rounds of its own; use 3
    or more."""
    epochs: int | None = Field(None, ge=1, description="Passes over the pairs; by default `distill.epochs`.")
    labelled: str | None = None
    """A file like heldout.jsonl, with other prompts (a path relative to this folder): the arm `oracle`, what real data
    of the same size would give."""


class Evaluation(Section):
    """Accuracy on the held-out file, and on standard tasks."""

    # Keys that came later aren't part of a version at their defaults: nothing made before them is out of date.
    metric: Metric = Field("exact_match", exclude_if=lambda value: value == "exact_match")
    """`exact_match`: the response equals the held-out one, outer white space aside. `numeric`: its number does, found
    as lm-evaluation-harness does for GSM8K, in two ways that are both reported: strict (after `#### `) and flexible
    (the last number)."""
    max_new_tokens: int = Field(32, ge=1, description="Longest answer, in tokens.")
    bootstrap_samples: int = Field(2000, ge=100, le=1_000_000)
    """Resamples behind the interval of the skill kept."""
    tasks: tuple[str, ...] = Field((), exclude_if=lambda value: not value)
    """Tasks of lm-evaluation-harness to measure the target on before and after, such as `[gsm8k, mbpp, bbh]`; needs the
    extra `lm-eval`."""
    keeps_skill: float = Field(0.8, gt=0, le=1)
    """Asset check: the least share of the source's held-out accuracy."""
    keeps_general_text: float = Field(1.05, ge=1)
    """Asset check: the most perplexity of general text, as a multiple of that of the target's base."""
    task_folder: str | None = Field(None, exclude_if=lambda value: value is None)
    """Folder of task files of your own (a path relative to this one), for other tasks or for data on this machine; its
    data files are named from that folder."""
    allow_code: bool = False
    """Whether files in `task_folder` may run code of their own on this machine: functions (`!function`), metrics the
    harness hasn't, and templates that reach into Python. Read the files before."""
    task_limit: int | None = Field(None, ge=1, exclude_if=lambda value: value is None)
    """At most this many examples of each task; for a try, since the scores are then rough."""


class TransferConfig(Section):
    """``transfer.yaml``."""

    description: str = Field("", description="One line for people.")
    source: Source
    target: Target
    generator: Generator
    prompt_template: str | None = None
    """All that a model sees before the response; must hold `{prompt}` once. The short form of a raw `source.prompt`, of
    which one must be given."""
    engine: EngineConfig = EngineConfig()
    models: Models = Models()
    response: Response = Response()
    filter: Filter = Filter()
    rounds: int = Field(4, ge=1, le=99, description="Most rounds.")
    target_pairs: int = Field(1000, ge=1, description="Rounds stop when this many pairs are kept.")
    distill: Distill = Distill()
    evaluation: Evaluation = Evaluation()
    compare: Compare | None = None
    """Without this section there is no `comparison`; `compare: {}` takes the defaults."""
    diversity_map: bool = True
    """Draw the prompts on a map of meaning: some seconds on the CPU, with the extra `encoder`."""
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of every random choice.")

    @field_validator("prompt_template")
    @classmethod
    def _has_prompt(cls, value: str | None) -> str | None:
        if value is not None:
            check_template(value)
        return value

    @model_validator(mode="after")
    def _source_is_asked_in_one_way(self) -> "TransferConfig":
        if self.prompt_template is None and self.source.prompt is None:
            raise ValueError("neither prompt_template nor source.prompt is there; add one: how the source is asked")
        if self.prompt_template is not None and self.source.prompt is not None:
            raise ValueError(
                f"prompt_template {self.prompt_template!r} and source.prompt both say how the source is asked; remove"
                " one of them"
            )
        return self

    @model_validator(mode="after")
    def _number_can_be_reached(self) -> "TransferConfig":
        number = self.filter.threshold if self.filter.rule in KEEP_RULES else 0
        if number > self.target_pairs:
            most = f"target_pairs {self.target_pairs}"
            raise ValueError(f"filter.threshold {number:g} can't be reached: rounds stop at {most}; raise it")
        self._check_number("filter.threshold", number)
        return self

    def _check_number(self, key: str, number: float) -> None:
        if 1 < number < self.rounds:
            without = f"some of the {self.rounds} rounds without a pair to seed the next"
            raise ValueError(f"{key} {number:g} leaves {without}; use at least one for each round")

    @model_validator(mode="after")
    def _arms_are_possible(self) -> "TransferConfig":
        for arm in self.compare.arms if self.compare else ():
            if arm.rule in ("random", "unfiltered"):
                raise ValueError(f"compare.arms: {arm.name!r} is always part of a comparison; remove it")
            if arm.rule in KEEP_RULES and not (self.compare and self.compare.loop):
                if arm.threshold is not None:
                    raise ValueError(f"compare.arms: {arm.rule!r} takes compare.pairs and no threshold; remove it")
            elif arm.threshold is not None:
                check_threshold(arm.rule, arm.threshold)
                if arm.rule in KEEP_RULES:
                    self._check_number(f"compare.arms: the threshold of {arm.rule}:", arm.threshold)
            elif arm.rule not in (*KEEP_RULES, self.filter.rule):
                raise ValueError(
                    f"compare.arms: {arm.rule!r} needs a threshold, since filter.rule is {self.filter.rule!r}: write"
                    f" {{rule: {arm.rule}, threshold: ...}} (`tuneshift sweep` shows what a threshold keeps)"
                )
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"compare.arms names the same arm twice ({', '.join(names)}); remove one")
        return self

    @model_validator(mode="after")
    def _rules_have_their_scores(self) -> "TransferConfig":
        arms = self.compare.arms if self.compare else ()
        for key, rule in [("filter.rule", self.filter.rule), *(("compare.arms:", arm.rule) for arm in arms)]:
            if needs_cross_scores(rule) and not self.engine.cross_scores:
                raise ValueError(f"{key} {rule!r} needs scores that engine.cross_scores: false leaves out")
        return self

    @property
    def source_prompt(self) -> Prompt:
        return self.source.prompt or Prompt(format="raw", template=self.prompt_template)

    @property
    def source_format(self) -> PromptFormat:
        return self.source_prompt.as_format("source.prompt" if self.source.prompt else "prompt_template")

    @property
    def target_format(self) -> PromptFormat:
        """That of `target.prompt`, or else the source's: a chat is then in the target's own template."""
        return (self.target.prompt or self.source_prompt).as_format("target.prompt", self.source_prompt.system)

    @property
    def generator_quantization(self) -> str:
        """What a generator in this process is quantized to: its own setting, or that of ``models``."""
        return self.generator.quantization or self.models.quantization

    @property
    def rules(self) -> set[Rule]:
        """Those that judge its pairs: that of ``filter``, and of the arms that choose from them."""
        arms = self.arms if self.compare and not self.compare.loop else ()
        return {self.filter.rule, *(arm.rule for arm in arms)}

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The filters to compare, `random` and `unfiltered` last; the rule of ``filter`` when none is named."""
        if self.compare is None:
            return ()
        always = (Arm(rule="random"), Arm(rule="unfiltered"))
        own = Arm(rule=self.filter.rule)
        return (*(self.compare.arms or (() if own in always else (own,))), *always)
