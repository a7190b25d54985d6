"""The formulas of dqn.py, ddpg.py, td3.py and sac.py, computed another way: by hand, closed form, brute force."""

import collections
import copy
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

import a2c
import ddpg
import dqn
import ppo
import reinforce
import sac
import td3
from tests.conftest import rows

MODULES = {"dqn": dqn, "ddpg": ddpg, "td3": td3, "sac": sac}
CONTINUOUS = {name: MODULES[name] for name in ("ddpg", "td3", "sac")}
everywhere = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
continuous = pytest.mark.parametrize("module", CONTINUOUS.values(), ids=CONTINUOUS)

UNEVEN = gym.spaces.Box(np.array([-1, 0], np.float32), np.array([3, 0.5], np.float32))
CPU = torch.device("cpu")


def spaces(action_space, obs_dim=3, num_envs=1, obs_dtype=np.float32):
    """Stands for vector environments where only the spaces are asked for."""
    low = 0 if obs_dtype == np.uint8 else -np.inf
    obs_space = gym.spaces.Box(low, 255 if low == 0 else np.inf, (obs_dim,), obs_dtype)
    return SimpleNamespace(single_observation_space=obs_space, single_action_space=action_space, num_envs=num_envs)


def action_space(module):
    return gym.spaces.Discrete(4) if module is dqn else UNEVEN


def make_agent(module, seed=0, obs_dim=3, **flags):
    """An agent in float64, whose target networks differ from the networks, and its Args."""
    torch.manual_seed(seed)
    args = module.Args(**flags)
    agent = module.Agent(spaces(action_space(module), obs_dim), args, CPU)
    for name, parameter in agent.named_parameters():
        if "target" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    for critic in (agent.critic, agent.target_critic) if module in (td3, sac) else ():
        q = critic(torch.randn(1000, obs_dim), 2 * torch.rand(1000, 2) - 1)
        critic.b3.data -= q.median(1).values[:, None, None]  # that none of the two is the lower one everywhere
    return agent.double(), args


def make_batch(module, seed=0, size=7, obs_dim=3):
    rng = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randn(2, size, obs_dim, generator=rng, dtype=torch.float64)
    if module is dqn:
        action = torch.randint(4, (size,), generator=rng)
    else:
        action = torch.rand(size, 2, generator=rng, dtype=torch.float64) * 2 - 1
    reward = 3 * torch.randn(size, generator=rng, dtype=torch.float64)
    return module.Transitions(obs, action, reward, next_obs, torch.rand(size, generator=rng) < 0.4)


def clone(agent):
    return {name: x.clone() for name, x in agent.state_dict().items()}


def moved(agent, before):
    return {name for name, x in agent.state_dict().items() if not torch.equal(x, before[name])}


def gradient(module, agent):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@everywhere
def test_hidden_sizes_are_those_of_every_network(module):
    agent, _ = make_agent(module, obs_dim=3, hidden_sizes=(5, 7))
    layers = [layer for layer in agent.modules() if isinstance(layer, torch.nn.Linear)]
    assert {layer.out_features for layer in layers[::3]} == {5}
    assert {(layer.in_features, layer.out_features) for layer in layers[1::3]} == {(5, 7)}
    assert {layer.in_features for layer in layers[2::3]} == {7}


# ----- dqn.py


@pytest.mark.parametrize("double", (False, True))
@pytest.mark.parametrize("dueling", (False, True))
@pytest.mark.parametrize("delta", (0.7, 1.0, math.inf))
def test_the_loss_of_dqn_by_hand(double, dueling, delta):
    agent, args = make_agent(dqn, double=double, dueling=dueling, huber_delta=delta, gamma=0.9)
    batch = make_batch(dqn, size=50)
    q, target_q = agent.critic(batch.obs), agent.target_critic(batch.next_obs)
    next_q = agent.critic(batch.next_obs)
    assert (next_q.argmax(-1) != target_q.argmax(-1)).any(), "otherwise Double DQN is not tested"
    losses, differ = [], False
    for i in range(50):
        y = batch.reward[i].item()
        if not batch.terminated[i]:
            values = target_q[i].tolist()
            best = max(range(4), key=(next_q if double else target_q)[i].tolist().__getitem__)
            y += 0.9 * values[best]
        x = q[i, batch.action[i]].item() - y
        losses.append(x * x / 2 if abs(x) < delta else delta * (abs(x) - delta / 2))
        differ |= abs(x) > 1
    assert differ and batch.terminated.any() and not batch.terminated.all()
    loss, log = dqn.critic_loss(agent, args, batch)
    assert loss.item() == pytest.approx(sum(losses) / 50, rel=1e-9)
    assert log["losses/qf_loss"].item() == loss.item()
    assert log["losses/qf_values"].item() == pytest.approx(q.gather(1, batch.action[:, None]).mean().item())


@pytest.mark.parametrize("double", (False, True))
def test_no_gradient_goes_through_the_target(double):
    """The gradient by finite differences with the target held still."""
    agent, args = make_agent(dqn, double=double, huber_delta=1.0)
    batch = make_batch(dqn)
    dqn.critic_loss(agent, args, batch)[0].backward()
    assert all(p.grad is None for p in agent.target_critic.parameters())
    bias = agent.critic.advantage.bias
    with torch.no_grad():
        next_q = agent.target_critic(batch.next_obs)
        chooser = agent.critic(batch.next_obs) if double else next_q
        y = batch.reward + args.gamma * next_q[torch.arange(7), chooser.argmax(-1)] * ~batch.terminated

        def loss(i, step):
            bias[i] += step
            x = agent.critic(batch.obs)[torch.arange(7), batch.action] - y
            bias[i] -= step
            return torch.where(x.abs() < 1, x * x / 2, x.abs() - 0.5).mean().item()

        numeric = [(loss(i, 1e-6) - loss(i, -1e-6)) / 2e-6 for i in range(4)]
    assert bias.grad.tolist() == pytest.approx(numeric, abs=1e-7)


def test_dueling_is_the_value_plus_the_advantages_less_their_mean():
    agent, _ = make_agent(dqn, dueling=True)
    obs = torch.randn(5, 3, dtype=torch.float64)
    q = agent.critic(obs)
    hidden = agent.critic.fc2(agent.critic.fc1(obs).relu()).relu()
    torch.testing.assert_close(q.mean(-1), agent.critic.value(hidden).squeeze(-1))
    advantage = agent.critic.advantage(hidden)
    torch.testing.assert_close(q - q[:, :1], advantage - advantage[:, :1])
    assert make_agent(dqn)[0].critic.value is None


