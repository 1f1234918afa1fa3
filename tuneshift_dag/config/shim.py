"""shim, removed at integration: methods that `Transfer` had before there was a room for each."""

import hashlib
import json
from typing import Any


class OldTransfer:
    config: Any
    folder: Any
    guards: Any
    round_keys: Any
    needs_ifd = False

    def models_of(self, asset: str) -> str | None:
        config = self.config
        source = config.engine.base.model if config.engine.base else config.source.base
        return {
            "synthetic_prompts": config.generator.model,
            "scored_pairs": source,
            "distilled_model": config.target.base,
            "evaluation": f"{source}, {config.target.base}",
        }.get(asset)

    def engine_of(self, asset: str) -> str | None:
        engine = self.config.engine
        server = self.config.generator.server if asset == "synthetic_prompts" else engine.server
        if self.models_of(asset) is None:
            return None
        if asset == "distilled_model":
            return "local"
        if server is not None:
            return f"openai, {server.concurrency} requests at once, {server.base_url}"
        return f"ray, {engine.ray}" if engine.type == "ray" else "local"

    def describe_filter(self) -> str:
        settings, response = self.config.filter, self.config.response
        text = f"`{settings.rule}`"
        if settings.rule == "unfiltered":
            return text
        text += f", threshold {settings.threshold:g}"
        if response.samples:
            text += f"; at least {response.agreement:g} of {response.samples} samples agree"
        return text

    def verdict_sql(self, rule: Any = None, cut: float | str | None = None) -> str:
        from tuneshift_dag.method.filters import verdict_sql

        settings = self.config.filter
        value = settings.threshold if cut is None else cut
        sql = value if isinstance(value, str) else f"{value!r}::DOUBLE"
        pairs = self.of_its_rounds("scored_pairs")
        return verdict_sql(rule or settings.rule, self.guards, sql, self.config.rounds, self.config.seed, pairs)

    def of_its_rounds(self, table: str) -> str:
        return f"(SELECT * FROM {table} WHERE round <= '{self.round_keys[-1]}')"

    def version(self, *sections: str, code: int = 1) -> str:
        from tuneshift_dag.config.versions import sections_version

        return sections_version(self.config, *sections, code=code)

    def samples_version(self) -> str:
        response = self.config.response
        if not response.samples:
            return ""
        parts = [response.samples, response.temperature, response.top_p, self.config.evaluation.metric]
        return "-" + hashlib.sha256(json.dumps([*parts, self.config.seed]).encode()).hexdigest()[:8]

    def adapter_version(self) -> str:
        from tuneshift_dag.models.references import known_fingerprint

        found = known_fingerprint(self.config.source.adapter, self.folder, "source.adapter", "adapter")
        return "" if found.commit else found.value[:8]

    def tasks_version(self) -> str:
        from tuneshift_dag.config.versions import tasks_hash

        found = tasks_hash(self)  # type: ignore[arg-type]
        return f"-{found[:8]}" if found else ""
