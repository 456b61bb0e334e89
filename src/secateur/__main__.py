"""Where the command line begins: the console script, and `python -m secateur`."""

import signal


def main() -> None:
    """Run the command line. Ctrl-C before `cli` listens, while modules are imported, is quiet."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from secateur.cli import main as run

    run()


if __name__ == "__main__":
    main()