@given(step=st.integers(0, 3000), fraction=st.floats(0.01, 1), start=st.floats(0, 1), end=st.floats(0, 1))
def test_epsilon_falls_linearly_and_stays(step, fraction, start, end):
    args = dqn.Args(total_timesteps=1000, exploration_fraction=fraction, start_e=start, end_e=end)
    last = fraction * 1000
    expected = end if step >= last else (start * (last - step) + end * step) / last
    assert dqn.epsilon_at(step, args) == pytest.approx(expected, abs=1e-9)


def test_epsilon_is_the_share_of_random_actions_each_environment_its_own():
    agent, _ = make_agent(dqn, eval_epsilon=0.0)
    agent.float()
    obs = np.tile(np.random.default_rng(0).normal(size=3), (100_000, 1))
    np.random.seed(0)
    greedy = agent.act(obs[:1], explore=False)[0]
    for epsilon in (0.0, 0.3, 1.0):
        agent.epsilon = epsilon
        counts = np.bincount(agent.act(obs, explore=True), minlength=4) / 100_000
        expected = np.full(4, epsilon / 4)
        expected[greedy] += 1 - epsilon
        assert counts == pytest.approx(expected, abs=0.006)
    assert (agent.act(obs, explore=False) == greedy).all(), "no epsilon in evaluation, unless it is asked for"
    agent.eval_epsilon = 0.3
    assert (agent.act(obs, explore=False) != greedy).mean() == pytest.approx(0.3 * 3 / 4, abs=0.006)
    pairs = np.array([agent.act(obs[:2], explore=False) for _ in range(20_000)])  # mostly of one kind, or one of each
    assert (pairs != greedy).mean() == pytest.approx(0.3 * 3 / 4, abs=0.012)


def test_actions_that_start_elsewhere_reach_the_environment_as_it_numbers_them():
    agent = dqn.Agent(spaces(gym.spaces.Discrete(3, start=5)), dqn.Args(), CPU)
    assert agent.to_env(np.array([0, 2])).tolist() == [5, 7]
    assert set(agent.random_action(200).tolist()) == {0, 1, 2}
    small = gym.spaces.Discrete(3, start=-1, dtype=np.int8)  # contains no number of 64 bits
    actions = dqn.Agent(spaces(small), dqn.Args(), CPU).to_env(np.array([0, 2]))
    assert actions.tolist() == [-1, 1] and all(small.contains(action) for action in actions)


# ----- ddpg.py, td3.py, sac.py: the critic


def squashed(agent, obs, seed):
    """The action and log-probability that sac.py draws with this seed, from torch.distributions."""
    mean, log_std = agent.actor(obs)
    torch.manual_seed(seed)
    u = mean + log_std.exp() * torch.randn_like(mean)
    distribution = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), [TanhTransform(cache_size=1)])
    action = distribution.transforms[0](u)
    return action, distribution.log_prob(action)


def networks(critic):
    """The networks of a critic, one of ddpg.py, two of td3.py and sac.py, each a function of obs and action."""
    if hasattr(critic, "fc1"):
        layers = [[(layer.weight, layer.bias) for layer in (critic.fc1, critic.fc2, critic.out)]]
    else:
        pairs = (critic.w1, critic.b1), (critic.w2, critic.b2), (critic.w3, critic.b3)
        layers = [[(weight[i].T, bias[i, 0]) for weight, bias in pairs] for i in (0, 1)]

    def network(x, first, second, last):
        for layer in (first, second):
            x = torch.nn.functional.linear(x, *layer).clamp(min=0)
        return torch.nn.functional.linear(x, *last).squeeze(-1)

    return [lambda obs, action, own=own: network(torch.cat([obs, action], -1), *own) for own in layers]


@continuous
def test_the_critics_are_networks_of_their_own(module):
    agent, _ = make_agent(module, hidden_sizes=(5, 4))
    batch = make_batch(module)
    expected = torch.stack([network(batch.obs, batch.action) for network in networks(agent.critic)])
    torch.testing.assert_close(agent.critic(batch.obs, batch.action), expected[0] if module is ddpg else expected)
    if module is td3:
        torch.testing.assert_close(agent.critic(batch.obs, batch.action, both=False), expected[:1])
    weight = torch.randn(len(expected), 7, dtype=torch.float64)  # a gradient that tells all of them apart
    q = agent.critic(batch.obs, batch.action).reshape(weight.shape)
    inputs = list(agent.critic.parameters())
    ours, theirs = (torch.autograd.grad((weight * x).sum(), inputs) for x in (q, expected))
    torch.testing.assert_close(ours, theirs)


@continuous
def test_the_loss_of_the_critic_by_hand(module):
    flags = dict(policy_noise=0.6, noise_clip=0.5) if module is td3 else {}
    agent, args = make_agent(module, gamma=0.9, **flags)
    batch = make_batch(module, size=30)
    torch.manual_seed(5)
    loss, log = module.critic_loss(agent, args, batch)
    if module is ddpg:
        next_action, bonus = agent.target_actor(batch.next_obs), torch.zeros(30)
    critics, target_critics = networks(agent.critic), networks(agent.target_critic)
    assert len(critics) == len(target_critics) == (1 if module is ddpg else 2)
    if module is td3:
        torch.manual_seed(5)
        noise = 0.6 * torch.randn_like(batch.action)
        assert (noise.abs() > 0.5).any()
        next_action = agent.target_actor(batch.next_obs) + noise.clamp(-0.5, 0.5)
        next_action, bonus = next_action.clamp(-1, 1), torch.zeros(30)
    if module is sac:
        next_action, log_prob = squashed(agent, batch.next_obs, seed=5)
        bonus = -0.2 * log_prob
    next_q = [critic(batch.next_obs, next_action).tolist() for critic in target_critics]
    if module is not ddpg:
        assert len({a < b for a, b in zip(*next_q)}) == 2, "each of the two must be the lower one somewhere"
    losses = []
    for i in range(30):
        y = batch.reward[i].item()
        if not batch.terminated[i]:
            y += 0.9 * (min(q[i] for q in next_q) + bonus[i].item())
        losses += [(critic(batch.obs[i : i + 1], batch.action[i : i + 1]).item() - y) ** 2 for critic in critics]
    assert loss.item() == pytest.approx(sum(losses) / 30, rel=1e-6)
    assert log["losses/qf_loss"].item() == loss.item()


