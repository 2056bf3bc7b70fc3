"""Writes the generated parts of the documentation, or with `--check` says what is wrong with it."""

import argparse
import sys

from docs_lib import generated, prose
from docs_lib.pages import name


def main() -> int:
    """Write or check. The exit code: 1 when something is wrong."""
    parser = argparse.ArgumentParser(
        prog="scripts/docs",
        description="Writes the generated parts of docs/ from the sources: the tables of configuration keys and of "
        "metrics, and the dashboard. Then checks all pages: links and anchors, files and metrics that they name, and "
        "the width of their lines.",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; say which generated parts are out of date")
    check = parser.parse_args().check
    problems = []
    for path, text in generated.files().items():
        if path.exists() and path.read_text() == text:
            continue
        if check:
            problems.append(f"{name(path)} does not say what the sources say: run scripts/docs")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"wrote {name(path)}")
    problems += [*generated.keys_without_text(), *prose.problems()]
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
