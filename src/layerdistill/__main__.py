"""`python -m layerdistill`, for `torchrun -m` and `accelerate launch -m`."""

from layerdistill.cli import main

if __name__ == "__main__":
    main()