@continuous
def test_the_gradient_of_the_critic_is_that_of_its_loss_with_a_constant_target(module):
    agent, args = make_agent(module)
    batch = make_batch(module)
    torch.manual_seed(0)
    module.critic_loss(agent, args, batch)[0].backward()
    names = {name.split(".")[0] for name, p in agent.named_parameters() if p.grad is not None}
    assert names == {"critic"}


TARGETS = {"dqn": ["critic"], "ddpg": ["actor", "critic"], "td3": ["actor", "critic"], "sac": ["critic"]}


@everywhere
def test_target_networks_are_copies_that_share_nothing_and_are_not_trained(module):
    agent = module.Agent(spaces(action_space(module)), module.Args(), CPU)
    assert [n for n, _ in agent.named_children() if "target" in n] == [f"target_{n}" for n in TARGETS[module.__name__]]
    for name in TARGETS[module.__name__]:
        ours, theirs = getattr(agent, name), getattr(agent, f"target_{name}")
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        assert not any(p.requires_grad for p in theirs.parameters())
    addresses = [p.data_ptr() for p in agent.parameters()]
    assert len(addresses) == len(set(addresses))


@pytest.mark.parametrize("module", (td3, sac), ids=("td3", "sac"))
def test_the_twin_critics_begin_apart_and_each_as_a_network_of_torch(module):
    torch.manual_seed(0)
    critic = module.Agent(spaces(UNEVEN), module.Args(), CPU).critic
    for i, (inputs, outputs) in enumerate(((5, 256), (256, 256), (256, 1)), 1):
        weight, bias = getattr(critic, f"w{i}"), getattr(critic, f"b{i}")
        assert weight.shape == (2, inputs, outputs) and bias.shape == (2, 1, outputs)
        assert not torch.isclose(*weight).all() and not torch.isclose(*bias).all()
        for x in (*weight, *bias):
            assert x.abs().max() <= inputs**-0.5, "nn.Linear's: uniform between -1 and 1, over the root of the inputs"
        for x in weight:
            assert x.std().item() == pytest.approx(inputs**-0.5 / 3**0.5, rel=0.15)


# ----- ddpg.py, td3.py, sac.py: the actor


class Quadratic(torch.nn.Module):
    """Q(s, a) = -(a - K s)' M (a - K s) / 2 for a symmetric M."""

    def __init__(self, gain, matrix):
        super().__init__()
        self.gain, self.matrix = torch.nn.Parameter(gain), torch.nn.Parameter(matrix)

    def forward(self, obs, action):
        off = action - obs @ self.gain.T
        return -((off @ self.matrix) * off).sum(-1) / 2


class Twins(torch.nn.ModuleList):
    """Two critics, or the first of them."""

    def __init__(self, *critics):
        super().__init__(critics)

    def forward(self, obs, action, both=True):
        return torch.stack([critic(obs, action) for critic in (self if both else [self[0]])])


@pytest.mark.parametrize("module", (ddpg, td3), ids=("ddpg", "td3"))
def test_the_policy_gradient_is_that_of_a_linear_policy_in_a_linear_quadratic_problem(module):
    """mu(s) = W s in Q(s, a) = -(a - K s)' M (a - K s) / 2: grad_W J = -E[ M (W - K) s s' ]."""
    agent, args = make_agent(module)
    gain, weight = torch.randn(2, 2, 3, dtype=torch.float64)
    root = torch.randn(2, 2, dtype=torch.float64)
    agent.critic = Quadratic(gain, root @ root.T)
    if module is td3:
        agent.critic = Twins(agent.critic, Quadratic(gain + 1, root @ root.T))  # Q1 alone counts
    agent.actor = torch.nn.Linear(3, 2, bias=False).double()
    agent.actor.weight.data[:] = weight
    batch = make_batch(module, size=40)
    loss, log = module.actor_loss(agent, args, batch)
    loss.backward()
    moments = batch.obs.T @ batch.obs / 40
    torch.testing.assert_close(agent.actor.weight.grad, root @ root.T @ (weight - gain) @ moments)
    off = weight - gain
    objective = -(off @ moments @ off.T @ root @ root.T).trace() / 2
    assert log["losses/actor_loss"].item() == pytest.approx(-objective.item())


@pytest.mark.parametrize("module", (ddpg, td3), ids=("ddpg", "td3"))
def test_exploration_is_gaussian_noise_of_each_dimension_and_environment(module):
    agent, _ = make_agent(module, exploration_noise=0.2)
    agent.float()
    obs = np.zeros((100_000, 3))
    mean = agent.act(obs[:1], explore=False)
    assert (np.abs(mean) < 0.2).all(), "far from the bounds, which cut the noise off"
    action = agent.act(obs, explore=True)
    assert action.mean(0) == pytest.approx(mean[0], abs=0.003)
    assert action.std(0) == pytest.approx(np.full(2, 0.2), abs=0.002)
    assert abs(np.corrcoef(action.T)[0, 1]) < 0.02
    agent.exploration_noise = 5.0
    wild = agent.act(obs, explore=True)
    assert wild.min() == -1 and wild.max() == 1 and set(np.abs(wild[np.abs(wild) >= 1])) == {1.0}


@continuous
def test_actions_reach_the_environment_in_its_units(module):
    agent = module.Agent(spaces(UNEVEN), module.Args(), CPU)
    action = agent.to_env(np.array([[-1, -1], [1, 1], [0, 0], [0.5, -0.5]], np.float32))
    assert action.tolist() == [[-1, 0], [3, 0.5], [1, 0.25], [2, 0.125]]
    assert action.dtype == np.float32 and all(UNEVEN.contains(a) for a in action)
    column = gym.spaces.Box(np.array([[-1], [0]], np.float32), np.array([[3], [0.5]], np.float32))
    agent = module.Agent(spaces(column), module.Args(), CPU)
    assert agent.to_env(np.array([[1, -1]], np.float32)).tolist() == [[[3], [0]]]
    uniform = agent.random_action(100_000)
    assert uniform.shape == (100_000, 2) and uniform.dtype == np.float32
    assert uniform.mean(0) == pytest.approx(np.zeros(2), abs=0.01)
    assert uniform.std(0) == pytest.approx(np.full(2, 1 / math.sqrt(3)), abs=0.005)
    assert all(column.contains(a) for a in agent.to_env(uniform[:100]))


