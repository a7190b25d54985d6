"""The formulas of the docstrings, computed another way: definition, enumeration, closed form, torch.distributions."""

import itertools
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import a2c
import ppo
import reinforce

MODULES = {"reinforce": reinforce, "a2c": a2c, "ppo": ppo}
everywhere = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


def spaces(action_space, obs_dim=3):
    """Stands for vector environments where only the spaces are asked for."""
    obs_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,))
    return SimpleNamespace(single_observation_space=obs_space, single_action_space=action_space)


def random_rollout(seed, steps, num_envs, obs_dim=3, end=0.3):
    """Random numbers in the form of a rollout; episodes end in either way, and in both at once, at any step."""
    rng = torch.Generator().manual_seed(seed)
    terminated = torch.rand(steps, num_envs, generator=rng) < end / 2
    truncated = torch.rand(steps, num_envs, generator=rng) < end / 2
    obs, next_obs = torch.randn(2, steps, num_envs, obs_dim, generator=rng, dtype=torch.float64)
    reward = torch.randn(steps, num_envs, generator=rng, dtype=torch.float64)
    action = torch.randint(2, (steps, num_envs), generator=rng)
    return ppo.Rollout(obs, action, reward, next_obs, terminated, terminated | truncated)


sizes = dict(seed=st.integers(0, 2**31), steps=st.integers(1, 12), num_envs=st.integers(1, 4))
unit = st.floats(0, 1)


# ----- returns and advantages


