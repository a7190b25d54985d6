"""Environments at the edge of what Gymnasium allows: every script trains on them, and tells the truth about them."""

import json

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, flags, rows, takes, tiny_env, train

# name: length and return of every episode
ENVIRONMENTS = {
    "OneAction": (5, 5),
    "OneNumber": (5, 5),
    "Large": (5, 5),
    "Doubles": (5, 5 * (2**24 + 1)),
    "Halves": (5, 5 * float(np.float16(0.1))),
    "AllIntegers": (5, 10),
    "OneStep": (1, 1),
    "BothEnds": (5, 5),
    "Millions": (5, -1e6),
    "Infos": (5, 5),
    "OneArray": (5, 5),
}


@pytest.mark.filterwarnings("ignore:.*share an object")
@pytest.mark.parametrize("name", ENVIRONMENTS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_awkward_environments(script, name, here):
    length, total = ENVIRONMENTS[name]
    folder = train(script, *flags(script, "--env-id", tiny_env(script, name), "--num-envs", "3"))
    *training, evaluation = rows(folder)
    assert sum(row["charts/episodes"] for row in training) >= 1500 // length - 3
    for row in training:
        assert row["charts/episodic_length"] == length
        assert row["charts/episodic_return"] == pytest.approx(total, rel=1e-12)
    assert evaluation["eval/episodic_return"] == pytest.approx(total, rel=1e-12)
    assert evaluation["eval/episodic_return_std"] == pytest.approx(0, abs=1e-6)
    assert any(key.startswith("losses/") for key in training[-1])
    assert all(x.isfinite().all() for x in torch.load(folder / "agent.pt", weights_only=True).values())
    assert json.loads((folder / "args.json").read_text())["num_envs"] == 3


@pytest.mark.parametrize("script", [script for script in SCRIPTS if takes(script, "Box")])
def test_mujoco_does_not_warn_of_its_own_models(script, here, capfd):
    """Whoever trains can do nothing about that, and it would tear the progress bar."""
    folder = train(script, *flags(script, "--env-id", "HalfCheetah-v5", "--total-timesteps", "300"))
    assert "eval/episodic_return" in rows(folder)[-1]
    assert "settotalmass" not in capfd.readouterr().err
