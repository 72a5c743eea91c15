"""`python -m scope.cli`: the command `scope`, for launchers that start a module, such as torchrun."""

from scope.cli import main

if __name__ == "__main__":
    main()
