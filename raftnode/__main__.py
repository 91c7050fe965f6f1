"""`python -m raftnode` is the command `raftnode`."""

from raftnode.cli import main

if __name__ == "__main__":
    main()