@continuous
def test_integer_actions_are_the_nearest(module):
    agent = module.Agent(spaces(gym.spaces.Box(-1, 3, (1,), np.int64)), module.Args(), CPU)
    actions = agent.to_env(np.array([[-1], [-0.8], [-0.7], [0.2], [0.3], [0.7], [0.8], [1]], np.float32))
    assert actions.ravel().tolist() == [-1, -1, 0, 1, 2, 2, 3, 3] and actions.dtype == np.int64


# ----- sac.py: the density, the policy, the temperature


@given(u=st.floats(-8, 8), mean=st.floats(-3, 3), log_std=st.floats(-5, 2))
def test_the_density_is_that_of_torch_distributions(u, mean, log_std):
    u, mean, log_std = (torch.tensor([[x, x / 2]], dtype=torch.float64) for x in (u, mean, log_std))
    tanh = TanhTransform(cache_size=1)
    expected = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), [tanh]).log_prob(tanh(u))
    noise = (u - mean) / log_std.exp()
    torch.testing.assert_close(sac.squashed_log_prob(u, noise, log_std), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mean, log_std", ((0.0, 0.0), (1.0, -1.0), (-2.0, 0.5), (0.3, 1.0)))
def test_the_density_over_the_bounds_of_an_environment_integrates_to_one(mean, log_std):
    """Over asymmetric bounds low and high: a density in units of +-1, over half their distance."""
    low, high = -1.0, 3.0
    u = torch.linspace(-18, 18, 400_001, dtype=torch.float64)
    action = (low + high) / 2 + (high - low) / 2 * u.tanh()
    mean, log_std = torch.tensor([[mean]], dtype=torch.float64), torch.tensor([[log_std]], dtype=torch.float64)
    noise = (u[:, None] - mean) / log_std.exp()
    density = sac.squashed_log_prob(u[:, None], noise, log_std).exp() / ((high - low) / 2)
    assert torch.trapezoid(density, action).item() == pytest.approx(1, abs=1e-4)


def test_the_density_and_its_gradient_are_finite_far_out():
    for x in (-200.0, -20.0, 20.0, 200.0):
        u = torch.tensor([[x]], requires_grad=True)
        log_prob = sac.squashed_log_prob(u, u, torch.zeros(1, 1))  # mean 0, standard deviation 1
        log_prob.backward()
        # log N(u) - log(1 - tanh(u)^2), where 1 - tanh(u)^2 = 4 e^-2|u| but for terms in e^-4|u|
        expected = -x * x / 2 - math.log(2 * math.pi) / 2 - math.log(4) + 2 * abs(x)
        assert log_prob.item() == pytest.approx(expected, rel=1e-6)
        assert u.grad.item() == pytest.approx(-x + 2 * math.copysign(1, x), rel=1e-6)


def test_actions_are_drawn_as_their_log_probability_says_and_the_deterministic_one_is_the_squashed_mean():
    agent, _ = make_agent(sac)
    obs = torch.randn(1, 3, dtype=torch.float64)
    mean, log_std = agent.actor(obs)
    action, log_prob = sac.draw(agent.actor, obs.expand(200_000, 3))
    u = action.atanh()
    torch.testing.assert_close(u.mean(0), mean[0], rtol=0, atol=0.02)
    torch.testing.assert_close(u.std(0), log_std[0].exp(), rtol=0.02, atol=0)
    assert u.T.corrcoef()[0, 1].abs() < 5 / 200_000**0.5, "each dimension has a noise of its own"
    noise = (u - mean) / log_std.exp()
    torch.testing.assert_close(log_prob, sac.squashed_log_prob(u, noise, log_std), rtol=1e-5, atol=1e-5)
    agent.float()
    obs = obs.float().numpy()
    torch.testing.assert_close(torch.from_numpy(agent.act(obs, explore=False)), mean.tanh().float())
    drawn = np.arctanh(agent.act(np.repeat(obs, 100_000, 0), explore=True).astype(np.float64))
    assert drawn.mean(0) == pytest.approx(mean[0].tolist(), abs=0.02)
    assert drawn.std(0) == pytest.approx(log_std[0].exp().tolist(), rel=0.02)


def test_the_log_standard_deviation_stays_within_its_bounds():
    actor = sac.SquashedGaussianActor(3, (256, 256), 2)
    for bias, bound in ((-1e3, -5), (1e3, 2)):
        actor.out.bias.data[2:] = bias
        assert actor(torch.randn(4, 3))[1].tolist() == [[bound] * 2] * 4
    actor.out.weight.data[:] = 0
    actor.out.bias.data[2:] = 0
    assert actor(torch.randn(1, 3))[1].tolist() == [[-1.5, -1.5]]


def test_the_loss_of_the_actor_by_hand_and_its_gradient_by_finite_differences():
    agent, args = make_agent(sac, alpha=0.7)
    batch = make_batch(sac, size=30)

    def loss():
        action, log_prob = squashed(agent, batch.obs, seed=3)
        q = [critic(batch.obs, action).tolist() for critic in networks(agent.critic)]
        assert len({a < b for a, b in zip(*q)}) == 2, "each of the two must be the lower one somewhere"
        return sum(0.7 * lp - min(pair) for lp, pair in zip(log_prob.tolist(), zip(*q))) / 30

    torch.manual_seed(3)
    objective, log = sac.actor_loss(agent, args, batch)
    objective.backward()
    assert log["losses/actor_loss"].item() == pytest.approx(loss(), rel=1e-6)
    assert log["losses/entropy"].item() == pytest.approx(-squashed(agent, batch.obs, 3)[1].mean().item(), rel=1e-6)
    bias = agent.actor.out.bias
    with torch.no_grad():
        for i in range(4):
            bias[i] += 1e-6
            above = loss()
            bias[i] -= 2e-6
            below = loss()
            bias[i] += 1e-6
            assert bias.grad[i].item() == pytest.approx((above - below) / 2e-6, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("log_std", (-3.0, -1.0))
def test_the_temperature_moves_towards_the_target_entropy(log_std):
    """dL / d log alpha = alpha (entropy + number of dimensions): a policy that is too sure makes it grow."""
    agent, args = make_agent(sac, alpha=0.5)
    agent.actor.out.weight.data[:] = 0
    agent.actor.out.bias.data[:] = torch.tensor([0, 0, *[math.atanh((log_std + 5) / 3.5 - 1)] * 2])
    batch = make_batch(sac, size=10_000)
    loss, log = sac.actor_loss(agent, args, batch)
    loss.backward()
    gradient = agent.log_alpha.grad.item()
    assert gradient == pytest.approx(0.5 * (log["losses/entropy"].item() + 2))
    near = 2 * (log_std + (1 + math.log(2 * math.pi)) / 2)  # of the Gaussian, not squashed
    assert (gradient < 0) == (near < -2), "gradient descent must raise the temperature of the surer policy only"
    assert log["losses/alpha_loss"].item() == pytest.approx(gradient), "L is alpha times what does not depend on it"


def test_the_temperature_comes_to_its_closed_form_optimum():
    """In Q = -c |a|^2 / 2 for a large c the best policy is a narrow Gaussian of variance alpha / c, hardly squashed.

    Its entropy log(2 pi e alpha / c) is to be -2: alpha = c / (2 pi e^3).
    """
    curvature = 40.0
    agent, args = make_agent(sac, alpha=1.0, learning_rate=1e-2, q_lr=1e-2)
    agent.critic = Twins(*(Quadratic(torch.zeros(2, 3), curvature * torch.eye(2)) for _ in range(2))).double()
    agent.actor.fc1, agent.actor.fc2 = torch.nn.Identity(), torch.nn.Identity()
    agent.actor.out = torch.nn.Linear(3, 4).double()
    groups = {"params": agent.actor.parameters()}, {"params": [agent.log_alpha]}
    optimizer = torch.optim.Adam(groups, lr=1e-2)
    batch = make_batch(sac, size=512)
    batch = batch._replace(obs=torch.zeros_like(batch.obs))
    for i in range(1500):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2 * (1 - i / 1500)
        optimizer.zero_grad()
        sac.actor_loss(agent, args, batch)[0].backward()
        optimizer.step()
    assert agent.log_alpha.exp().item() == pytest.approx(curvature / (2 * math.pi * math.exp(3)), rel=0.05)


def test_a_fixed_temperature_stays():
    agent, args = make_agent(sac, alpha=0.3, autotune=False)
    agent.float()
    before = agent.log_alpha.clone()
    run_updates(sac, agent, args, 3)
    assert torch.equal(agent.log_alpha, before) and before.exp().item() == pytest.approx(0.3)


# ----- updates


def optimizers(module, agent, args):
    """As in train()."""
    if module is dqn:
        return [torch.optim.Adam(agent.critic.parameters(), lr=args.learning_rate)]
    groups = [{"params": agent.actor.parameters()}]
    if module is sac:
        groups.append({"params": [agent.log_alpha], "lr": args.q_lr * args.autotune})
    return [torch.optim.Adam(agent.critic.parameters(), lr=args.q_lr), torch.optim.Adam(groups, lr=args.learning_rate)]


def run_updates(module, agent, args, count, batch=None, first=0):
    """`count` updates on random batches; yields nothing, returns the last log."""
    made = optimizers(module, agent, args)
    for i in range(first, first + count):
        update = getattr(module, f"{module.__name__}_update")
        single = [x.float() if x.is_floating_point() else x for x in make_batch(module, seed=i)]
        batch = module.Transitions(*single)
        log = update(agent, *made, batch, args, *([i % args.policy_frequency == 0] if module is td3 else []))
    return log


@everywhere
def test_polyak_is_an_average_of_every_parameter(module):
    agent, _ = make_agent(module)
    name = TARGETS[module.__name__][-1]
    source, target = getattr(agent, name), getattr(agent, f"target_{name}")
    for tau in (0.005, 0.7, 1.0):
        before, kept = clone(target), clone(source)
        module.polyak(target, source, tau)
        for name, x in target.state_dict().items():
            torch.testing.assert_close(x, tau * kept[name] + (1 - tau) * before[name])
            assert torch.equal(source.state_dict()[name], kept[name])
    assert all(torch.equal(x, kept[name]) for name, x in target.state_dict().items()), "tau = 1 copies to the last bit"


@pytest.mark.parametrize("module", (ddpg, sac), ids=("ddpg", "sac"))
def test_an_update_moves_everything_and_the_targets_by_polyak_of_the_new_networks(module):
    agent, args = make_agent(module, tau=0.1)
    agent.float()
    before = clone(agent)
    log = run_updates(module, agent, args, 1)
    assert moved(agent, before) == before.keys()
    for name, x in agent.state_dict().items():
        if name.startswith("target_"):
            new = agent.state_dict()[name.removeprefix("target_")]
            torch.testing.assert_close(x, 0.1 * new + 0.9 * before[name])
    assert {"losses/qf_loss", "losses/qf_values", "losses/actor_loss"} <= log.keys()
    assert all(x.dim() == 0 and not x.requires_grad for x in log.values())


@pytest.mark.parametrize("due", (True, False))
def test_td3_moves_its_actor_and_targets_when_it_is_told_to_only(due):
    agent, args = make_agent(td3, tau=0.1)
    agent.float()
    critics = {name for name in agent.state_dict() if name.startswith("critic")}
    made = optimizers(td3, agent, args)
    for update in range(3):
        before = clone(agent)
        batch = td3.Transitions(*(x.float() if x.is_floating_point() else x for x in make_batch(td3, seed=update)))
        log = td3.td3_update(agent, *made, batch, args, due)
        assert moved(agent, before) == (before.keys() if due else critics)
        assert ("losses/actor_loss" in log) == due
        for name, x in agent.state_dict().items():
            if name.startswith("target_") and due:
                new = agent.state_dict()[name.removeprefix("target_")]
                torch.testing.assert_close(x, 0.1 * new + 0.9 * before[name])


def test_dqn_moves_its_network_alone():
    agent, args = make_agent(dqn)
    agent.float()
    before = clone(agent)
    run_updates(dqn, agent, args, 1)
    assert moved(agent, before) == {name for name in before if name.startswith("critic")}


def watched_update(module, agent, args, seed=0):
    """An update with steps of 0: the gradients that each optimizer finds in the agent, by name."""
    found = []

    def watch(*_):
        found.append({name: p.grad.clone() for name, p in agent.named_parameters() if p.grad is not None})

    made = optimizers(module, agent, args)
    for optimizer in made:
        optimizer.register_step_pre_hook(watch)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    update = getattr(module, f"{module.__name__}_update")
    torch.manual_seed(seed)
    update(agent, *made, make_batch(module, seed=seed), args, *([True] if module is td3 else []))
    assert not any(p.grad is not None for p in agent.parameters())
    return found


@everywhere
def test_each_step_follows_the_gradient_of_its_own_loss_alone(module):
    """Nothing is left over from the other loss or from the update before."""
    agent, args = make_agent(module)
    losses = {module.critic_loss: ("critic",)}
    if module is not dqn:
        losses[module.actor_loss] = ("actor", "log_alpha")
    for seed in range(2):
        expected = []
        torch.manual_seed(seed)
        for function, moving in losses.items():
            function(agent, args, make_batch(module, seed=seed))[0].backward()
            grads = {name: p.grad for name, p in agent.named_parameters() if name.split(".")[0] in moving}
            assert all(x.any() for x in grads.values())
            expected.append(grads)
            agent.zero_grad()
        torch.testing.assert_close(watched_update(module, agent, args, seed), expected)
    assert all(p.requires_grad for name, p in agent.named_parameters() if "target" not in name)


@continuous
def test_the_actor_climbs_the_critic_as_it_is_after_its_own_step(module, monkeypatch):
    """The order of the papers' algorithms: the critics first."""
    agent, args = make_agent(module)
    agent.float()
    seen, actor_loss = [], module.actor_loss

    def spy(agent, args, batch):
        seen.append(moved(agent, before))
        return actor_loss(agent, args, batch)

    before = clone(agent)
    monkeypatch.setattr(module, "actor_loss", spy)
    run_updates(module, agent, args, 1)
    assert seen == [{name for name in before if name.startswith("critic")}]


@settings(deadline=None)
@given(
    num_envs=st.integers(1, 7),
    train_frequency=st.integers(1, 12),
    gradient_steps=st.integers(1, 3),
    learning_starts=st.integers(0, 40),
)
def test_the_ratio_of_updates_to_steps_does_not_depend_on_the_number_of_environments(
    num_envs, train_frequency, gradient_steps, learning_starts
):
    """Against a loop that goes through the steps one by one: so many updates at every multiple of train_frequency."""
    flags = dict(train_frequency=train_frequency, gradient_steps=gradient_steps, learning_starts=learning_starts)
    for module in MODULES.values():
        args = module.Args(num_envs=num_envs, **flags)
        done, step = [], 0
        while step < 100:
            step += num_envs
            done += range(module.updates_by(step - num_envs, args), module.updates_by(step, args))
            due = [s for s in range(learning_starts + 1, step + 1) if s % train_frequency == 0]
            assert done == list(range(gradient_steps * len(due)))


# ----- replay


def numbered(module, first, num_envs, obs_dtype=np.float32):
    """One transition of each environment, all different."""
    n = np.arange(first, first + num_envs)
    obs = (n[:, None] + np.array([0, 0.25, 0.5])).astype(obs_dtype)
    action = n % 4 if module is dqn else np.stack([n, -n], 1).astype(np.float32)
    return obs, action, n * 10.0, obs + obs_dtype(1), n % 3 == 0


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 20), num_envs=st.integers(1, 5), turns=st.integers(1, 30))
def test_the_ring_holds_the_last_transitions(size, num_envs, turns):
    for module in MODULES.values():
        buffer = module.ReplayBuffer(spaces(action_space(module), num_envs=num_envs), size, CPU)
        assert buffer.size == max(size, num_envs) == len(buffer.rows.reward)
        model = collections.deque(maxlen=buffer.size)
        for turn in range(turns):
            new = numbered(module, turn * num_envs, num_envs)
            buffer.add(*new)
            model.extend(range(turn * num_envs, (turn + 1) * num_envs))
        batch = buffer.sample(400)
        numbers = (batch.reward / 10).long()
        assert set(numbers.tolist()) <= set(model)
        for row, n in enumerate(numbers.tolist()):
            for x, y in zip((column[row] for column in batch), numbered(module, n, 1)):
                assert torch.equal(x, torch.from_numpy(y[0:1]).to(x.dtype)[0])


