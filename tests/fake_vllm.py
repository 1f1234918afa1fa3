"""`python -m tests.fake_vllm serve MODEL …`: stands in for `vllm serve`, and answers what `FakeServer` answers.

It writes a line about itself to the file that FAKE_VLLM_NOTES names, starts a process of its own as vLLM does, and
fails as FAKE_VLLM_FAILS says: "start" ends it before it listens, "never" lets it never listen, and a number ends it at
that request. The first of its arguments is its model, whose tokenizer it reads.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def value(option: str) -> str:
    return sys.argv[sys.argv.index(option) + 1]


def main() -> None:
    fails, key = os.environ.get("FAKE_VLLM_FAILS", ""), os.environ["VLLM_API_KEY"]
    engine = subprocess.Popen(["sleep", "600"])
    note = {"arguments": sys.argv[1:], "pids": [os.getpid(), engine.pid], "key": key}
    with Path(os.environ["FAKE_VLLM_NOTES"]).open("a") as notes:
        notes.write(json.dumps(note) + "\n")
    print(f"INFO 11-29 12:00:00 vLLM says hello, with the key {key}", flush=True)
    if fails == "start":
        sys.exit("ValueError: no memory for the KV cache")
    while fails == "never":
        time.sleep(1)
    from tests.fake_server import FakeServer

    names = [value("--served-model-name")]
    if "--lora-modules" in sys.argv:
        names.append(json.loads(value("--lora-modules"))["name"])

    def before(server: FakeServer, body: dict[str, Any]) -> tuple[int, str] | None:
        if fails.isdigit() and len(server.bodies) >= int(fails):
            print("RuntimeError: the engine core is dead", flush=True)
            os._exit(1)
        return None if server.headers[-1].get("authorization") == f"Bearer {key}" else (401, "Unauthorized")

    sides: Any = {name: "fine_tuned" if name == "fine_tuned" else "base" for name in names}
    with FakeServer(Path(sys.argv[2]), sides=sides, before=before, address=(value("--host"), int(value("--port")))):
        time.sleep(600)


if __name__ == "__main__":
    main()
