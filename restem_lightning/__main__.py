"""Entry of `python -m restem_lightning`."""

from restem_lightning.cli import main

if __name__ == "__main__":
    main()
