"""``make bench``, or ``python -m benchmarks.run [NAME ...]``: measure, print, and write results.json."""

import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import cluster, dataflow, profile, scoring, servers, training

RESULTS = Path(__file__).with_name("results.json")
BENCHMARKS = {
    "scoring_vs_naive": scoring.scoring_vs_naive,
    "scoring_vs_batched": scoring.scoring_vs_batched,
    "fraction_of_limit": scoring.fraction_of_limit,
    "memory": scoring.memory,
    "time_by_operation": profile.time_by_operation,
    "training_vs_trl": training.training_vs_trl,
    "filter": dataflow.filter_rows,
    "overhead": dataflow.overhead,
    "scoring_vs_llamacpp": servers.scoring_vs_llamacpp,
    "scoring_vs_vllm": servers.scoring_vs_vllm,
    "client_overhead": servers.client_overhead,
    "ray_vs_local": cluster.ray_vs_local,
    "writer_memory": cluster.writer_memory,
}


def main() -> None:
    # vLLM is large, and in an environment of its own.
    usual = [name for name in BENCHMARKS if name != "scoring_vs_vllm" or servers.VLLM_PYTHON]
    names = sys.argv[1:] or usual
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    for name in names:
        result = BENCHMARKS[name]()
        results[name] = {**result, "measured_at": datetime.now(UTC).isoformat(timespec="minutes"), "machine": machine}
        print(name, json.dumps(results[name], indent=2), flush=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
