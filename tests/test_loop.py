"""What the training loop hands to the update: every transition, none across a reset, by the policy that acted."""

import contextlib
import copy
import json
import os
import random
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import a2c
import ddpg
import dqn
import ppo
import reinforce
import sac
import td3
from tests.envs import Ledger


def each(*modules):
    return pytest.mark.parametrize("module", modules, ids=lambda module: module.__name__)


everywhere = each(reinforce, a2c, ppo, dqn, ddpg, td3, sac)
policy_gradient = each(reinforce, a2c, ppo)
replay = each(dqn, ddpg, td3, sac)


class Clock(gym.Env):
    """Observes [its number, episode, step]; the reward tells the step; ends terminated, truncated or both in turn."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    made = 0

    def __init__(self, action_space=gym.spaces.Discrete(2)):
        self.action_space = action_space
        self.number, self.episode = Clock.made, -1
        Clock.made += 1

    def observe(self):
        return np.array([self.number, self.episode, self.step_], dtype=np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_ = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action):
        self.step_ += 1
        ends = self.step_ >= 2 + (self.episode + self.number) % 4
        kind = (self.episode + self.number) % 3
        return self.observe(), float(self.step_), ends and kind != 1, ends and kind != 0, {}


gym.register("Clock-v0", Clock)
gym.register("ClockBox-v0", Clock, kwargs={"action_space": gym.spaces.Box(-1, 3, (2,))})


def clock(module):
    """The id of the clock with actions that the script takes."""
    return "ClockBox-v0" if module in (ddpg, td3, sac) else "Clock-v0"


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


@pytest.fixture
def quiet(tmp_path):
    return dict(runs_dir=str(tmp_path), eval_episodes=0, env_id="Clock-v0")


def rollouts(module, monkeypatch, **flags):
    """Trains and returns what each update was given, with the agent's statistics and log-probabilities at that time."""
    seen = []
    name = f"{module.__name__}_update"
    update = getattr(module, name)

    def spy(agent, optimizer, rollout, args, take_step):
        count = agent.obs_statistics.count.item() if agent.obs_statistics else None
        seen.append((rollout, count, {k: v.clone() for k, v in agent.state_dict().items()}))
        return update(agent, optimizer, rollout, args, take_step)

    monkeypatch.setattr(module, name, spy)
    module.train(module.Args(**flags))
    return seen


@policy_gradient
def test_transitions_are_whole_and_none_crosses_a_reset(module, monkeypatch, quiet):
    Clock.made = 0
    flags = dict(num_steps=16) if module is not reinforce else {}
    if module is ppo:
        flags["num_minibatches"] = 2
    seen = rollouts(module, monkeypatch, num_envs=3, total_timesteps=600, norm_reward=False, **flags, **quiet)
    kinds = set()
    for rollout, _, _ in seen:
        assert torch.equal(rollout.obs[..., 0], rollout.next_obs[..., 0])
        assert torch.equal(rollout.obs[..., 1], rollout.next_obs[..., 1])
        assert torch.equal(rollout.obs[..., 2] + 1, rollout.next_obs[..., 2])
        assert torch.equal(rollout.reward, rollout.next_obs[..., 2])
        number, episode, step = rollout.next_obs.unbind(-1)
        ends = step == 2 + (episode + number) % 4
        kind = (episode + number) % 3
        assert torch.equal(rollout.done, ends)
        assert torch.equal(rollout.terminated, ends & (kind != 1))
        goes_on = ~rollout.done[:-1]
        assert torch.equal(rollout.next_obs[:-1][goes_on], rollout.obs[1:][goes_on])
        assert (rollout.obs[1:][~goes_on][:, 2] == 0).all()
        kinds |= set(kind[ends].tolist())
    assert kinds == {0, 1, 2}
    if module is reinforce:  # whole episodes, from their first step
        assert all((rollout.obs[0, :, 2] == 0).all() and rollout.done.any(0).all() for rollout, _, _ in seen)
    else:  # and nothing is lost between two rollouts
        for (before, _, _), (after, _, _) in zip(seen, seen[1:]):
            goes_on = ~before.done[-1]
            assert torch.equal(before.next_obs[-1][goes_on], after.obs[0][goes_on])


class Integers(gym.Env):
    """Observations and rewards are whole numbers, and the observations an image; an episode is one step long."""

    observation_space = gym.spaces.Box(0, 255, (2, 3), np.uint8)
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 1, True, False, {}


gym.register("Integers-v0", Integers)


