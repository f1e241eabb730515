"""`python -m latentscenes`: the command line, as torchrun and job schedulers start it."""

from latentscenes.cli.main import main

if __name__ == "__main__":
    main()
