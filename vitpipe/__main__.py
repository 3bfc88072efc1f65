"""`python -m vitpipe`, which torchrun needs: `torchrun -m vitpipe run pretrain ...`."""

from vitpipe.cli import main

if __name__ == "__main__":
    main()