@policy_gradient
def test_whole_numbers_become_floats(module, monkeypatch, quiet):
    flags = dict(num_steps=8) if module is not reinforce else {}
    seen = rollouts(module, monkeypatch, num_envs=2, total_timesteps=100, **flags, **quiet | {"env_id": "Integers-v0"})
    assert {x.dtype for x in (seen[0][0].obs, seen[0][0].next_obs, seen[0][0].reward)} == {torch.float32}
    assert seen[0][0].obs.shape[-1] == 6 and seen[0][0].obs.max() > 100


@policy_gradient
def test_statistics_grow_after_the_update(module, monkeypatch, quiet):
    """So that the policy that is improved is the one that acted: n-th rollout, statistics of the n - 1 before."""
    flags = dict(num_steps=8) if module is not reinforce else {}
    seen = rollouts(module, monkeypatch, num_envs=2, total_timesteps=100, **flags, **quiet)
    before = []
    for rollout, count, state in seen:
        assert count == sum(map(len, before))
        if before:
            torch.testing.assert_close(state["obs_statistics.mean"], torch.cat(before).mean(0))
        before.append(rollout.obs.flatten(0, 1))


@policy_gradient
def test_the_running_return_goes_on_over_rollouts_and_begins_anew_where_the_environments_do(module, monkeypatch, quiet):
    """After each checkpoint; in REINFORCE, which resets them for each batch, always."""
    flags = dict(num_steps=8) if module is not reinforce else {}
    Clock.made, carried, ends = 0, [], []
    forward = module.RewardScaler.forward

    def spy(self, reward, done):
        carried.append(torch.as_tensor(self.running_return).any().item())
        ends.append(done)
        return forward(self, reward, done)

    monkeypatch.setattr(module.RewardScaler, "forward", spy)
    seen = rollouts(module, monkeypatch, num_envs=2, total_timesteps=160, checkpoint_every=64, **flags, **quiet)
    assert all(torch.equal(rollout.done, end) for (rollout, _, _), end in zip(seen, ends, strict=True))
    assert any((rollout.done & ~rollout.terminated).any() for rollout, _, _ in seen)
    assert len(carried) > 4
    expected = [False, True, True, True] if module is not reinforce else [False]
    assert carried == (expected * len(carried))[: len(carried)]


def test_reinforce_counts_the_episodes_that_it_learns_from(quiet):
    """One of each environment in a batch; what one plays while it waits for the others is no sample of its episodes."""
    Clock.made = 0
    folder = reinforce.train(reinforce.Args(num_envs=3, total_timesteps=600, log_every=1, **quiet))
    found = rows(folder)
    assert len(found) > 10
    for row in found:
        assert row["charts/episodes"] == 3


@policy_gradient
def test_the_learning_rate_falls_linearly_by_steps(module, quiet):
    flags = dict(num_steps=8) if module is not reinforce else {}
    folder = module.train(
        module.Args(num_envs=2, total_timesteps=160, log_every=1, learning_rate=0.5, **flags, **quiet)
    )
    before = 0
    for row in rows(folder):
        assert row["charts/learning_rate"] == pytest.approx(0.5 * (1 - before / 160))
        before = row["global_step"]
    folder = module.train(module.Args(total_timesteps=160, log_every=1, anneal_lr=False, learning_rate=0.5, **quiet))
    assert rows(folder)
    assert {row["charts/learning_rate"] for row in rows(folder)} == {0.5}


class Spy:
    """What the loop of a script with replay does, turn by turn, with its own functions doing it."""

    def __init__(self, module, monkeypatch):
        self.added, self.acted, self.updates, self.polyak, self.turns = [], [], [], [], 0
        add, act, random_action = module.ReplayBuffer.add, module.Agent.act, module.Agent.random_action
        name = f"{module.__name__}_update"
        update, polyak, spy = getattr(module, name), module.polyak, self

        def spy_add(self, *transitions):
            spy.turns += 1
            spy.added.append(module.Transitions(*(np.copy(x) for x in transitions)))
            add(self, *transitions)

        def spy_act(self, obs, explore):
            spy.acted.append(("policy", getattr(self, "epsilon", None)))
            return act(self, obs, explore)

        def spy_random(self, num_envs):
            if len(spy.acted) == spy.turns:  # not a random action within act()
                spy.acted.append(("random", None))
            return random_action(self, num_envs)

        def spy_update(agent, *rest):
            spy.updates.append((spy.turns, rest))
            return update(agent, *rest)

        def spy_polyak(target, source, tau):
            trained = [any(p.requires_grad for p in network.parameters()) for network in (target, source)]
            assert trained == [False, True], "the target network follows, not the other way round"
            spy.polyak.append(spy.turns)
            return polyak(target, source, tau)

        monkeypatch.setattr(module.ReplayBuffer, "add", spy_add)
        monkeypatch.setattr(module.Agent, "act", spy_act)
        monkeypatch.setattr(module.Agent, "random_action", spy_random)
        monkeypatch.setattr(module, name, spy_update)
        monkeypatch.setattr(module, "polyak", spy_polyak)