def test_samples_are_uniform_over_what_is_there():
    buffer = ddpg.ReplayBuffer(spaces(UNEVEN, num_envs=2), 20, CPU)
    for turn in range(5):
        buffer.add(*numbered(ddpg, 2 * turn, 2))
    torch.manual_seed(0)
    counts = torch.bincount((buffer.sample(100_000).reward / 10).long(), minlength=10)
    assert len(counts) == 10
    chi2 = ((counts - 10_000).square() / 10_000).sum().item()
    assert chi2 < 27.9, "beyond the 99.9 % quantile of chi^2 with 9 degrees of freedom"


@everywhere
def test_bytes_stay_bytes_in_the_buffer_and_are_floats_for_the_networks(module):
    buffer = module.ReplayBuffer(spaces(action_space(module), obs_dtype=np.uint8), 10, CPU)
    buffer.add(*numbered(module, 101, 1, np.uint8))
    assert buffer.rows.obs.dtype == buffer.rows.next_obs.dtype == torch.uint8
    batch = buffer.sample(1)
    assert batch.obs.dtype == torch.float32 and batch.obs.tolist() == [pytest.approx([101 / 255] * 3)]
    assert batch.next_obs.tolist() == [pytest.approx([102 / 255] * 3)]
    agent = module.Agent(spaces(action_space(module), obs_dtype=np.uint8), module.Args(), CPU)
    seen = []
    network = agent.critic if module is dqn else agent.actor
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    agent.act(np.full((1, 3), 101, np.uint8), explore=False)
    torch.testing.assert_close(seen[0], batch.obs)