@settings(deadline=None)
@given(gamma=unit, gae_lambda=unit, end=unit, **sizes)
def test_gae_is_its_definition(seed, steps, num_envs, gamma, gae_lambda, end):
    """A_t = sum_l (gamma lambda)^l delta_{t+l} up to the end of the episode or of the rollout, in O(T^2)."""
    rollout = random_rollout(seed, steps, num_envs, end=end)
    value, next_value = torch.randn(
        2, steps, num_envs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    for module in (a2c, ppo):
        advantage = module.gae(rollout, value, next_value, gamma, gae_lambda)
        for n, t in itertools.product(range(num_envs), range(steps)):
            expected, weight = 0.0, 1.0
            for k in range(t, steps):
                future = 0.0 if rollout.terminated[k, n] else next_value[k, n].item()
                expected += weight * (rollout.reward[k, n].item() + gamma * future - value[k, n].item())
                weight *= gamma * gae_lambda
                if rollout.done[k, n]:
                    break
            assert advantage[t, n].item() == pytest.approx(expected, abs=1e-6)


@settings(deadline=None)
@given(gamma=unit, **sizes)
def test_lambda_one_is_the_n_step_return(seed, steps, num_envs, gamma):
    rollout = random_rollout(seed, steps, num_envs)
    # V is one function of the state: where an episode goes on, the next value is the value of the next row
    value = torch.randn(steps, num_envs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    next_value = torch.cat([value[1:], value[:1]])
    target = a2c.gae(rollout, value, next_value, gamma, 1.0) + value
    for n, t in itertools.product(range(num_envs), range(steps)):
        expected, discount = 0.0, 1.0
        for k in range(t, steps):
            expected += discount * rollout.reward[k, n].item()
            discount *= gamma
            if rollout.done[k, n] or k == steps - 1:
                expected += 0.0 if rollout.terminated[k, n] else discount * next_value[k, n].item()
                break
        assert target[t, n].item() == pytest.approx(expected, abs=1e-6)


@settings(deadline=None)
@given(gamma=unit, **sizes)
def test_reward_to_go_is_its_definition(seed, steps, num_envs, gamma):
    """The value of the last state stands for the rest of a truncated episode, and only there."""
    rollout = random_rollout(seed, steps, num_envs)
    next_value = torch.randn(steps, num_envs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    returns = reinforce.reward_to_go(rollout, next_value, gamma)
    for n, t in itertools.product(range(num_envs), range(steps)):
        expected, discount = 0.0, 1.0
        for k in range(t, steps):
            expected += discount * rollout.reward[k, n].item()
            discount *= gamma
            if rollout.done[k, n]:
                expected += 0.0 if rollout.terminated[k, n] else discount * next_value[k, n].item()
                break
        assert returns[t, n].item() == pytest.approx(expected, abs=1e-6)


# ----- REINFORCE: the exact gradient, by enumeration

STEPS, ACTIONS = 3, 2


def dynamics(t, state, action):
    """A small MDP, [(probability, next state, reward, terminated)]; action 1 may end the episode, step 2 does."""
    reward = [[1.0, -0.5], [0.3, 2.0], [-1.2, 0.7]][state][action]
    if t == STEPS - 1:
        return [(1.0, 0, reward, True)]
    if action == 1:
        return [(0.4, 0, reward, True), (0.6, 2, reward - 1.0, False)]
    return [(0.7, 1, reward, False), (0.3, 2, reward + 0.5, False)]


def trajectories(prefix=(), state=0, probability=1.0):
    """All episodes: (probability of the transitions, [(state, action, reward, terminated)])."""
    for action in range(ACTIONS):
        for p, next_state, reward, terminated in dynamics(len(prefix), state, action):
            episode = (*prefix, (state, action, reward, terminated))
            if terminated:
                yield probability * p, episode
            else:
                yield from trajectories(episode, next_state, probability * p)


def one_hot(state):
    return torch.eye(3, dtype=torch.float64)[state]


def as_rollout(episodes, seed=0):
    """Two episodes side by side; after its end an environment goes on with noise, which must not count."""
    rollout = random_rollout(seed, STEPS + 2, len(episodes))
    for n, episode in enumerate(episodes):
        for t, (state, action, reward, terminated) in enumerate(episode):
            rollout.obs[t, n], rollout.action[t, n], rollout.reward[t, n] = one_hot(state), action, reward
            rollout.terminated[t, n] = rollout.done[t, n] = terminated
    return rollout


class Recorder:
    """An optimizer that notes the gradient of the policy and changes nothing."""

    def __init__(self, agent):
        self.agent = agent

    def zero_grad(self):
        self.agent.zero_grad()

    def step(self):
        self.gradient = torch.cat([p.grad.flatten() for p in self.agent.policy.parameters()])


def exact_gradient(agent, gamma):
    """sum_t sum_s P(s_t = s) sum_a grad pi(a|s) Q_t(s, a) by dynamic programming."""

    def policy(state):
        return agent.policy.net(one_hot(state).unsqueeze(0)).softmax(-1)[0]

    def q(t, state, action):
        total = 0.0
        for p, next_state, reward, terminated in dynamics(t, state, action):
            total += p * (reward + (0.0 if terminated else gamma * v(t + 1, next_state)))
        return total

    def v(t, state):
        return sum(policy(state)[a].item() * q(t, state, a) for a in range(ACTIONS))

    objective, visits = 0.0, {0: 1.0}
    for t in range(STEPS):
        following = {}
        for state, p in visits.items():
            for action in range(ACTIONS):
                objective = objective + p * policy(state)[action] * q(t, state, action)
                for chance, next_state, _, terminated in dynamics(t, state, action):
                    if not terminated:
                        more = p * policy(state)[action].item() * chance
                        following[next_state] = following.get(next_state, 0.0) + more
        visits = following
    return torch.cat([g.flatten() for g in torch.autograd.grad(objective, tuple(agent.policy.parameters()))])


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("baseline", ["none", "mean", "value"])
def test_reinforce_is_unbiased(baseline, gamma):
    """The estimate, averaged over all pairs of episodes by their probability, is the policy gradient (theorem)."""
    torch.manual_seed(0)
    args = reinforce.Args(baseline=baseline, gamma=gamma, num_envs=2, norm_obs=False, norm_reward=False)
    agent = reinforce.Agent(spaces(gym.spaces.Discrete(ACTIONS)), args, torch.device("cpu")).double()
    for p in agent.parameters():
        torch.nn.init.normal_(p, std=0.5)
    log_policy = agent.policy.net(torch.eye(3, dtype=torch.float64)).log_softmax(-1).detach()

    def probability(chance, episode):
        return chance * sum(log_policy[state, action] for state, action, _, _ in episode).exp()

    episodes = list(trajectories())
    assert sum(probability(*e) for e in episodes).item() == pytest.approx(1.0)
    mean, total = 0.0, 0.0
    for seed, (first, second) in enumerate(itertools.product(episodes, repeat=2)):
        recorder = Recorder(agent)
        reinforce.reinforce_update(agent, recorder, as_rollout([first[1], second[1]], seed), args)
        weight = probability(*first) * probability(*second)
        mean, total = mean + weight * recorder.gradient, total + weight
    assert total.item() == pytest.approx(1.0)
    torch.testing.assert_close(-mean, exact_gradient(agent, gamma), rtol=1e-6, atol=1e-7)


def test_exact_gradient_is_that_of_the_expected_return():
    """The oracle above, checked by brute force: autograd through the probabilities of all episodes."""
    torch.manual_seed(1)
    args = reinforce.Args(norm_obs=False, norm_reward=False)
    agent = reinforce.Agent(spaces(gym.spaces.Discrete(ACTIONS)), args, torch.device("cpu")).double()
    log_policy = agent.policy.net(torch.eye(3, dtype=torch.float64)).log_softmax(-1)
    expected_return = 0.0
    for chance, episode in trajectories():
        log_probability = sum(log_policy[state, action] for state, action, _, _ in episode)
        expected_return = expected_return + chance * log_probability.exp() * sum(reward for _, _, reward, _ in episode)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected_return, tuple(agent.policy.parameters()))])
    torch.testing.assert_close(exact_gradient(agent, 1.0), gradient, rtol=1e-9, atol=1e-12)


