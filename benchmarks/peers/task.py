"""What runs of peers share: the clock, the command line, the text, and the line they print last.

They run in environments of their own: this needs no package. Its clock starts when it is imported.
"""

import time

START = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """SRC OUT CALIB.json [bits] [group] [sym] [--options JSON] [--dtype NAME] [--threads N]"""
    made = argparse.ArgumentParser()
    for name in ("src", "out", "calib"):
        made.add_argument(name)
    made.add_argument("bits", type=int, nargs="?", default=4)
    made.add_argument("group", type=int, nargs="?", default=64)
    made.add_argument("sym", type=int, nargs="?", default=1)
    made.add_argument("--options", type=json.loads, default={})
    made.add_argument("--dtype", default="float32")
    made.add_argument("--threads", type=int, default=2)
    return made


def windows(path: str) -> list[list[int]]:
    """The token ids that windows.py wrote."""
    with open(path) as file:
        return json.load(file)


def done(peer: str, seconds: float) -> None:
    """Print what the run took; `seconds` is quantizing alone."""
    result = {
        "peer": peer,
        "seconds_quantize": seconds,
        "seconds_process": time.perf_counter() - START,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print()
    print(json.dumps(result), flush=True)
