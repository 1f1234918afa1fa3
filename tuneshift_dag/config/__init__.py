"""A transfer: its settings and examples, read and checked (``files.py``), and what makes its assets out of date
(``versions.py``). The keys of ``transfer.yaml`` are in ``schema.py`` and ``schema_models.py``."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tuneshift_dag.config.schema import Arm, TransferConfig
from tuneshift_dag.method.asking import Format
from tuneshift_dag.method.evaluation import next_question
from tuneshift_dag.method.filters import RANKING_RULES, Guards, Rule
from tuneshift_dag.models.references import Fingerprint, Kind, Reference


@dataclass(frozen=True, eq=False)
class Transfer:
    """A transfer folder, read and checked.

    Attributes:
        folder: absolute; its name is the transfer's.
        seeds: the prompts of ``seeds.jsonl``.
        heldout: (prompt, response) pairs of ``heldout.jsonl``; may be empty.
        labelled: pairs of ``compare.labelled``; may be empty.
        loop: names the arm of a comparison whose rounds these are; see `loops`.
        most_rounds: how many of the rounds there are for now; see `with_rounds`.
        fingerprints: of the models and the adapter, by key of ``transfer.yaml`` such as ``"source.base"``, as they
            were when the folder was read. A generator on a server of others has none.
    """

    folder: Path
    config: TransferConfig
    seeds: list[str]
    heldout: list[tuple[str, str]]
    labelled: Sequence[tuple[str, str]] = ()
    fingerprints: Mapping[str, Fingerprint] = field(default_factory=dict)
    loop: str = ""
    most_rounds: int | None = None

    @property
    def name(self) -> str:
        return f"{self.folder.name}__{self.loop}" if self.loop else self.folder.name

    @property
    def round_keys(self) -> list[str]:
        """Partition keys: ``round_01``, ``round_02``, ..."""
        return [round_key(number) for number in range(1, (self.most_rounds or self.config.rounds) + 1)]

    @property
    def guards(self) -> Guards:
        settings = self.config.filter
        return Guards(settings.allow_truncated, settings.max_repetition, settings.refusals)

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end a response beside a model's end token: those of ``response.stop``, and where numbers are
        compared the next question that a model asks itself."""
        template = self.config.source_format.template
        asked = next_question(template) if template and self.config.evaluation.metric == "numeric" else ""
        return (*self.config.response.stop, *([asked] if asked else []))

    @property
    def rehearses(self) -> bool:
        return self.config.distill.retain.weight > 0

    @property
    def evaluates(self) -> bool:
        """Whether there is something to measure, or a scale of the adapter to choose."""
        return bool(self.heldout or self.config.evaluation.tasks) or self.config.distill.keep is not None

    @property
    def generator_format(self) -> Format:
        return self.config.generator.format or ("blocks" if any(map(has_lines, self.seeds)) else "list")

    @property
    def max_prompt_characters(self) -> int | None:
        """None when generated prompts are limited in tokens."""
        generator = self.config.generator
        most, given = generator.max_prompt_characters, generator.model_fields_set
        if "max_prompt_characters" in given:
            return most
        # The default is for short questions; where not even the seeds are, it would drop all that is like them.
        is_short = not any(has_lines(seed) or len(seed) > most for seed in self.seeds)
        return most if is_short and generator.max_prompt_tokens is None else None

    def reference(self, key: str) -> str:
        """The model reference at a key of ``fingerprints``; on the hub with the commit that the fingerprint is of.

        What is loaded by it is what the versions say, also when the hub's cache moves on during a run.
        """
        section, name = key.split(".")
        reference = str(getattr(getattr(self.config, section), name))
        commit = self.fingerprints[key].commit if key in self.fingerprints else None
        return f"{reference.partition('@')[0]}@{commit}" if commit else reference

    def named(self, key: str, kind: Kind = "model") -> Reference:
        """What is at a key of ``transfer.yaml``, as `reference` has it."""
        return Reference(self.reference(key), self.folder, key, kind)

    def tuned(self, kind: Kind = "model") -> Reference:
        """What holds the skill: an adapter, or a whole model as one of ``kind``."""
        key, _ = self.config.source.tuned
        return self.named(key, "adapter" if key == "source.adapter" else kind)

    def with_training(self, seed: int, epochs: int) -> "Transfer":
        """The same transfer with another seed and number of epochs, for an arm of a comparison."""
        distill = self.config.distill.model_copy(update={"epochs": epochs})
        return replace(self, config=self.config.model_copy(update={"seed": seed, "distill": distill}))

    @property
    def loops(self) -> "dict[tuple[str, int], Transfer]":
        """With `compare.loop` the rounds of every arm and seed, as a transfer with a name, and so tables, of its own.
        They have no target size: all arms have as many generator calls, however much they keep."""
        compare = self.config.compare
        seeds = range(compare.seeds) if compare and compare.loop else ()
        return {(arm.name, number): self._looped(arm, number) for number in seeds for arm in self.config.arms}

    def _looped(self, arm: Arm, number: int) -> "Transfer":
        settings = self.config.filter
        usual: dict[Rule, float] = {**dict.fromkeys(RANKING_RULES, 0.5), settings.rule: settings.threshold}
        threshold = 1.0 if arm.rule in ("random", "unfiltered") else arm.threshold or usual[arm.rule]
        own = settings.model_copy(update={"rule": arm.rule, "threshold": threshold})
        changes = {"filter": own, "seed": self.config.seed + number, "compare": None, "target_pairs": sys.maxsize}
        name = f"{re.sub(r'[^A-Za-z0-9]', '_', arm.name)}_{number}"
        return replace(self, config=self.config.model_copy(update=changes), loop=name)

    def with_one_step(self) -> "Transfer":
        """The same transfer with a training of a few pairs in one step and one process."""
        changes = {"epochs": 1, "processes": 1, "gradient_accumulation": 1, "balance": "none"}
        distill = self.config.distill.model_copy(update=changes)
        models = self.config.models.model_copy(update={"workers": 1})
        return replace(self, config=self.config.model_copy(update={"distill": distill, "models": models}))

    def with_rounds(self, most: int) -> "Transfer":
        """The same transfer with at most this many rounds (1 or more). A number of pairs to keep is still shared by all
        that transfer.yaml asks for, so that those which follow change nothing."""
        return replace(self, most_rounds=min(most, self.config.rounds))


def has_lines(text: str) -> bool:
    return "\n" in text or "\r" in text


def round_key(number: int) -> str:
    return f"round_{number:02d}"


def round_number(key: str) -> int:
    return int(key.removeprefix("round_"))
