"""`python -m grasp`: the command line, as torchrun and friends start it."""

from grasp.cli.main import main

main()
