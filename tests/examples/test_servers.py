"""The server examples serve, stream, refuse bad requests in words, and their clients work."""

import itertools
import json
import re
import urllib.error
import urllib.request

import pytest
from example_harness import EXAMPLES, SMALL, run_program, serving

GREEDY = {"temperature": 0, "max_new_tokens": 12}


def post(port, path, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers))


def check_generate_and_stream(port):
    body = {"prompt": "The capital of France is", "sampling_params": GREEDY}
    with post(port, "/generate", body) as response:
        whole = json.load(response)
    assert whole["meta_info"]["completion_tokens"] > 0
    with post(port, "/generate_stream", body) as response:
        texts = [json.loads(line)["text"] for line in response]
    assert texts[-1] == whole["text"]
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    for path in ("/generate", "/generate_stream"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(port, path, {"prompt": "x", "sampling_params": {"temperature": -1}})
        assert refused.value.code == 400
        assert "temperature" in refused.value.read().decode()


def test_custom_server(model, cache):
    with serving("custom_server.py", cache, "--model-path", model, *SMALL) as port:
        check_generate_and_stream(port)
        for path, body, status in [
            ("/nowhere", {}, 404),
            ("/generate", b"not JSON", 400),
            ("/generate", b"[1]", 400),
        ]:
            with pytest.raises(urllib.error.HTTPError) as refused:
                post(port, path, body)
            assert refused.value.code == status


def test_fastapi_server(model, cache):
    with serving("fastapi_server.py", cache, "--model-path", model, *SMALL) as port:
        check_generate_and_stream(port)
        text = run_program(EXAMPLES / "fastapi_server.py", cache, "--port", str(port), "--client")
    half = len(text) // 2
    assert half > 1
    assert text[:half] == text[half:]  # the answer, then the same one streamed


def test_hidden_states_server(model, cache):
    with serving("hidden_states_server.py", cache, "--model-path", model, *SMALL) as port:
        text = run_program(EXAMPLES / "hidden_states_server.py", cache, "--port", str(port), "--client")
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(port, "/generate", {"text": "x", "sampling_params": {"top_p": 2}})
        assert refused.value.code == 400
    assert len(re.findall(r"Hidden states: \(\d+, 36\)", text)) == 2