def test_mean_of_others_looks_at_no_step_of_its_own_episode():
    returns = torch.tensor([[1.0, 10.0, 5.0], [2.0, 99.0, 7.0]])
    played = torch.tensor([[True, True, True], [True, False, True]])
    baseline = reinforce.mean_of_others(returns, played)
    torch.testing.assert_close(baseline, torch.tensor([22 / 3, 15 / 4, 13 / 3]))


@pytest.mark.parametrize("baseline", ["none", "mean", "value"])
def test_reinforce_judges_the_steps_of_first_episodes_by_return_minus_baseline(baseline):
    """The sign of a baseline changes no mean, and so needs a test of its own."""
    agent, args = real_agent(reinforce, baseline=baseline, num_envs=3)
    rollout = random_rollout(5, 10, 3)
    rollout.done[-1] = rollout.terminated[-1] = True
    with torch.no_grad():
        value, next_value = agent.value(rollout.obs), agent.value(rollout.next_obs)
    if baseline != "value":
        next_value = torch.zeros_like(next_value)
    returns = reinforce.reward_to_go(rollout, next_value, args.gamma)
    lengths = [1 + rollout.done[:, n].tolist().index(True) for n in range(3)]
    assert len(set(lengths)) > 1
    expected = {}
    for n, t in ((n, t) for n in range(3) for t in range(lengths[n])):
        others = [returns[i, m] for m in range(3) if m != n for i in range(lengths[m])]
        b = {"none": 0.0, "mean": sum(others) / len(others), "value": value[t, n]}[baseline]
        expected[rollout.obs[t, n, 0].item()] = (rollout.action[t, n], returns[t, n] - b, returns[t, n])
    seen = []

    def spy(agent, optimizer, batch, args):
        assert not any(x.requires_grad for x in batch)
        for obs, action, target, advantage in zip(*batch):
            seen.append(obs[0].item())
            torch.testing.assert_close(torch.stack([action, advantage, target]), torch.stack(expected[seen[-1]]))
        return reinforce.reinforce_step(agent, optimizer, batch, args)

    reinforce.reinforce_update(agent, torch.optim.SGD(agent.parameters(), lr=0.1), rollout, args, spy)
    assert sorted(seen) == sorted(expected)


def test_reinforce_gradient_in_closed_form():
    """d/dlogpi = -A / N for N episodes; d/dV = (V - G) / B: V learns the return, not the advantage."""
    log_prob, value, entropy, advantage, target = np.random.default_rng(0).normal(size=(5, 6))
    agent = Table(log_prob, value, entropy)
    args = reinforce.Args(baseline="value", num_envs=2)
    batch = [torch.arange(6), None, torch.tensor(target), torch.tensor(advantage)]
    reinforce.reinforce_loss(agent, args, batch)[0].backward()
    np.testing.assert_allclose(agent.tables[0].grad, -advantage / 2, atol=1e-12)
    np.testing.assert_allclose(agent.tables[1].grad, (value - target) / 6, atol=1e-12)
    assert agent.tables[2].grad is None


# ----- policies


@everywhere
@pytest.mark.parametrize("space", [gym.spaces.Discrete(2), gym.spaces.Box(-1, 1, (2,))], ids=["Discrete", "Box"])
def test_hidden_sizes_are_those_of_every_network(module, space):
    agent = module.Agent(spaces(space, obs_dim=3), module.Args(hidden_sizes=(5, 7)), torch.device("cpu"))
    for net, outputs in ((agent.policy.net, 2), (agent.critic, 1)):
        layers = net.fc1, net.fc2, net.out
        assert [(layer.in_features, layer.out_features) for layer in layers] == [(3, 5), (5, 7), (7, outputs)]


