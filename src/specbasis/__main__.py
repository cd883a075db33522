"""`python -m specbasis` is the command line."""

from specbasis.cli import main

if __name__ == "__main__":
    main()
