"""``python -m ei`` and the command ``ei``."""

import sys

from ei import explain_missing


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from ei.cli import run
    except ModuleNotFoundError as error:
        print(explain_missing(error), file=sys.stderr)
        return 1
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