@replay
def test_the_buffer_gets_every_transition_whole_and_none_crosses_a_reset(module, monkeypatch, quiet):
    Clock.made = 0
    spy = Spy(module, monkeypatch)
    flags = quiet | dict(env_id=clock(module), num_envs=3, total_timesteps=600, learning_starts=300, batch_size=8)
    module.train(module.Args(**flags, checkpoint_every=201))
    kinds, fresh = set(), {0, 67, 134}  # turns after a checkpoint, which resets the environments
    for turn, (obs, action, reward, next_obs, terminated) in enumerate(spy.added):
        assert (obs[:, :2] == next_obs[:, :2]).all() and (obs[:, 2] + 1 == next_obs[:, 2]).all()
        assert (reward == next_obs[:, 2]).all()
        number, episode, step = next_obs.T
        ends, kind = step == 2 + (episode + number) % 4, (episode + number) % 3
        assert (terminated == (ends & (kind != 1))).all(), "truncation is no termination"
        kinds |= set(kind[ends])
        if turn + 1 < len(spy.added):
            following = spy.added[turn + 1].obs
            if turn + 1 in fresh:
                assert (following[:, 2] == 0).all()
            else:
                assert (following[~ends] == next_obs[~ends]).all() and (following[ends][:, 2] == 0).all()
        assert len(action) == 3 and (module is dqn or np.abs(action).max() <= 1)
    assert len(spy.added) == 200 and kinds == {0, 1, 2}


@replay
def test_actions_are_random_until_learning_starts(module, monkeypatch, quiet):
    spy = Spy(module, monkeypatch)
    flags = quiet | dict(env_id=clock(module), num_envs=3, total_timesteps=300, learning_starts=99, batch_size=8)
    flags |= dict(start_e=0.9, end_e=0.1, exploration_fraction=0.5) if module is dqn else {}
    module.train(module.Args(**flags))
    assert [who for who, _ in spy.acted] == ["random"] * 33 + ["policy"] * 67  # from step 99 on
    if module is dqn:
        expected = [max(0.9 - 0.8 * 3 * turn / 150, 0.1) for turn in range(33, 100)]
        assert [epsilon for _, epsilon in spy.acted[33:]] == pytest.approx(expected)


