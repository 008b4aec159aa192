"""Split a file of short stories in two: text to calibrate on and text to judge by.

    python benchmarks/stories.py STORIES.txt OUT

STORIES.txt has "<|endoftext|>" after every story, as TinyStories (Eldan and Li 2023) has. The first
195 stories become OUT/stories-calibration.txt, the others OUT/stories-evaluation.txt, one story
after another; quality.json says these names.
"""

from __future__ import annotations

import argparse
from pathlib import Path

MARK = "<|endoftext|>"
CALIBRATION = 195


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stories", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    parts = args.stories.read_text(encoding="utf-8").split(MARK)
    stories = [part.strip() for part in parts if part.strip()]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, chosen in (
        ("calibration", stories[:CALIBRATION]),
        ("evaluation", stories[CALIBRATION:]),
    ):
        text = "\n".join(chosen)
        (args.out / f"stories-{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
