"""``python -m ei`` and the command ``ei``."""

import os
import sys

from ei import explain_missing


def main() -> int:
    """Run the command line; returns the exit code (141, as of SIGPIPE: whoever reads the output has had enough)."""
    try:
        try:
            return _run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more as it ends, and would say that this failed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run() -> int:
    try:
        from ei.cli import run
    except ModuleNotFoundError as error:
        print(explain_missing(error), file=sys.stderr)
        return 1
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