@everywhere
@pytest.mark.parametrize("obs_dtype", (np.float64, np.int32))
def test_all_other_numbers_are_stored_as_float32(module, obs_dtype):
    buffer = module.ReplayBuffer(spaces(action_space(module), obs_dtype=obs_dtype), 10, CPU)
    obs, action, reward, next_obs, terminated = numbered(module, 3, 1, obs_dtype)
    buffer.add(obs, action, reward.astype(int), next_obs, terminated)
    batch = buffer.sample(2)
    assert batch.obs.dtype == batch.next_obs.dtype == batch.reward.dtype == torch.float32
    assert batch.terminated.dtype == torch.bool and batch.obs[0].tolist() == obs[0].tolist()
    assert batch.action.dtype == (torch.int64 if module is dqn else torch.float32)


@everywhere
@pytest.mark.parametrize("turns", (3, 5, 7))
def test_a_buffer_goes_on_from_a_checkpoint(module, turns):
    """Not yet full, just full, and when it has begun anew."""
    make = lambda size: module.ReplayBuffer(spaces(action_space(module), num_envs=2), size, CPU)  # noqa: E731
    buffer, other = make(10), make(10)
    for turn in range(turns):
        buffer.add(*numbered(module, 2 * turn, 2))
    state = buffer.state_dict()
    assert len(state["obs"]) == min(2 * turns, 10) and state["obs"].untyped_storage().nbytes() == state["obs"].nbytes
    other.load_state_dict(state)
    for ring in (buffer, other):
        ring.add(*numbered(module, 100, 2))
    torch.manual_seed(0)
    first = buffer.sample(50)
    torch.manual_seed(0)
    assert all(map(torch.equal, first, other.sample(50)))
    if turns <= 5:
        larger = make(20)
        larger.load_state_dict(state)
        for turn in range(turns, 10):
            larger.add(*numbered(module, 2 * turn, 2))
        assert set(larger.rows.reward.tolist()) == {10.0 * n for n in range(20)}
    else:
        with pytest.raises(ValueError, match="holds 10 transitions, not 20"):
            make(20).load_state_dict(state)
    if turns > 3:
        with pytest.raises(ValueError, match="not 8"):
            make(8).load_state_dict(state)


