"""Prints what is measured of the Rust sources, and what stands out."""

import sys

from house_lib.measures import measure


def main() -> int:
    """Print it. Exit status 1 when something is over its bound."""
    wrong = 0
    for measure_ in measure():
        wrong += measure_.over
        bound = "" if measure_.bound is None else f"at most {measure_.bound:g}"
        print(f"{'NO ' if measure_.over else '   '}{measure_.name:<58}{measure_.value:>10g}  {bound}")
        for detail in measure_.details if measure_.over or "--all" in sys.argv else ():
            print(f"       {detail}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