@everywhere
def test_categorical_is_torch_distributions(module):
    torch.manual_seed(0)
    policy = module.CategoricalPolicy(3, (64, 64), gym.spaces.Discrete(5))
    torch.nn.init.normal_(policy.net.out.weight)
    obs, action = torch.randn(50, 3), torch.randint(5, (50,))
    log_prob, entropy = policy.log_prob(obs, action)
    expected = torch.distributions.Categorical(logits=policy.net(obs))
    torch.testing.assert_close(log_prob, expected.log_prob(action), atol=1e-6, rtol=0)
    torch.testing.assert_close(entropy, expected.entropy(), atol=1e-6, rtol=0)
    assert torch.equal(policy(obs, explore=False), expected.probs.argmax(-1))


@everywhere
def test_gaussian_is_torch_distributions(module):
    torch.manual_seed(0)
    policy = module.GaussianPolicy(3, (64, 64), gym.spaces.Box(-1, 1, (4,)), init_log_std=-0.5)
    torch.nn.init.normal_(policy.log_std)
    obs, action = torch.randn(50, 3), torch.randn(50, 4)
    log_prob, entropy = policy.log_prob(obs, action)
    normal = torch.distributions.Normal(policy.net(obs), policy.log_std.exp().expand(50, 4))
    torch.testing.assert_close(log_prob, normal.log_prob(action).sum(-1), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(entropy, normal.entropy().sum(-1), atol=1e-6, rtol=0)
    assert torch.equal(policy(obs, explore=False), policy.net(obs))


@everywhere
def test_samples_have_the_distribution(module):
    """Within five standard errors of 200,000 draws."""
    torch.manual_seed(0)
    n = 200_000
    obs = torch.randn(1, 3)
    categorical = module.CategoricalPolicy(3, (64, 64), gym.spaces.Discrete(4))
    torch.nn.init.normal_(categorical.net.out.weight)
    probs = categorical.net(obs).softmax(-1)[0]
    frequency = categorical(obs.expand(n, 3), explore=True).bincount(minlength=4) / n
    assert ((frequency - probs).abs() < 5 * (probs * (1 - probs) / n).sqrt()).all()
    gaussian = module.GaussianPolicy(3, (64, 64), gym.spaces.Box(-1, 1, (2,)), init_log_std=0.0)
    gaussian.log_std.data = torch.tensor([-1.0, 0.5])
    draws = gaussian(obs.expand(n, 3), explore=True)
    std = gaussian.log_std.exp()
    assert ((draws.mean(0) - gaussian.net(obs)[0]).abs() < 5 * std / n**0.5).all()
    assert ((draws.std(0) - std).abs() < 5 * std / (2 * n) ** 0.5).all()
    assert draws.T.corrcoef()[0, 1].abs() < 5 / n**0.5, "each dimension has a noise of its own"


@everywhere
def test_actions_reach_the_bounds_of_each_dimension_and_no_further(module):
    space = gym.spaces.Box(
        np.array([[-1.0, 0.0], [-np.inf, -2.0]]), np.array([[3.0, 0.5], [np.inf, np.inf]]), dtype=np.float64
    )
    policy = module.GaussianPolicy(3, (64, 64), space, init_log_std=0.0)
    in_bounds = [[[-1.0, 0.0], [-1.0, -1.0]], [[1.0, 0.25], [0.0, 0.0]], [[3.0, 0.5], [1.0, 1.0]]]
    unit_actions = np.repeat([[-1.0], [0.0], [1.0]], 4, axis=1).astype(np.float32)
    np.testing.assert_allclose(policy.to_env(unit_actions), in_bounds)
    beyond = policy.to_env(100 * unit_actions)
    np.testing.assert_allclose(beyond[0], [[-1.0, 0.0], [-100.0, -2.0]])
    np.testing.assert_allclose(beyond[2], [[3.0, 0.5], [100.0, 100.0]])
    assert beyond.dtype == np.float64 and beyond.shape == (3, 2, 2)


@everywhere
def test_integer_actions_are_the_nearest(module):
    policy = module.GaussianPolicy(3, (64, 64), gym.spaces.Box(-1, 3, (1,), np.int64), init_log_std=0.0)
    actions = policy.to_env(np.array([[-2], [-0.8], [-0.7], [0.2], [0.3], [0.7], [0.8], [2]], np.float32))
    assert actions.ravel().tolist() == [-1, -1, 0, 1, 2, 2, 3, 3] and actions.dtype == np.int64


@everywhere
def test_discrete_actions_begin_where_the_space_does(module):
    policy = module.CategoricalPolicy(3, (64, 64), gym.spaces.Discrete(2, start=5))
    assert policy.to_env(np.array([0, 1, 1])).tolist() == [5, 6, 6]
    small = gym.spaces.Discrete(3, start=-1, dtype=np.int8)  # contains no number of 64 bits
    actions = module.CategoricalPolicy(3, (64, 64), small).to_env(np.array([0, 2]))
    assert actions.tolist() == [-1, 1] and all(small.contains(action) for action in actions)


@everywhere
def test_networks_begin_orthogonal(module):
    torch.manual_seed(0)
    args = module.Args(init_log_std=-0.7)
    agent = module.Agent(spaces(gym.spaces.Box(-1, 1, (2,)), obs_dim=5), args, torch.device("cpu"))
    for net, gain in ((agent.policy.net, 0.01), (agent.critic, 1.0)):
        for layer, layer_gain in ((net.fc1, 2**0.5), (net.fc2, 2**0.5), (net.out, gain)):
            rows, columns = layer.weight.shape
            gram = layer.weight @ layer.weight.T if rows <= columns else layer.weight.T @ layer.weight
            torch.testing.assert_close(gram, layer_gain**2 * torch.eye(min(rows, columns)), atol=1e-4, rtol=0)
            assert not layer.bias.any()
    assert torch.equal(agent.policy.log_std, torch.full((2,), -0.7))


# ----- normalisation


@everywhere
@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    offset=st.floats(-100, 100),
)
def test_running_statistics_are_those_of_everything_seen(module, seed, lengths, offset):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(offset, 3, (length, 2)) for length in lengths]
    statistics = module.RunningStatistics(2).double()
    for part in parts:
        statistics.update(torch.as_tensor(part))
    whole = np.concatenate(parts)
    np.testing.assert_allclose(statistics.mean, whole.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(statistics.var, whole.var(0), rtol=1e-6, atol=1e-9)
    assert statistics.count == len(whole)


@everywhere
@settings(deadline=None, max_examples=30)
@given(gamma=unit, **sizes)
def test_rewards_are_scaled_by_the_deviation_of_the_discounted_return(module, seed, steps, num_envs, gamma):
    """Over three rollouts in a row; the return goes on from one to the next and begins anew at both kinds of end."""
    scaler = module.RewardScaler(gamma).double()
    seen, running = [], np.zeros(num_envs)
    for part in range(3):
        rollout = random_rollout(seed + part, steps, num_envs)
        scaled = scaler(rollout.reward, rollout.done)
        for reward, done in zip(rollout.reward.numpy(), rollout.done.numpy()):
            running = reward + gamma * running
            seen.extend(running)
            running = np.where(done, 0.0, running)
        deviation = np.sqrt(np.var(seen) + 1e-8) if len(seen) > 1 else 1.0  # of one return there is none
        np.testing.assert_allclose(scaled, rollout.reward / deviation, rtol=1e-4, atol=1e-9)


@everywhere
@pytest.mark.parametrize("reward", (1.0, 0.1, -3.7))
def test_equal_returns_have_no_deviation_to_scale_rewards_by(module, reward):
    scaler, rewards = module.RewardScaler(0.9), torch.full((2, 3), reward)
    for _ in range(3):  # episodes of one step, so every return is that reward
        assert torch.equal(scaler(rewards, torch.ones(2, 3, dtype=torch.bool)), rewards)


@everywhere
def test_observations_are_normalised_alike_for_acting_and_for_both_networks(module):
    agent = module.Agent(spaces(gym.spaces.Discrete(2)), module.Args(), torch.device("cpu"))
    for p in agent.parameters():
        torch.nn.init.normal_(p)
    plain = module.Agent(spaces(gym.spaces.Discrete(2)), module.Args(norm_obs=False), torch.device("cpu"))
    plain.load_state_dict(agent.state_dict(), strict=False)
    agent.obs_statistics.update(torch.tensor([3.0, -2.0, 0.0]) + torch.tensor([0.5, 2.0, 1.0]) * torch.randn(1000, 3))
    obs = torch.randn(64, 3) * 3
    normal = ((obs - agent.obs_statistics.mean) / agent.obs_statistics.var.sqrt()).clamp(-10, 10)
    assert (normal.abs() == 10).any() and (normal.abs() < 10).any()
    action = torch.randint(2, (64,))
    torch.testing.assert_close(agent.value(obs), plain.value(normal))
    torch.testing.assert_close(agent.log_prob(obs, action), plain.log_prob(normal, action))
    assert (agent.act(obs.numpy(), explore=False) == plain.act(normal.numpy(), explore=False)).all()


# ----- losses and updates


class Table:
    """An agent whose log-probabilities, entropies and values are numbers, one a step; obs holds the step's index."""

    def __init__(self, log_prob, value, entropy):
        self.tables = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (log_prob, value, entropy)]

    def log_prob(self, obs, action):
        return self.tables[0][obs], self.tables[2][obs]

    def value(self, obs):
        return self.tables[1][obs]


