"""`python -m bigsimclr` is the command `bigsimclr`."""

from bigsimclr.cli import main

if __name__ == "__main__":
    main()