@replay
@pytest.mark.parametrize("num_envs", (1, 2, 5))
def test_updates_and_their_batches_come_when_they_should(module, num_envs, monkeypatch, quiet):
    spy = Spy(module, monkeypatch)
    flags = dict(train_frequency=4, gradient_steps=3, learning_starts=50, batch_size=16, total_timesteps=200)
    flags |= quiet | dict(env_id=clock(module), num_envs=num_envs) | (dict(policy_frequency=3) if module is td3 else {})
    module.train(module.Args(**flags))
    turn_of = lambda step: -(-step // num_envs)  # noqa: E731
    expected = [turn_of(step) for step in range(52, 201, 4) for _ in range(3)]
    assert [turn for turn, _ in spy.updates] == expected
    batches = [next(x for x in rest if isinstance(x, module.Transitions)) for _, rest in spy.updates]
    for batch, following in zip(batches, batches[1:]):
        assert batch.reward.shape == (16,) and batch.obs.shape == (16, 3)
        assert not torch.equal(batch.obs, following.obs), "each update has a batch of its own"
    if module is td3:
        assert [rest[4] for _, rest in spy.updates] == [number % 3 == 0 for number in range(len(expected))]
        assert len(spy.polyak) == 2 * len(range(0, len(expected), 3))
    elif module is not dqn:
        assert len(spy.polyak) == len(expected) * (2 if module is ddpg else 1)


@pytest.mark.parametrize("anneal_lr", (True, False))
def test_the_learning_rate_of_dqn_falls_linearly_by_steps(anneal_lr, monkeypatch, quiet):
    rates, update = [], dqn.dqn_update

    def spy(agent, optimizer, *rest):
        rates.append(optimizer.param_groups[0]["lr"])
        return update(agent, optimizer, *rest)

    monkeypatch.setattr(dqn, "dqn_update", spy)
    flags = dict(train_frequency=4, gradient_steps=1, learning_starts=50, batch_size=16, total_timesteps=200)
    folder = dqn.train(dqn.Args(num_envs=2, log_every=1, learning_rate=0.5, anneal_lr=anneal_lr, **flags, **quiet))
    begun = [step - 2 for step in range(52, 201, 4)]  # where the turns began that ended with an update
    assert rates == pytest.approx([0.5 * (1 - step / 200 if anneal_lr else 1) for step in begun])
    for row in rows(folder):
        share = 1 - (row["global_step"] - 2) / 200 if anneal_lr else 1
        assert row["charts/learning_rate"] == pytest.approx(0.5 * share)


@pytest.mark.parametrize("num_envs", (1, 2, 5, 9))
def test_the_target_network_of_dqn_has_a_clock_of_its_own(num_envs, monkeypatch, quiet):
    """Steps of the environments count, not updates, nor whether there is one at that step."""
    spy = Spy(dqn, monkeypatch)
    flags = dict(train_frequency=30, target_network_frequency=7, learning_starts=0, total_timesteps=200)
    dqn.train(dqn.Args(num_envs=num_envs, batch_size=8, **flags, **quiet))
    end = -(-200 // num_envs) * num_envs
    assert spy.polyak == [-(-step // num_envs) for step in range(7, end + 1, 7)]


@pytest.mark.parametrize("num_envs", (2, 5, 9, 180))
def test_the_updates_of_dqn_meet_the_same_targets_with_any_number_of_environments(num_envs, monkeypatch, quiet):
    """The updates and those of the target network alternate as they do with one environment."""
    events, update, polyak = [], dqn.dqn_update, dqn.polyak
    monkeypatch.setattr(dqn, "dqn_update", lambda *rest: events.append("update") or update(*rest))
    monkeypatch.setattr(dqn, "polyak", lambda *rest: events.append("target") or polyak(*rest))
    flags = dict(train_frequency=3, gradient_steps=2, target_network_frequency=7, learning_starts=10, batch_size=8)
    made = []
    for count in (1, num_envs):
        dqn.train(dqn.Args(num_envs=count, total_timesteps=180, **flags, **quiet))
        made.append(events.copy())
        events.clear()
    assert made[0] == made[1] and made[0].count("target") == 180 // 7 and made[0].count("update") == 2 * (60 - 3)


@replay
def test_without_checkpoints_the_buffer_is_never_copied(module, monkeypatch, tmp_path):
    """It may be most of the memory."""
    monkeypatch.delattr(module.ReplayBuffer, "state_dict")
    flags = dict(total_timesteps=30, learning_starts=10, batch_size=8, runs_dir=str(tmp_path), eval_episodes=1)
    folder = module.train(module.Args(env_id=clock(module), **flags))
    assert (folder / "agent.pt").exists()


def test_a_batch_that_is_cut_is_completed_by_v_as_after_a_time_limit(monkeypatch, quiet):
    flags = quiet | dict(env_id="tests.envs:Forever-v0")
    seen = rollouts(reinforce, monkeypatch, num_envs=2, total_timesteps=12, **flags)
    assert len(seen) == 1
    rollout = seen[0][0]
    assert rollout.done.shape == (6, 2)
    assert rollout.done[-1].all() and not rollout.done[:-1].any() and not rollout.terminated.any()


@everywhere
@pytest.mark.parametrize("kind", (float, int, np.float16, np.float32, torch.tensor))
def test_rewards_are_doubles_and_so_are_their_sums(module, kind):
    """Or the return of an episode would be rounded as they are, and a tensor is nothing for JSON."""
    envs = module.Environments([lambda: gym.wrappers.TransformReward(Clock(), kind)])
    envs.reset()
    envs.returns[0] = 2**24
    _, reward, terminated, _, infos = envs.step([0])
    for x, expected in ((reward, 1), (envs.returns, 2**24 + 1)):
        assert x.dtype == np.float64 and x.tolist() == [expected]


@everywhere
@pytest.mark.parametrize("num_envs", (1, 3))
def test_environments_are_those_of_gymnasium(module, num_envs):
    """Numbers, types and infos, with both kinds of end, beginning anew in the middle of episodes and at their end."""
    same_step = dict(autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    make = [lambda: gym.wrappers.RecordEpisodeStatistics(Ledger())] * num_envs
    theirs, ours = gym.vector.SyncVectorEnv(make, **same_step), module.Environments([Ledger] * num_envs, **same_step)
    ended, action = np.zeros(2, dtype=int), np.ones(num_envs, dtype=np.int64)
    for seed in (0, 5):
        np.testing.assert_array_equal(ours.reset(seed=seed)[0], theirs.reset(seed=seed)[0], strict=True)
        for _ in range(150):
            *results, infos = ours.step(action)
            *expected, expected_infos = theirs.step(action)
            for x, y in zip(results, expected, strict=True):
                np.testing.assert_array_equal(x, y, strict=True)
            done = results[2] | results[3]
            assert bool(infos) == done.any()
            if infos:
                ended += results[2].sum(), results[3].sum()
                for x, y in zip(infos["final_obs"], expected_infos["final_obs"], strict=True):
                    np.testing.assert_array_equal(x, y)
                assert infos["final_info"]["_episode"].tolist() == done.tolist()
                episode, expected = infos["final_info"]["episode"], expected_infos["final_info"]["episode"]
                for name in ("r", "l", "_r", "_l"):
                    np.testing.assert_array_equal(episode[name], expected[name])
    assert (ended > 5).all()


@everywhere
def test_modules_are_found_where_torch_has_them(module):
    """In copies as well, also when another one, or none, has taken a place."""
    args = module.Args(env_id=clock(module))
    agent = module.Agent(module.make_envs(args, 1), args, torch.device("cpu"))
    copied = copy.deepcopy(agent)
    copied.register_module("extra", torch.nn.Linear(1, 1))
    agent.extra, agent.other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    agent.extra, agent.other = torch.nn.Linear(2, 2), None
    pairs = [(part, name) for whole in (agent, copied) for part in whole.modules() for name in part._modules]
    assert len(pairs) > 8 and all(getattr(part, name) is part._modules[name] for part, name in pairs)
    assert not {*map(id, agent.critic.modules())} & {*map(id, copied.critic.modules())}


@everywhere
@pytest.mark.parametrize("compiling", (False, True), ids=("eager", "compiling"))
def test_a_layer_is_that_of_torch(module, compiling, monkeypatch):
    """Its value and gradients, for a batch and for a rollout."""
    torch.manual_seed(0)
    layer = module.Linear(3, 2).double()
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        for shape in ((5, 3), (4, 5, 3)):
            x, weight = (
                torch.randn(*shape, dtype=torch.float64, requires_grad=True),
                torch.randn(2, dtype=torch.float64),
            )
            ours, theirs = layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)
            torch.testing.assert_close(ours, theirs)
            inputs = (x, layer.weight, layer.bias)
            ours, theirs = (torch.autograd.grad((y.square() @ weight).sum(), inputs) for y in (ours, theirs))
            torch.testing.assert_close(ours, theirs)


@everywhere
def test_numbers_too_small_to_be_fast_are_zero(module):
    """Adam's means of units that are dead never get to zero otherwise, and make each step take longer."""
    torch.set_flush_denormal(False)
    small = torch.tensor([1e-38])
    assert (small / 10).item() > 0
    module.check_flags(module.Args())
    assert (small / 10).item() == 0


@everywhere
def test_every_new_loss_is_looked_at(module, quiet, capsys):
    """In the step that it comes from, not only where a row is due."""
    losses = [torch.tensor(x) for x in (1.0, 2.0, np.nan)]
    with pytest.raises(SystemExit), module.Run(module.Args(**quiet), {"step": 0, "states": {}}) as run:
        for step in range(1, 10):
            run.advance(step, {"losses/loss": losses[step // 3]})
    assert run.step == 6 and "losses/loss is not finite at step 6" in capsys.readouterr().err


@everywhere
def test_evaluation_forks_the_generator_of_the_device(module, monkeypatch):
    """So that it stays as it was. A GPU is not needed to see that it is asked for."""
    forked, fork = [], torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: forked.append([*devices]) or fork([]))
    args = module.Args(env_id=clock(module), eval_episodes=1)
    agent = module.Agent(module.make_envs(args, 1), args, torch.device("cpu"))
    for device in ("cpu", "cuda", "mps"):
        monkeypatch.setattr(agent, "act", lambda obs, explore: agent.random_action(len(obs)))
        if not hasattr(agent, "random_action"):
            monkeypatch.setattr(agent, "act", lambda obs, explore: np.zeros(len(obs), np.int64))
        agent.device = torch.device(device)
        module.evaluate(agent, args)
    assert forked == [[], [torch.device("cuda")], [torch.device("mps")]]


@everywhere
def test_evaluation_leaves_the_agent_and_the_generators_alone(module):
    """Nor do they matter to it, even if the environment draws from them."""
    name = "CartPole" if module is dqn else "Pendulum"
    args = module.Args(env_id=f"tests.envs:Signals{name}-v0", eval_episodes=3)
    if module is dqn:
        args.eval_epsilon = 0.3
    envs = module.make_envs(args, 1)
    agent = module.Agent(envs, args, torch.device("cpu"))
    if hasattr(agent, "obs_statistics"):
        agent.obs_statistics.update(torch.randn(100, 3))
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = module.evaluate(agent, args)
    assert all(torch.equal(v, before[k]) for k, v in agent.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(random.randrange(2**32))  # not those that an earlier test may have left
    assert module.evaluate(agent, args) == first


@everywhere
def test_evaluation_is_the_mean_over_one_whole_episode_in_each_environment(module, monkeypatch):
    Clock.made = 0
    args = module.Args(env_id=clock(module), eval_episodes=4)
    agent = module.Agent(module.make_envs(args, 1), args, torch.device("cpu"))
    Clock.made = 0
    returns = [sum(range(1, 3 + n % 4)) for n in range(4)]
    row = module.evaluate(agent, args)
    assert row["eval/episodic_return"] == pytest.approx(np.mean(returns))
    assert row["eval/episodic_return_std"] == pytest.approx(np.std(returns))
    assert row["eval/episodes"] == 4


@everywhere
def test_evaluation_says_that_episodes_were_cut_off(module, monkeypatch, capsys):
    monkeypatch.setattr(module, "range", lambda n: range(100 if n == 100_000 else n), raising=False)
    for name, said in (("Forever", "3 of 3 episodes were cut off after 100,000 steps\n"), ("OneNumber", "")):
        args = module.Args(env_id=f"tests.envs:{name}{'Box' * (module in (ddpg, td3, sac))}-v0", eval_episodes=3)
        agent = module.Agent(module.make_envs(args, 1), args, torch.device("cpu"))
        assert module.evaluate(agent, args)["eval/episodic_return"] == (100 if said else 5)
        assert capsys.readouterr().err == said


@pytest.mark.filterwarnings("ignore:.*share an object")
@everywhere
def test_the_last_observation_is_the_true_one_even_if_the_environment_overwrites_it(module):
    env_id = f"tests.envs:OneArray{'Box' * (module in (ddpg, td3, sac))}-v0"
    with contextlib.closing(module.make_envs(module.Args(env_id=env_id), 2)) as envs:
        seen = [envs.reset(seed=0)[0]]
        for _ in range(5):
            obs, _, terminated, truncated, infos = envs.step(envs.action_space.sample())
            seen.append(module.true_next_obs(obs, terminated | truncated, infos))
    assert obs.max() == 0 and [x.tolist() for x in seen] == [[[step] * 6] * 2 for step in range(6)]


@everywhere
def test_evaluation_acts_without_exploration_on_other_seeds(module, monkeypatch):
    args = module.Args(env_id="CartPole-v1" if module is dqn else "Pendulum-v1", eval_episodes=2)
    envs = module.make_envs(args, 2)
    agent = module.Agent(envs, args, torch.device("cpu"))
    explored, seeds = set(), []
    act, reset = agent.act, module.Environments.reset

    def spy_act(obs, explore):
        explored.add(explore)
        return act(obs, explore)

    def spy_reset(self, *, seed=None, options=None):
        seeds.append(seed)
        return reset(self, seed=seed, options=options)

    agent.act = spy_act
    monkeypatch.setattr(module.Environments, "reset", spy_reset)
    module.reset(envs, args.seed, 0)
    module.evaluate(agent, args)
    assert explored == {False} and len(set(seeds)) == 2 and abs(seeds[0] - seeds[1]) > 1000


@everywhere
def test_reset_seeds_every_generator_from_seed_and_step(module):
    args = module.Args()
    envs = module.make_envs(args, 2)

    def draw(seed, step):
        obs = module.reset(envs, seed, step)
        own = [x for env in envs.envs for x in env.unwrapped.observation_space.sample()]
        actions = [np.ravel(env.unwrapped.action_space.sample())[0] for env in envs.envs for _ in range(40)]
        return *obs.flat, *own, random.random(), np.random.rand(), torch.rand(()).item(), tuple(actions)

    assert draw(1, 0) == draw(1, 0)
    others = [draw(seed, step) for seed, step in ((1, 0), (1, 1), (2, 0), (2, 1))]
    for i in range(len(others[0])):
        assert len({other[i] for other in others}) == 4


@everywhere
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM), ids=lambda number: number.name)
def test_the_first_signal_is_noted_and_a_second_goes_to_whoever_had_it_before(module, number, quiet):
    """By default that one ends the program at once."""
    args = module.Args(**quiet)
    heard = []
    before = signal.signal(number, lambda *_: heard.append("second"))
    try:
        with module.Run(args, {"step": 0, "states": {}}) as run:
            signal.raise_signal(number)
            assert run.signal == number and heard == []
            signal.raise_signal(number)
            assert heard == ["second"]
        signal.raise_signal(number)
        assert heard == ["second", "second"]
    finally:
        signal.signal(number, before)


@everywhere
def test_a_signal_ends_the_last_evaluation_at_once(module, quiet, monkeypatch):
    """By then the agent is saved, and the evaluation may take an hour."""
    states, handler = {"agent": torch.nn.Linear(1, 1)}, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(module, "evaluate", lambda *_: signal.raise_signal(signal.SIGTERM))
    args = module.Args(**quiet | {"eval_episodes": 1})
    with pytest.raises(SystemExit) as end, module.Run(args, {"step": 0, "states": {}}, **states) as run:
        run.finish()
    assert end.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) == handler
    assert (run.folder / "agent.pt").exists() and rows(run.folder) == []


@everywhere
def test_an_evaluation_that_breaks_takes_no_checkpoint_away(module, quiet, monkeypatch):
    def evaluate(*_):
        raise RuntimeError("the evaluation broke")

    monkeypatch.setattr(module, "evaluate", evaluate)
    args = module.Args(**quiet | {"eval_every": 100, "eval_episodes": 1, "checkpoint_every": 100})
    with pytest.raises(RuntimeError, match="broke") as error:
        with module.Run(args, {"step": 0, "states": {}}, agent=torch.nn.Linear(1, 1)) as run:
            run.advance(100, {})
    assert torch.load(run.folder / "checkpoint.pt", weights_only=True)["step"] == 100
    assert "goes on from its last checkpoint" in error.value.__notes__[0]


@everywhere
def test_a_signal_takes_no_evaluation_away(module, quiet, monkeypatch):
    """It is in the file before the checkpoint is, so that the run that goes on has it and does not make it again."""
    evaluation = {"eval/episodic_return": 1.0, "eval/episodic_return_std": 0.0, "eval/episodes": 1}
    monkeypatch.setattr(module, "evaluate", lambda *_: dict(evaluation))
    args = module.Args(**quiet | {"eval_every": 100, "eval_episodes": 1, "total_timesteps": 1000})
    with pytest.raises(SystemExit), module.Run(args, {"step": 0, "states": {}}, agent=torch.nn.Linear(1, 1)) as run:
        signal.raise_signal(signal.SIGTERM)
        run.advance(100, {})
    assert rows(run.folder)[-1] == {"global_step": 100} | evaluation
    saved = torch.load(run.folder / "checkpoint.pt", weights_only=True)
    with module.Run(replace(args, resume=str(run.folder)), saved, agent=torch.nn.Linear(1, 1)):
        assert rows(run.folder)[-1] == {"global_step": 100} | evaluation


@everywhere
def test_without_the_service_of_weights_and_biases_a_run_goes_on(module, quiet, capsys):
    def broken(*_, **__):
        raise ConnectionResetError("its service is gone")

    for when in ("log", "finish"):
        with module.Run(module.Args(**quiet), {"step": 0, "states": {}}) as run:
            run.wandb = SimpleNamespace(**{"log": print, "finish": print} | {when: broken})
            run.log({"global_step": 1})
            assert (run.wandb is None) == (when == "log")
        assert run.wandb is None and rows(run.folder) == [{"global_step": 1}]
        assert capsys.readouterr().err.count("its service is gone; the run goes on without W&B") == 1


@everywhere
def test_a_run_keeps_no_second_copy_of_what_it_was_resumed_with(module, quiet):
    states = {"agent": torch.nn.Linear(1, 1).state_dict()}
    saved = {"step": 10, "states": states}
    with module.Run(module.Args(**quiet), saved, agent=torch.nn.Linear(1, 1)):
        assert not saved["states"]


@everywhere
def test_the_end_has_a_row_whatever_the_interval_of_rows(module, quiet):
    more = dict(learning_starts=10, buffer_size=100) if hasattr(module, "ReplayBuffer") else {}
    flags = quiet | {"env_id": clock(module), "num_envs": 1, "log_every": 10_000}
    folder = module.train(module.Args(total_timesteps=100, **flags | more))
    row = rows(folder)[-1]
    assert row["global_step"] >= 100 and row["charts/episodes"] > 0


@everywhere
def test_steps_per_second_are_those_since_the_last_row_or_evaluation(module, monkeypatch, quiet):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    args = module.Args(**quiet | {"log_every": 10, "eval_every": 15, "total_timesteps": 100})
    with module.Run(args, {"step": 0, "states": {}}) as run:
        monkeypatch.setattr(run, "evaluate", lambda: now.append(now.pop() + 50))
        for step, seconds in ((5, 1), (10, 1), (15, 2), (20, 3), (30, 2)):
            now[0] += seconds
            run.advance(step, {})
    speeds = [row["charts/SPS"] for row in rows(run.folder)]
    assert speeds == [10 / 2, 5 / 3, 10 / 2]


@everywhere
@pytest.mark.parametrize("number", (float("nan"), float("inf"), -float("inf")))
def test_a_loss_that_is_not_finite_ends_the_run_in_a_line(module, number, quiet, capsys):
    with module.Run(module.Args(**quiet), {"step": 0, "states": {}}) as run:
        with pytest.raises(SystemExit) as end:
            run.advance(7, {"losses/fine": 1.0, "losses/bad": torch.tensor(number)})
    assert end.value.code == 1
    assert "error: losses/bad is not finite at step 7" in capsys.readouterr().err


@everywhere
def test_a_loss_on_a_gpu_is_looked_at_in_rows_only(module, quiet):
    """To look is to wait for the GPU. A meta tensor is not on the CPU either, and nobody can look at it."""
    with module.Run(module.Args(**quiet | {"log_every": 10}), {"step": 0, "states": {}}) as run:
        far = {"losses/far": torch.empty((), device="meta")}
        run.advance(9, far)
        with pytest.raises(RuntimeError, match="meta"):
            run.advance(10, far)
        with pytest.raises(SystemExit):
            run.advance(11, far | {"losses/near": torch.tensor(float("nan"))})


@everywhere
def test_a_return_that_is_not_finite_ends_the_run_and_is_no_row(module, quiet, capsys):
    """JSON has no number for it, and the losses may be finite all the same, as before dqn.py learns."""
    with module.Run(module.Args(**quiet | {"log_every": 5}), {"step": 0, "states": {}}) as run:
        run.returns, run.lengths = [1.0, -float("inf")], [3, 3]
        with pytest.raises(SystemExit) as end:
            run.advance(7, {"losses/fine": 1.0})
    assert end.value.code == 1 and rows(run.folder) == []
    assert "error: charts/episodic_return is not finite at step 7" in capsys.readouterr().err


@everywhere
@pytest.mark.parametrize("encoding", ("utf-8", "ascii"))
def test_a_reader_who_has_left_or_lacks_a_letter_does_not_end_the_run(module, encoding, tmp_path, monkeypatch):
    args = module.Args(
        env_id=clock(module), eval_episodes=1, eval_every=100, total_timesteps=200, runs_dir=str(tmp_path / "läufe")
    )
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding=encoding, buffering=1) as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        folder = module.train(args)
        monkeypatch.undo()
        with contextlib.suppress(BrokenPipeError):
            nobody.close()
    assert "eval/episodic_return" in rows(folder)[-1]


@everywhere
@pytest.mark.parametrize("number", (float("nan"), float("inf"), -float("inf")))
def test_an_agent_that_is_not_finite_gets_no_checkpoint(module, number, quiet, capsys):
    agent = torch.nn.Linear(2, 2)
    args = module.Args(**quiet | {"checkpoint_every": 5})
    with module.Run(args, {"step": 0, "states": {}}, agent=agent) as run:
        run.advance(5, {})
        before = (run.folder / "checkpoint.pt").read_bytes()
        with torch.no_grad():
            agent.weight[1, 1] = number
        with pytest.raises(SystemExit) as end:
            run.advance(10, {})
    assert end.value.code == 1
    assert "error: weight is not finite at step 10" in capsys.readouterr().err
    assert (run.folder / "checkpoint.pt").read_bytes() == before


@everywhere
def test_a_row_has_the_means_over_the_episodes_since_the_last_one(module, quiet):
    def infos(*ended):
        """What Gymnasium says of a step in three environments, in which those in `ended` ended with this return."""
        column = np.array([dict(ended).get(i, 0.0) for i in range(3)])
        mask = np.isin(np.arange(3), [i for i, _ in ended])
        return {"final_info": {"episode": {"r": column, "l": 10 * column, "_r": mask}, "_episode": mask}}

    with module.Run(module.Args(**quiet | {"log_every": 1}), {"step": 0, "states": {}}) as run:
        run.count_episodes({})
        run.advance(1, {})
        run.count_episodes(infos((1, 5.0)))
        run.advance(2, {})
        run.count_episodes(infos((0, 1.0), (2, 2.0)))
        run.count_episodes(infos((2, 6.0)))
        run.advance(3, {})
    names = ("charts/episodes", "charts/episodic_return", "charts/episodic_length")
    assert [[row.get(name) for name in names] for row in rows(run.folder)] == [[0, None, None], [1, 5, 50], [3, 3, 30]]


class NearlyFull:
    """A file on a disk with room for five bytes more."""

    def __init__(self, file):
        self.file = file

    def write(self, content):
        return self.file.write(content[:5])

    def __getattr__(self, name):
        return getattr(self.file, name)


@everywhere
def test_a_row_that_finds_no_room_leaves_no_part_of_it(module, quiet, capsys):
    with module.Run(module.Args(**quiet | {"log_every": 1}), {"step": 0, "states": {}}) as run:
        run.advance(1, {})
        before = (run.folder / "metrics.jsonl").read_bytes()
        run.metrics = NearlyFull(run.metrics)
        with pytest.raises(SystemExit) as end:
            run.advance(2, {})
    assert end.value.code == 1
    assert "cannot be written at step 2: no space left" in capsys.readouterr().err
    assert before and (run.folder / "metrics.jsonl").read_bytes() == before
