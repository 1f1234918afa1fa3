"""`python -m tests.servers.llama_cpp GGUF LORA_GGUF PORT THREADS SLOTS`: llama.cpp's server, by xllamacpp.

It runs until its standard input closes, so it ends with the process that started it.
"""

import sys

import xllamacpp


def main(model: str, lora: str, port: int, threads: int, slots: int) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = {"smollm2"}
    # Loaded and off: a request switches it on with {"lora": [{"id": 0, "scale": 1}]}.
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 0.0)]
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = slots
    params.n_ctx = slots * 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
