"""One engine start, timed from the outside; the child process of `jaxgen bench startup`.

Arguments: epoch seconds at which the parent started this process, and the engine's keywords as JSON. The last
line of output is a JSON object.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Starts an engine, generates one token, prints where the seconds went."""
    began, options = float(sys.argv[1]), json.loads(sys.argv[2])
    from jaxgen.bench import report
    from jaxgen.engine import Engine

    imported = time.time()
    with Engine(**options) as engine:
        ready = time.time()
        engine.generate(input_ids=[1], sampling_params={"temperature": 0, "max_new_tokens": 1})
        phases = {"start Python, import": imported - began}
        first_token = time.time()
        engine.wait_until_compiled()  # the next start is to find every step in the cache
        seconds = engine.startup_report.as_dict()
        complete = seconds.pop("complete") - seconds.pop("total")
        phases |= seconds | {"first token": first_token - ready, "total": first_token - began}
        phases["until all steps are compiled"] = max(ready + complete, first_token) - began
        print(json.dumps({"device": report.device(), "phases": phases}))


if __name__ == "__main__":
    main()
