"""Turn the Python standard library on this machine into a corpus: JSON lines, one document a source file.

python tools/make_python_corpus.py --output corpus.jsonl

The order of the documents is fixed but mixed (by a hash of their names), so that the last ones are a fair sample to
hold out.
"""

import argparse
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence

from megatron_lite.datasets.utils import write_whole

NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "ensurepip"}
TESTS = {"test", "tests", "idle_test"}


def source_files(root: str, include_tests: bool) -> Iterator[str]:
    """Names of the source files below `root`, relative to it, in mixed order."""
    left_out = NOT_THE_LIBRARY if include_tests else NOT_THE_LIBRARY | TESTS
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out]
        names += [os.path.relpath(os.path.join(folder, name), root) for name in files if name.endswith(".py")]
    yield from sorted(names, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())


def documents(root: str, include_tests: bool) -> Iterator[dict[str, str]]:
    """The texts of the source files, without empty ones, repetitions and those that are not UTF-8."""
    seen = set()
    for name in source_files(root, include_tests):
        try:
            with open(os.path.join(root, name), encoding="utf-8", newline="") as file:
                text = file.read()
        except (UnicodeDecodeError, OSError):
            continue
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield {"text": text, "source": name}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines to write.")
    parser.add_argument("--root", default=sysconfig.get_paths()["stdlib"], metavar="DIR", help="Folder of the sources.")
    parser.add_argument(
        "--include-tests", action="store_true", help="Take the library's tests too (about as much again)."
    )
    arguments = parser.parse_args(argv)
    os.makedirs(os.path.dirname(os.path.abspath(arguments.output)), exist_ok=True)
    count, size = 0, 0
    with write_whole(arguments.output) as file:
        for document in documents(arguments.root, arguments.include_tests):
            count += 1
            size += len(document["text"].encode("utf-8"))
            file.write(json.dumps(document).encode("utf-8") + b"\n")
        if count == 0:
            raise SystemExit(f"error: no Python sources in {arguments.root}; name a folder with --root.")
    print(f"{count:,} documents, {size / 1e6:.1f} MB of text from {arguments.root} in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
