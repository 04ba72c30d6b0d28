"""Run llama.cpp's own HTTP server, out of the package `xllamacpp`: the agent's second tested engine.

    python llama_server.py --model FILE.gguf --alias NAME --port 8080 --context 2048 --slots 4

The server is llama.cpp's C++ one, options and all; this only fills in what `llama-server` takes as options.
The API key comes from $LLAMA_API_KEY, as with `llama-server`. It listens on the loopback address, and ends
with SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(description="llama.cpp's server on the loopback address.")
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--alias", required=True, help="the model's name for clients")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--context", type=int, default=2048, help="tokens, of each slot")
    parser.add_argument("--slots", type=int, default=4, help="requests at once")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    server = xllamacpp.Server(_parameters(arguments))
    print(f"listening on {server.listening_address}", flush=True)
    stopping.wait()
    os._exit(0)  # its threads wait for requests otherwise


def _parameters(arguments: argparse.Namespace) -> xllamacpp.CommonParams:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = arguments.model
    parameters.model_alias = {arguments.alias}
    parameters.n_ctx = arguments.context * arguments.slots
    parameters.n_parallel = arguments.slots
    parameters.cpuparams.n_threads = arguments.threads
    parameters.cpuparams_batch.n_threads = arguments.threads
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = arguments.port
    parameters.api_keys = [key for key in (os.environ.get("LLAMA_API_KEY"),) if key]
    parameters.endpoint_metrics = True
    parameters.use_jinja = True
    return parameters


if __name__ == "__main__":
    main()
