"""`python tests/fake_vllm.py serve MODEL …`: stands in for `vllm serve`, and starts at once, since it has no model.
What it is asked under its own key and its models' names goes on to the `FakeServer` of the test.

Variables: FAKE_VLLM_SERVER has the port of that one, FAKE_VLLM_NOTES a file that gets a line about every start. By
FAKE_VLLM_FAILS it ends before it listens ("start"), never listens ("never"), or ends at a request (its number).
"""

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEY, FAILS = os.environ["VLLM_API_KEY"], os.environ.get("FAKE_VLLM_FAILS", "")
HELLO = "INFO 11-29 12:00:00 vLLM says hello"


def value(option: str) -> str:
    return sys.argv[sys.argv.index(option) + 1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    names: tuple[str, ...] = ()
    asked = 0
    lock = threading.Lock()

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        names = [{"id": name, "parent": None if name == self.names[0] else self.names[0]} for name in self.names]
        self._answer(200 if self.path == "/health" or self._knows_key() else 401, json.dumps({"data": names}).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            Handler.asked += 1
            if FAILS.isdigit() and Handler.asked >= int(FAILS):
                print(f"RuntimeError: the engine core is dead (key {KEY})", flush=True)
                os._exit(1)
        if not self._knows_key() or json.loads(body)["model"] not in self.names:
            self._answer(401 if not self._knows_key() else 404, b"{}")
            return
        there = http.client.HTTPConnection("127.0.0.1", int(os.environ["FAKE_VLLM_SERVER"]))
        there.request("POST", self.path, body)
        self._answer(200, there.getresponse().read())
        there.close()

    def _knows_key(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {KEY}"

    def _answer(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Listener(ThreadingHTTPServer):
    request_queue_size = 128  # whoever finds no place in it comes back a second later


def main() -> None:
    engine = subprocess.Popen(["sleep", "600"])  # vLLM has such a process too
    note = {"arguments": sys.argv[1:], "pids": [os.getpid(), engine.pid], "key": KEY}
    with Path(os.environ["FAKE_VLLM_NOTES"]).open("a") as notes:
        notes.write(json.dumps(note) + "\n")
    print(HELLO, flush=True)
    if FAILS == "start":
        sys.exit("ValueError: no memory for the KV cache")
    while FAILS == "never":
        time.sleep(1)
    adapters = [json.loads(value("--lora-modules"))["name"]] if "--lora-modules" in sys.argv else []
    Handler.names = (value("--served-model-name"), *adapters)
    Listener((value("--host"), int(value("--port"))), Handler).serve_forever()


if __name__ == "__main__":
    main()
