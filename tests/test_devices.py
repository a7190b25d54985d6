"""One update on each device, from the same weights, batch and noise, ends in the same weights as on the CPU."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SCRIPTS

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
POLICY_GRADIENT, STEPS, NUM_ENVS, OBS_DIM = SCRIPTS[:3], 16, 3, 5
BOX = gym.spaces.Box(np.array([-1, 0], np.float32), np.array([3, 0.5], np.float32))


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data(module, discrete: bool, device: torch.device):
    """A rollout or a batch of transitions."""
    shape = (STEPS, NUM_ENVS) if hasattr(module, "Rollout") else (STEPS * NUM_ENVS,)
    action = numbers(*shape, seed=2) > 0 if discrete else numbers(*shape, 2, seed=2).tanh()
    terminated, truncated = numbers(*shape, seed=5) > 1, numbers(*shape, seed=6) > 1
    fields = {
        "obs": numbers(*shape, OBS_DIM, seed=1),
        "action": action.long() if discrete else action,
        "reward": numbers(*shape, seed=3),
        "next_obs": numbers(*shape, OBS_DIM, seed=4),
        "terminated": terminated,
        "done": terminated | truncated,
    }
    kind = getattr(module, "Rollout", None) or module.Transitions
    return kind(*(fields[name].to(device) for name in kind._fields))


def updated(module, discrete: bool, device: torch.device) -> dict[str, torch.Tensor]:
    """The agent, and what is logged, after two updates on the device: TD3's policy moves in the second."""
    space = gym.spaces.Discrete(2) if discrete else BOX
    obs_space = gym.spaces.Box(-np.inf, np.inf, (OBS_DIM,), np.float32)
    envs = SimpleNamespace(single_observation_space=obs_space, single_action_space=space, num_envs=NUM_ENVS)
    torch.manual_seed(1)
    args = module.Args(**({"num_minibatches": 1, "update_epochs": 2} if module.__name__ == "ppo" else {}))
    agent = module.Agent(envs, args, torch.device("cpu")).double().to(device)
    agent.device = device
    name, log = module.__name__, {}
    if name in POLICY_GRADIENT:
        made, batch = [torch.optim.Adam(agent.parameters(), lr=1e-3, fused=True)], data(module, discrete, device)
    else:
        actor = [p for n, p in agent.named_parameters() if n.startswith("actor") or n == "log_alpha"]
        made = [torch.optim.Adam(part, lr=1e-3, fused=True) for part in (agent.critic.parameters(), actor) if part]
        batch = data(module, discrete, device)
    for update in (1, 2):
        log = getattr(module, f"{name}_update")(agent, *made, batch, args, *([update == 2] if name == "td3" else []))
    log = {key: torch.as_tensor(x, dtype=torch.float64) for key, x in log.items()}
    return {key: x.detach().cpu() for key, x in (agent.state_dict() | log).items()}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("actions", ["discrete", "box"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_update_agrees_with_that_on_the_cpu(script, actions, device, monkeypatch):
    """On the CPU itself: that nothing but weights, batch and noise goes into an update."""
    module, discrete = __import__(script), actions == "discrete"
    if script in SCRIPTS[3:] and discrete != (script == "dqn"):
        pytest.skip(f"{script} does not take these actions")

    def noise(like: torch.Tensor) -> torch.Tensor:
        return numbers(*like.shape, seed=7).to(like)

    monkeypatch.setattr(torch, "randn_like", noise)  # each device has random numbers of its own
    there, expected = updated(module, discrete, torch.device(device)), updated(module, discrete, torch.device("cpu"))
    assert there.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(there[name], x, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
