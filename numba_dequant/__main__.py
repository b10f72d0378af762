"""The process of `numba-dequant` and of `python -m numba_dequant`."""

import sys


def main() -> int:
    """Run the command with the arguments of the process; returns the exit status."""
    try:
        # Ctrl-C may be pressed during the import.
        from numba_dequant.cli import console, main

        try:
            return main.main()
        finally:
            console.discard_unwritten()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
