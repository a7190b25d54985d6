"""What each process of torchrun does in test_processes.py: trains, and saves what it ended with.

torchrun --nproc-per-node 2 -m tests.processes FOLDER 'script --flag value' 'script --flag value' ...
"""

import os
import shlex
import sys
from pathlib import Path

import torch

from tests.conftest import train


def train_and_save(commands: list[str], folder: Path, rank: int = 0) -> None:
    """The agent at the end of each command goes to `folder`/<number of the command>-<rank>.pt."""
    for number, command in enumerate(commands):
        script, *flags = shlex.split(command)
        module = __import__(script)
        finish = module.Run.finish

        def save(run, path=folder / f"{number}-{rank}.pt", finish=finish):
            torch.save(run.states["agent"].state_dict(), path)
            return finish(run)

        module.Run.finish = save
        try:
            train(script, *flags)
        finally:
            module.Run.finish = finish


if __name__ == "__main__":
    train_and_save(sys.argv[2:], Path(sys.argv[1]), int(os.environ["RANK"]))
