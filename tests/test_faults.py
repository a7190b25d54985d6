"""Runs that are killed at any moment, also while they write."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, environment, flags, rows, train

KILLS = 30


def progress(folder: Path) -> int:
    """Bytes of metrics that are written so far."""
    return sum(path.stat().st_size for path in folder.glob("*/metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(script, here):
    """Kills and resumes runs, each as often as it takes to finish it, until KILLS kills have hit the training."""
    every = ("--total-timesteps", "6000", "--checkpoint-every", "200", "--log-every", "50", "--eval-every", "1000")
    settings = flags(script, *every)
    whole = train(script, *settings, "--runs-dir", "whole")
    generator, kills, ends = random.Random(script), 0, 0
    while kills < KILLS or not ends:
        runs = here / f"runs-{ends}"
        folder = next(runs.glob("*"), None)
        resumable = folder is not None and (folder / "checkpoint.pt").exists()
        if folder is not None and not resumable:  # killed before its first checkpoint: nothing was promised yet
            folder.rename(here / f"early-{kills}")
        goes_on = ("--resume", folder) if resumable else (*settings, "--runs-dir", runs)
        before = progress(runs)
        command = [sys.executable, ROOT / f"{script}.py", *map(str, goes_on)]
        with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as job:
            while job.poll() is None and progress(runs) in (0, before):
                time.sleep(0.002)
            time.sleep(generator.uniform(0, 0.5))
            if job.poll() is None and kills < KILLS:
                job.kill()
                kills += 1
            else:
                assert job.wait(60) == 0, job.stderr.read().decode()
        folder = next(runs.glob("*"))
        if (folder / "checkpoint.pt").exists():
            assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] > 0
        if (folder / "agent.pt").exists() and len(rows(folder)) == len(rows(whole)):  # else the last evaluation is due
            assert rows(folder) == rows(whole)
            assert (folder / "agent.pt").read_bytes() == (whole / "agent.pt").read_bytes()
            ends += 1
