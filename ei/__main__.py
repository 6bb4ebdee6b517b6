"""``python -m ei`` and the command ``ei``."""

import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from ei.cli import run
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "ei":
            raise
        print(
            f"ei needs '{error.name}', which comes with its extra: pip install 'mixture-of-ranks[ei]'", file=sys.stderr
        )
        return 1
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
