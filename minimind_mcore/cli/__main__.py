"""`python -m minimind_mcore.cli COMMAND ...`: the command minimind-mcore from a checkout that is not installed."""

from minimind_mcore.cli import main

if __name__ == "__main__":
    main()
