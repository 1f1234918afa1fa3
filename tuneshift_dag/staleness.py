"""What is out of date, asked of Dagster itself, with the resolver behind the UI's "Unsynced" marks.

So the command line, the automation and the UI never disagree.
"""

from datetime import UTC, datetime
from typing import Any

import dagster as dg

# Dagster has no public call for this; the version range in pyproject.toml is pinned for it.
from dagster._core.asset_graph_view.asset_graph_view import AssetGraphView
from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleCause, StaleStatus
from dagster._core.definitions.temporal_context import TemporalContext


class Staleness:
    """The state of an asset graph at one moment: make a new one after every run, because it remembers what it read."""

    def __init__(self, graph: BaseAssetGraph[Any], instance: dg.DagsterInstance) -> None:
        moment = TemporalContext(
            effective_dt=datetime.now(UTC), last_event_id=instance.event_log_storage.get_maximum_record_id()
        )
        view = AssetGraphView(temporal_context=moment, instance=instance, asset_graph=graph)
        self._resolver = CachingStaleStatusResolver(instance, graph, view)

    def causes(self, asset: dg.AssetKey, round_: str | None = None) -> list[StaleCause] | None:
        """Why an asset is out of date: [] when it isn't, None when it was never materialized."""
        if self._resolver.get_status(asset, round_) == StaleStatus.MISSING:
            return None
        return list(self._resolver.get_stale_causes(asset, round_))
