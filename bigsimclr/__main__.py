"""`python -m bigsimclr` and the command `bigsimclr`: ready for an interrupt before any import."""

import sys


def main() -> None:
    """Run the command line; an interrupt while it is being loaded ends in one line, too."""
    try:
        from bigsimclr.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("bigsimclr: interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