@everywhere
def test_a_buffer_says_its_size_and_refuses_one_that_cannot_fit(module, capsys):
    envs = spaces(action_space(module), obs_dim=1000)
    assert module.ReplayBuffer(envs, 1000, CPU).about == "replay buffer: 1,000 transitions, 8.0 MB on cpu"
    with pytest.raises(SystemExit) as end:
        module.ReplayBuffer(envs, 10**12, CPU)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert not out and "1,000,000,000,000 transitions" in err and "--buffer-size" in err
    assert module.free_memory(CPU) > 1e8


@everywhere
def test_the_memory_that_is_free_decides_whether_a_buffer_fits(module, monkeypatch):
    envs = spaces(action_space(module), obs_dim=1000)
    size = 1000 * sum(math.prod(x.shape[1:]) * x.itemsize for x in module.ReplayBuffer(envs, 1, CPU).rows)
    monkeypatch.setattr(module, "free_memory", lambda device: size + 1)
    module.ReplayBuffer(envs, 1000, CPU)
    monkeypatch.setattr(module, "free_memory", lambda device: size - 1)
    with pytest.raises(SystemExit):
        module.ReplayBuffer(envs, 1000, CPU)


# ----- compilation


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@everywhere
def test_compiled_updates_agree_with_the_eager_ones(module):
    """Over 20 updates with the same noise and a learning rate that changes; what remains is round-off, in float64."""
    states = []
    for compiled in (False, True):
        agent, args = make_agent(module)
        if module is sac:  # float32, for torch 2.13 loses what a graph does to a single number in float64
            agent.log_alpha.data = agent.log_alpha.data.float()
        made = optimizers(module, agent, args)
        update = getattr(module, f"{module.__name__}_update")
        if compiled:
            update = module.accelerated(update, module.Args(compile=True), CPU)
        torch.manual_seed(7)
        for i in range(20):
            made[0].param_groups[0]["lr"] = 1e-3 * (1 - i / 20)
            move_actor = [i % 2 == 0] if module is td3 else []
            update(agent, *made, make_batch(module, seed=i), args, *move_actor)
        states.append(clone(agent))
    for name, x in states[0].items():
        torch.testing.assert_close(states[1][name], x, rtol=1e-6, atol=1e-6 if module is sac else 1e-8)