numbers = st.lists(st.floats(-1, 1), min_size=8, max_size=8)


@settings(deadline=None)
@given(log_ratio=numbers, advantage=numbers, value=numbers, old_value=numbers, target=numbers, clip_vloss=st.booleans())
def test_ppo_loss_is_a_loop_written_from_the_paper(log_ratio, advantage, value, old_value, target, clip_vloss):
    args = ppo.Args(clip_vloss=clip_vloss, clip_coef=0.25, vf_coef=0.7, ent_coef=0.3)
    entropy = [0.1 * i for i in range(8)]
    agent = Table(log_ratio, value, entropy)
    steps, eps = torch.arange(8), 0.25
    old_log_prob = torch.zeros(8, dtype=torch.float64)
    batch = (steps, None, old_log_prob, *(torch.tensor(x, dtype=torch.float64) for x in (old_value, target, advantage)))
    loss, log = ppo.ppo_loss(agent, args, batch)
    surrogate, value_loss, clipped = [], [], []
    for i in range(8):
        ratio = np.exp(log_ratio[i])
        surrogate.append(min(ratio * advantage[i], min(max(ratio, 1 - eps), 1 + eps) * advantage[i]))
        errors = [(value[i] - target[i]) ** 2]
        if clip_vloss:
            errors.append((old_value[i] + min(max(value[i] - old_value[i], -eps), eps) - target[i]) ** 2)
        value_loss.append(max(errors) / 2)
        clipped.append(abs(ratio - 1) > eps)
    assert log["losses/policy_loss"].item() == pytest.approx(-np.mean(surrogate), abs=1e-12)
    assert log["losses/value_loss"].item() == pytest.approx(np.mean(value_loss), abs=1e-12)
    assert log["losses/entropy"].item() == pytest.approx(np.mean(entropy))
    assert log["losses/clipfrac"].item() == pytest.approx(np.mean(clipped))
    assert log["losses/old_approx_kl"].item() == pytest.approx(-np.mean(log_ratio), abs=1e-12)
    assert log["losses/approx_kl"].item() == pytest.approx(np.mean(np.exp(log_ratio) - 1 - log_ratio), abs=1e-12)
    expected = -np.mean(surrogate) + 0.7 * np.mean(value_loss) - 0.3 * np.mean(entropy)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_ppo_gradient_is_zero_just_where_the_clip_says():
    """d/dlogpi of -min(r A, clip(r) A) is -r A, and 0 where A > 0 and r > 1 + eps or A < 0 and r < 1 - eps."""
    log_ratio = np.log([0.5, 0.5, 0.9, 0.9, 1.1, 1.1, 1.5, 1.5])
    advantage = np.array([2.0, -2.0, 2.0, -2.0, 2.0, -2.0, 2.0, -2.0])
    agent = Table(log_ratio, np.zeros(8), np.zeros(8))
    zeros = torch.zeros(8, dtype=torch.float64)
    args = ppo.Args(clip_coef=0.2, ent_coef=0.3)
    batch = [torch.arange(8), None, zeros, zeros, zeros, torch.tensor(advantage)]
    ppo.ppo_loss(agent, args, batch)[0].backward()
    expected = -np.exp(log_ratio) * advantage / 8 * np.array([1, 0, 1, 1, 1, 1, 0, 1])
    np.testing.assert_allclose(agent.tables[0].grad, expected, atol=1e-12)
    np.testing.assert_allclose(agent.tables[2].grad, -args.ent_coef / 8, atol=1e-12)


