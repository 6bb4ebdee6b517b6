"""``python -m ei`` and the command ``ei``."""

import os
import sys

from ei import explain_missing


def main() -> int:
    """Run the command line; returns the exit code (141, as of SIGPIPE: whoever reads the output has had enough)."""
    _open_streams()
    try:
        try:
            return _run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _print_no_more()
        return 141
    except OSError as error:  # what is printed goes to a full disk
        if "EI_TRACEBACK" in os.environ:
            raise
        print(f"ei: {error}", file=sys.stderr)
        _print_no_more()
        return 1


def _open_streams() -> None:
    """Where they are closed, print to nowhere; the next file would take their number, and what libraries print."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _print_no_more() -> None:
    """Python flushes once more as it ends, and would say that this failed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run() -> int:
    try:
        from ei.cli import run
    except ModuleNotFoundError as error:
        print(explain_missing(error), file=sys.stderr)
        return 1
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