@pytest.mark.parametrize("module", (reinforce, a2c, ppo, dqn, ddpg, td3, sac))
@pytest.mark.parametrize("kind", ("Adam", "AdamW", "RMSprop"))
@pytest.mark.parametrize("compiling", (False, True), ids=("eager", "compiling"))
def test_a_fast_optimizer_takes_the_steps_of_that_of_torch(module, compiling, kind, monkeypatch):
    """With two groups, a rate that changes, gradients that lack at times or always; from and to a state in between."""
    torch.manual_seed(0)
    options = dict(alpha=0.9) if kind == "RMSprop" else dict(betas=(0.8, 0.999))
    networks = [torch.nn.ParameterList([torch.randn(2, 3), torch.randn(3), torch.randn(1), torch.randn(2)]).double()]
    networks.append(copy.deepcopy(networks[0]))
    made = []
    for a, b, c, unused in networks:
        groups = {"params": [a, unused]}, {"params": [b, c], "lr": 0.03}
        made.append(getattr(torch.optim, kind)(groups, lr=0.01, eps=1e-3, weight_decay=0.1, **options))
    fast = None
    for i in range(12):
        rates = 0.01 / (i + 1), 0.03
        grads = [torch.randn_like(p) for p in networks[0]]
        for network, optimizer in zip(networks, made):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate
            for p, grad in list(zip(network, grads))[: 3 if i % 3 else 2]:
                p.grad = grad.clone()
        made[0].step()
        made[0].zero_grad()
        if i in (4, 8):  # as a checkpoint does
            state = copy.deepcopy(made[1].state_dict())
            made[1].load_state_dict(state)
            fast = None
        if i < 2:
            made[1].step()
            made[1].zero_grad()
        else:
            fast = fast or module.FastOptimizer(made[1])
            assert fast.up_to_date() is fast
            with monkeypatch.context() as patch:
                patch.setattr(torch.compiler, "is_compiling", lambda: compiling)
                fast.step()
            fast.zero_grad()
        assert all(p.grad is None for p in networks[1])
    for x, y in zip(*networks):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)
    assert not torch.equal(networks[1][0], grads[0]) and torch.equal(networks[0][3], networks[1][3])
    for state, other in zip(*(x.state_dict()["state"].values() for x in made)):
        for name in state:
            torch.testing.assert_close(state[name].double(), other[name].double(), rtol=1e-7, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", (reinforce, a2c, ppo, dqn, ddpg, td3, sac))
def test_a_run_with_compile_is_one_graph_and_the_same_run(module, tmp_path, monkeypatch):
    """The graph is traced as ever and then interpreted, so that no C++ is needed; what remains is round-off."""
    compiler, graphs, logs = torch.compile, [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, fullgraph, mode: compiler(f, fullgraph=fullgraph, backend=backend))
    flags = {"total_timesteps": 60, "learning_starts": 30, "batch_size": 8, "log_every": 1}
    if module in (reinforce, a2c, ppo):
        flags = {"total_timesteps": 256, "num_envs": 2, "log_every": 1}
    if module is ppo:
        flags |= {"num_steps": 32, "num_minibatches": 2}
    torch._dynamo.reset()
    for compiled in (False, True):
        args = module.Args(compile=compiled, eval_episodes=0, runs_dir=str(tmp_path / str(compiled)), **flags)
        logs.append(rows(module.train(args)))
    torch._dynamo.reset()
    assert len(graphs) == (2 if module in (reinforce, td3) else 1), "td3: with and without actor; reinforce: any length"
    for row, expected in zip(*logs, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert any("losses" in name for name in row)


@pytest.mark.parametrize("module", (reinforce, a2c, ppo, dqn, ddpg, td3, sac))
@pytest.mark.parametrize("device, mode", (("cpu", "default"), ("cuda", "reduce-overhead")))
def test_compile_makes_one_graph_of_the_whole_function(module, device, mode, monkeypatch):
    """On CUDA a CUDA graph, whose results are copied before it runs again; the optimizer in it stays the same one."""
    asked, given, results = [], [], {"losses/x": torch.ones(())}

    def function(x, optimizer):
        assert isinstance(optimizer, module.FastOptimizer)
        return results

    def compiler(function, **options):
        asked.append((function, options))
        return lambda x, optimizer: given.append(optimizer) or results | {"x": x}

    monkeypatch.setattr(torch, "compile", compiler)
    accelerated = module.accelerated(function, module.Args(compile=True), torch.device(device))
    assert asked == [(function, {"fullgraph": True, "mode": mode})]
    assert torch._inductor.config.fallback_random == (device == "cpu"), "the random numbers of torch"
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], lr=0.5)
    log = accelerated(torch.zeros(()), optimizer)
    results["losses/x"].add_(1)
    assert log == {"losses/x": 1 if device == "cuda" else 2, "x": 0}
    optimizer.param_groups[0]["lr"] = 0.25
    accelerated(torch.zeros(()), optimizer)
    assert given[0] is given[1] and given[0].param_groups is optimizer.param_groups and given[0].groups[0][3] == 0.25
    eager = module.accelerated(function, module.Args(compile=False), torch.device(device))
    assert eager(torch.zeros(()), optimizer) is results and len(asked) == 1


@pytest.mark.parametrize("module", (reinforce, a2c, ppo, dqn, ddpg, td3, sac))
@pytest.mark.parametrize(
    "kind, options",
    (("SGD", {}), ("Adam", {"amsgrad": True}), ("Adam", {"maximize": True}), ("RMSprop", {"momentum": 0.9})),
    ids=("SGD", "amsgrad", "maximize", "momentum"),
)
def test_optimizers_without_a_fast_form_stay_as_they_are(module, kind, options):
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = getattr(torch.optim, kind)([p], lr=0.1, **options)
    function = module.accelerated(lambda optimizer: optimizer, module.Args(), CPU)
    assert function(optimizer) is optimizer
    derived = type("Mine", (torch.optim.Adam,), {})([p])
    assert function(derived) is derived, "its step may be another one"
    assert isinstance(function(torch.optim.AdamW([p])), module.FastOptimizer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", (reinforce, a2c, ppo, dqn, ddpg, td3, sac))
def test_one_process_may_compile_for_many_networks(module, monkeypatch):
    """As one that trains with several sizes or environments; torch stops at eight, if nobody tells it to go on."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph, mode: compiler(f, fullgraph=fullgraph, backend="eager"))

    def function(layer):
        return {"x": layer(torch.ones(layer.in_features))}

    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        for width in range(1, 13):
            layer = torch.nn.Linear(width, 1)
            x = module.accelerated(function, module.Args(compile=True), CPU)(layer)["x"]
            assert torch.equal(x, function(layer)["x"])
    torch._dynamo.reset()


# ----- products of matrices -------------------------------------------------------------------------------------------


ZEN4 = {"cpu_name": "AMD EPYC 9R14", "avx512_bf16": True, "amx_bf16": False}


@pytest.mark.parametrize("module", (reinforce, a2c, ppo, dqn, ddpg, td3, sac))
def test_onednn_multiplies_in_float32_or_not_at_all(module, monkeypatch):
    """Products of rounded factors (bfloat16) would be wrong in the third digit; on Intel too, were it used there."""
    cpu = torch.cpu.get_capabilities() | {"cpu_name": "AMD"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    x, y = torch.randn(2, 256, 256, dtype=torch.float32)
    accelerated = module.accelerated(torch.matmul, module.Args(onednn=True), CPU)
    assert (accelerated(x, y) - x.double() @ y.double()).abs().max() < 5e-4


@pytest.mark.parametrize("module", (reinforce, a2c, ppo, dqn, ddpg, td3, sac))
@pytest.mark.parametrize(
    "cpu, device, used",
    (
        (ZEN4, "cpu", "bf16"),
        (ZEN4, "cuda", "none"),
        (ZEN4 | {"amx_bf16": True}, "cpu", "none"),
        (ZEN4 | {"avx512_bf16": False}, "cpu", "none"),
        (ZEN4 | {"cpu_name": "Intel Xeon"}, "cpu", "none"),
        ({}, "cpu", "none"),
    ),
)
def test_onednn_is_used_where_it_is_faster_and_exact(module, cpu, device, used, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    precisions = []

    def product():
        precisions.append(torch.backends.mkldnn.matmul.fp32_precision)
        if len(precisions) == 3:
            raise RuntimeError

    accelerated = module.accelerated(product, module.Args(onednn=True), torch.device(device))
    accelerated()
    module.accelerated(product, module.Args(onednn=False), torch.device(device))()
    with pytest.raises(RuntimeError):
        accelerated()
    assert precisions == [used, "none", used]
    assert torch.backends.mkldnn.matmul.fp32_precision == "none", "also after an error"