def test_a2c_gradient_in_closed_form():
    """d/dlogpi = -A / B, d/dV = c1 (V - R) / B, d/dH = -c2 / B."""
    rng = np.random.default_rng(0)
    log_prob, value, entropy, advantage, target = rng.normal(size=(5, 6))
    agent = Table(log_prob, value, entropy)
    args = a2c.Args(vf_coef=0.7, ent_coef=0.3)
    loss, log = a2c.a2c_loss(agent, args, [torch.arange(6), None, torch.tensor(target), torch.tensor(advantage)])
    loss.backward()
    np.testing.assert_allclose(agent.tables[0].grad, -advantage / 6, atol=1e-12)
    np.testing.assert_allclose(agent.tables[1].grad, 0.7 * (value - target) / 6, atol=1e-12)
    np.testing.assert_allclose(agent.tables[2].grad, np.full(6, -0.3 / 6), atol=1e-12)
    assert log["losses/policy_loss"].item() == pytest.approx(-np.mean(log_prob * advantage))
    assert log["losses/value_loss"].item() == pytest.approx(np.mean((value - target) ** 2) / 2)


def real_agent(module, **flags):
    torch.manual_seed(0)
    args = module.Args(norm_obs=False, norm_reward=False, **flags)
    agent = module.Agent(spaces(gym.spaces.Discrete(2)), args, torch.device("cpu")).double()
    for p in agent.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return agent, args


