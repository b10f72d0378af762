"""The process of the command `numba-dequant`, which `python -m numba_dequant` is too."""

import sys


def main() -> int:
    """Run the command with the arguments of the process; the result is its exit status."""
    try:
        # The import takes long enough to be interrupted.
        from numba_dequant.cli import console, main

        try:
            return main.main()
        finally:
            console.discard_unwritten()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
