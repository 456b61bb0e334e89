"""`python -m secateur`: the command line without the console script."""

from secateur.cli import main

if __name__ == "__main__":
    main()