def test_ppo_passes_over_every_step_once_an_epoch_in_a_new_order():
    agent, args = real_agent(ppo, update_epochs=3, num_minibatches=4)
    rollout = random_rollout(0, 8, 2)
    rollout.obs[..., 0] = torch.arange(16).view(8, 2)
    seen = []

    def spy(agent, optimizer, minibatch, args):
        seen.append([int(x) for x in minibatch[0][:, 0]])
        return ppo.ppo_step(agent, optimizer, minibatch, args)

    ppo.ppo_update(agent, torch.optim.SGD(agent.parameters(), lr=0.1), rollout, args, spy)
    epochs = [sum(seen[4 * i : 4 * i + 4], []) for i in range(3)]
    assert len(seen) == 12 and all(len(m) == 4 for m in seen)
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


@pytest.mark.parametrize("norm_adv", [False, True])
def test_ppo_update_hands_on_what_belongs_together(norm_adv):
    """Old log-probabilities, values, advantages and targets are those of the policy before the update, row by row."""
    agent, args = real_agent(ppo, update_epochs=2, num_minibatches=2, norm_adv=norm_adv)
    rollout = random_rollout(1, 6, 3)
    with torch.no_grad():
        value, next_value = agent.value(rollout.obs), agent.value(rollout.next_obs)
        old = agent.log_prob(rollout.obs.flatten(0, 1), rollout.action.flatten(0, 1))[0]
    advantage = ppo.gae(rollout, value, next_value, args.gamma, args.gae_lambda).flatten()
    row_of = {row[0].item(): i for i, row in enumerate(rollout.obs.flatten(0, 1))}

    def spy(agent, optimizer, minibatch, args):
        assert not any(x.requires_grad for x in minibatch)
        obs, action, old_log_prob, old_value, target, a = minibatch
        rows = [row_of[x.item()] for x in obs[:, 0]]
        own = advantage[rows].numpy()
        if norm_adv:
            own = (own - np.mean(own)) / (np.std(own, ddof=1) + 1e-8)
        np.testing.assert_allclose(a.numpy(), own, rtol=1e-12)
        assert torch.equal(action, rollout.action.flatten()[rows])
        for mine, expected in (
            (old_log_prob, old),
            (old_value, value.flatten()),
            (target, advantage + value.flatten()),
        ):
            torch.testing.assert_close(mine, expected[rows])
        return ppo.ppo_step(agent, optimizer, minibatch, args)

    log = ppo.ppo_update(agent, torch.optim.SGD(agent.parameters(), lr=0.1), rollout, args, spy)
    assert log["losses/explained_variance"] == pytest.approx(
        1 - np.var(advantage.numpy()) / np.var((advantage + value.flatten()).numpy())
    )


def test_ppo_first_step_is_at_ratio_one():
    agent, args = real_agent(ppo, update_epochs=1, num_minibatches=1)
    log = ppo.ppo_update(agent, torch.optim.SGD(agent.parameters(), lr=0.1), random_rollout(2, 6, 3), args)
    assert log["losses/approx_kl"] == pytest.approx(0, abs=1e-12) and log["losses/clipfrac"] == 0


@pytest.mark.parametrize("target_kl, epochs", [(None, 5), (1e-12, 2), (1e9, 5)])
def test_ppo_target_kl_ends_the_passes(target_kl, epochs):
    agent, args = real_agent(ppo, update_epochs=5, num_minibatches=1, target_kl=target_kl)
    calls = []

    def spy(*inputs):
        calls.append(1)
        return ppo.ppo_step(*inputs)

    ppo.ppo_update(agent, torch.optim.SGD(agent.parameters(), lr=0.1), random_rollout(3, 8, 2), args, spy)
    assert len(calls) == epochs  # in the first pass of a single minibatch the divergence is still 0


def test_a2c_update_hands_on_what_belongs_together():
    agent, args = real_agent(a2c)
    rollout = random_rollout(1, 6, 3)
    with torch.no_grad():
        value, next_value = agent.value(rollout.obs), agent.value(rollout.next_obs)
    advantage = a2c.gae(rollout, value, next_value, args.gamma, args.gae_lambda)
    expected = [x.flatten(0, 1) for x in (rollout.obs, rollout.action, advantage + value, advantage)]
    calls = []

    def spy(agent, optimizer, batch, args):
        assert not any(x.requires_grad for x in batch)
        torch.testing.assert_close(batch, expected)
        calls.append(1)
        return a2c.a2c_step(agent, optimizer, batch, args)

    a2c.a2c_update(agent, torch.optim.SGD(agent.parameters(), lr=0.1), rollout, args, spy)
    assert len(calls) == 1


@everywhere
def test_gradients_do_not_add_up_over_updates(module):
    flags = {} if module is reinforce else dict(max_grad_norm=1e9)
    agent, args = real_agent(module, num_envs=3, **flags)
    optimizer, found = torch.optim.SGD(agent.parameters(), lr=0.0), []
    grads = lambda *_: found.append(torch.cat([p.grad.flatten() for p in agent.parameters()]).clone())  # noqa: E731
    optimizer.register_step_pre_hook(grads)
    for _ in range(2):
        torch.manual_seed(0)
        getattr(module, f"{module.__name__}_update")(agent, optimizer, random_rollout(6, 8, 3), args)
    half = len(found) // 2
    assert found[0].any() and all(map(torch.equal, found[:half], found[half:]))


@pytest.mark.parametrize("module", [a2c, ppo], ids=["a2c", "ppo"])
def test_gradients_longer_than_max_grad_norm_are_scaled_to_it(module):
    flags = dict(update_epochs=1, num_minibatches=1) if module is ppo else {}
    update = getattr(module, f"{module.__name__}_update")
    steps = []
    for limit in (1e-3, 1e6, 1e9):
        agent, args = real_agent(module, max_grad_norm=limit, **flags)
        before = torch.cat([p.flatten() for p in agent.parameters()]).clone()
        torch.manual_seed(5)
        update(agent, torch.optim.SGD(agent.parameters(), lr=1.0), random_rollout(4, 6, 3), args)
        steps.append(torch.cat([p.flatten() for p in agent.parameters()]) - before)
    clipped, free, freer = steps
    assert torch.equal(free, freer), "shorter ones stay as they are"
    assert clipped.norm().item() == pytest.approx(1e-3, rel=1e-3) and free.norm() > 0.01
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@everywhere
def test_compiled_update_agrees_with_the_eager_one(module):
    """To round-off after 20 updates, in float64, with a learning rate that changes."""
    weights = []
    flags = dict(num_envs=3) | (dict(baseline="value") if module is reinforce else {})
    for compiled in (False, True):
        agent, args = real_agent(module, **flags)
        take_step = getattr(module, f"{module.__name__}_step")
        if compiled:
            take_step = module.accelerated(take_step, module.Args(compile=True), torch.device("cpu"))
        kind = torch.optim.RMSprop if module is a2c else torch.optim.Adam
        optimizer = kind(agent.parameters(), lr=1e-2, eps=1e-5)
        for i in range(20):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - i / 20)
            torch.manual_seed(i)
            getattr(module, f"{module.__name__}_update")(agent, optimizer, random_rollout(i, 8, 3), args, take_step)
        weights.append(torch.cat([p.detach().flatten() for p in agent.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-8)


# ----- first weights


@everywhere
@pytest.mark.parametrize("space", (gym.spaces.Discrete(4), gym.spaces.Box(-1, 1, (2,))), ids=("Discrete", "Box"))
def test_layers_begin_orthogonal_the_last_of_the_policy_small(module, space):
    """All singular values of a layer are its gain: sqrt(2), but 0.01 for the last of the policy, 1 for that of V."""
    agent = module.Agent(spaces(space), module.Args(), torch.device("cpu"))
    for net, last in ((agent.policy.net, 0.01), (agent.critic, 1.0)):
        for layer, gain in ((net.fc1, 2**0.5), (net.fc2, 2**0.5), (net.out, last)):
            torch.testing.assert_close(torch.linalg.svdvals(layer.weight), torch.full((min(layer.weight.shape),), gain))
            assert not layer.bias.any()
