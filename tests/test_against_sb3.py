"""One batch, the same networks and settings: the training step of Stable-Baselines3 and ours do the same to them."""

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

import a2c
import ddpg
import dqn
import ppo
import sac
import td3

INTENDED_DIFFERENCES = {
    # The same algorithm in other words, or another choice of ours; the tests set SB3 as the last words of a line say.
    "truncation (a2c, ppo)": "SB3 adds gamma V(last obs) to the reward, we have it in the TD error: added by the test",
    "value loss (a2c, ppo)": "ours has the 1/2 of the docstring's L, SB3's has not: half our vf_coef",
    "order of rows (ppo)": "SB3 shuffles rows sorted by environment, we by step: our permutation, translated",
    "logged KL (ppo)": "SB3's is the mean over the last pass, ours that over all passes: compared over the last pass",
    "gradient norm (dqn)": "SB3 clips it at 10; not in the paper, and the Huber loss bounds it already: infinite",
    "target's clock (dqn)": "ours counts steps and syncs after learning, SB3 turns of its loop and before: each update",
    "no noise (ddpg)": "SB3 runs its TD3 with one critic, no delay and target noise clipped to 0: the same numbers",
    "first actor update (td3)": "ours is the first of every d updates, SB3's the last of them: it counts from d - 1",
    "step sizes (ddpg, td3, sac)": "ours are two, one for Q, where SB3 has one for all: set in its optimizers",
    "critic loss (sac)": "SB3 halves it, our L(Q) does not: Adam with half the eps, which makes the same step of it",
    "temperature loss (sac)": "SB3 has log alpha where equation 18 of the paper has alpha: its gradient times alpha",
    "standard deviation (sac)": "ours goes to its bounds by a tanh, which keeps a gradient, SB3's is cut off: our tanh",
    "density (sac)": "SB3 takes log(1 - a^2 + 1e-6), which is off where |u| > 5, ours is exact: float64 without 1e-6",
    "order of draws (sac)": "SB3 draws an action for s before that for s', we after: each its own noise",
    "round-off (all)": "sums in another order, fused Adam, Polyak averages by lerp: see the tolerances below",
    # What only one of the two has or allows, or what is done outside of the training step; the tests do without.
    "normalisation (a2c, ppo)": "a part of our agent, which must be saved with it; a wrapper of environments in SB3",
    "units of actions (a2c, ppo)": "ours are +-1 at the bounds, SB3's those of the environment; neither step sees them",
    "explained variance (a2c, ppo)": "NaN in SB3 if the returns are all the same, which would end a run of ours",
    "clipped value loss (ppo)": "ours is the larger of two errors as in the authors' code, SB3 takes the clipped one",
    "target KL (ppo)": "we look at it between passes, as named; SB3 in each minibatch, and stops at 1.5 times as much",
    "minibatches (ppo)": "we refuse a rollout that they don't divide, or of one row each; SB3 takes what is left",
    "annealing (a2c, ppo, dqn)": "ours begins at learning_rate, SB3's is a rollout ahead, with a last step of size 0",
    "variants (dqn)": "SB3 has neither double nor dueling, and no other Huber loss than that with a delta of 1",
    "variants (all)": "we have neither n-step replay nor gSDE nor the RMSprop of TensorFlow",
    "initial weights (all)": "each has its own recipe: SB3 gets a copy of ours",
}
"""Every difference between the two, with the reason or the remedy."""

# Both compute in float32, with an error of 6e-8 in each operation. With 25 seeds instead of the one below the largest
# differences are 1.2e-6 in a parameter, where a single step is of the size 1e-3, and 7e-6 in a loss.
PARAMETERS = dict(rtol=0, atol=5e-6)
LOSSES = dict(rel=1e-5, abs=2e-5)
# Adam divides a gradient by its size plus eps, and so makes whole steps of the round-off in a gradient of 1e-8, unless
# eps is larger than that. a2c.py and ppo.py have 1e-5; the others get it here, once theirs is seen to be that of SB3.
EPS = 1e-5

UPDATES = 6
BATCH_SIZE = 32  # transitions of a replay buffer
NUM_STEPS, NUM_ENVS = 8, 4  # of a rollout
DISCRETE, BOX = "Acrobot-v1", "tests.envs:BoxTiny-v0"  # three actions; two dimensions, and observations to be flattened


# The names of our layers in SB3. The last layer of the actor in sac.py is two in SB3, one below the other.
def three_layers(ours, theirs, last="out"):
    return {f"{ours}.{layer}": [f"{theirs}.{index}"] for layer, index in (("fc1", 0), ("fc2", 2), (last, 4))}


POLICY = three_layers("policy.net", "mlp_extractor.policy_net") | three_layers("critic", "mlp_extractor.value_net")
POLICY |= {"policy.net.out": ["action_net"], "critic.out": ["value_net"], "policy.log_std": ["log_std"]}
Q_NETWORK = three_layers("critic", "q_net.q_net", "advantage")
Q_NETWORK |= three_layers("target_critic", "q_net_target.q_net", "advantage")
ONE_CRITIC = three_layers("critic", "critic.qf0") | three_layers("target_critic", "critic_target.qf0")
TWINS = ("critic", "critic"), ("target_critic", "critic_target")
TWIN_CRITICS = {
    f"{x}.{kind}{i + 1}": [f"{y}.qf{q}.{2 * i}" for q in (0, 1)] for x, y in TWINS for i in range(3) for kind in "wb"
}
DETERMINISTIC = three_layers("actor", "actor.mu") | three_layers("target_actor", "actor_target.mu")
GAUSSIAN = three_layers("actor", "actor.latent_pi") | {"actor.out": ["actor.mu", "actor.log_std"]}
LAYERS = {
    a2c: POLICY,
    ppo: POLICY,
    dqn: Q_NETWORK,
    ddpg: ONE_CRITIC | DETERMINISTIC,
    td3: TWIN_CRITICS | DETERMINISTIC,
    sac: TWIN_CRITICS | GAUSSIAN,
}


@pytest.fixture(autouse=True)
def the_same_every_time():
    torch.set_num_threads(1)
    np.random.seed(0)  # for the order of rows in a batch of SB3's A2C


class Made(Exception):
    """Takes away from train() what it has made, before it begins to train."""


def made_by_train(module, monkeypatch, flags):
    """The agent, its optimizers and the Args, just as a run has them, but for larger weights."""

    def stop(args, saved, **states):
        raise Made(args, states)

    monkeypatch.setattr(module, "Run", stop)
    with pytest.raises(Made) as made:
        module.train(module.Args(device="cpu", num_threads=1, **flags))
    args, states = made.value.args
    agent = states["agent"]
    with torch.no_grad():  # so that targets are no copies, and neither of the twins is the lower one everywhere
        for name, parameter in agent.named_parameters():
            if name != "log_alpha":
                parameter += 0.05 * torch.randn_like(parameter)
        if module in (td3, sac):
            for critic in (agent.critic, agent.target_critic):
                critic.b3[:, 0, 0] -= critic(torch.randn(1000, 6), 2 * torch.rand(1000, 2) - 1).median(1).values
    return agent, [state for name, state in states.items() if name.endswith("optimizer")], args


def with_names_of_sb3(module, agent):
    """The parameters of our agent, all but the temperature, by their names in SB3."""
    found = {}
    for name, parameter in agent.named_parameters():
        if name != "log_alpha":
            ours, theirs = next(pair for pair in LAYERS[module].items() if name.startswith(pair[0]))
            parts, end = parameter.detach().chunk(len(theirs)), name.removeprefix(ours)
            if ours in TWIN_CRITICS:  # two layers side by side, (2, in, out) or (2, 1, out)
                end = {"w": ".weight", "b": ".bias"}[ours[-2]]
                parts = [x[0].T if end == ".weight" else x[0, 0] for x in parts]
            found |= {layer + end: part for layer, part in zip(theirs, parts, strict=True)}
    return found


def make_sb3(module, agent, args, num_envs=1, **settings):
    """The model of the same algorithm in SB3 with the weights of our agent: none is left over on either side."""
    algorithm = getattr(stable_baselines3, module.__name__.upper())
    envs = DummyVecEnv([lambda: gym.make(args.env_id)] * num_envs)
    model = algorithm("MlpPolicy", envs, args.learning_rate, gamma=args.gamma, device="cpu", **settings)
    model.policy.load_state_dict(with_names_of_sb3(module, agent), strict=True)
    model.set_logger(Logger(folder=None, output_formats=[]))
    return model


def assert_same(module, agent, model, row, losses):
    """The same parameters, and the same losses, as far as SB3 logs them."""
    assert {name: float(row[name]) for name in losses} == pytest.approx(losses, **LOSSES)
    torch.testing.assert_close(with_names_of_sb3(module, agent), dict(model.policy.state_dict()), **PARAMETERS)


# ----- a2c.py, ppo.py


def make_policies(module, monkeypatch, env_id, flags, settings):
    """Our agent, its optimizer and Args, and SB3's model with the optimizer that is its default."""
    both = dict(gae_lambda=0.8, ent_coef=0.1, max_grad_norm=0.5)
    flags = both | dict(env_id=env_id, num_envs=NUM_ENVS, num_steps=NUM_STEPS, gamma=0.9, vf_coef=0.7) | flags
    agent, (optimizer,), args = made_by_train(module, monkeypatch, flags | dict(norm_obs=False, norm_reward=False))
    settings = both | dict(n_steps=NUM_STEPS, vf_coef=0.7 / 2) | settings
    return agent, optimizer, args, make_sb3(module, agent, args, NUM_ENVS, **settings)


def random_steps(rng, model):
    """Steps as train() collects them, and where they were only truncated: both kinds of end, inside and in the end."""
    terminated, truncated = rng.random((2, NUM_STEPS, NUM_ENVS)) < 0.15
    terminated[[3, -1]], truncated[[3, -1]] = [False, True, False, True], [False, False, True, True]
    obs_shape, space = (NUM_ENVS, int(np.prod(model.observation_space.shape))), model.action_space
    steps, obs = [], rng.normal(size=obs_shape).astype(np.float32)
    for t in range(NUM_STEPS):
        if isinstance(space, gym.spaces.Discrete):
            action = rng.integers(space.n, size=NUM_ENVS)
        else:
            action = rng.normal(size=(NUM_ENVS, 2)).astype(np.float32)
        done = terminated[t] | truncated[t]
        next_obs, first_obs = rng.normal(size=(2, *obs_shape)).astype(np.float32)
        steps.append((obs, action, 3 * rng.normal(size=NUM_ENVS), next_obs, terminated[t], done))
        obs = np.where(done[:, None], first_obs, next_obs)
    return steps, truncated & ~terminated


@torch.no_grad()
def fill_rollout_buffer(model, steps, truncated):
    """As collect_rollouts() of SB3 does: the value of the last state of a truncated episode goes into the reward."""
    shape, episode_start = (NUM_ENVS, *model.observation_space.shape), np.zeros(NUM_ENVS)
    model.rollout_buffer.reset()
    for (obs, action, reward, next_obs, _, done), cut in zip(steps, truncated, strict=True):
        value, log_prob, _ = model.policy.evaluate_actions(torch.from_numpy(obs), torch.from_numpy(action))
        next_value = model.policy.predict_values(torch.from_numpy(next_obs))
        reward = reward + cut * model.gamma * next_value.numpy().squeeze(-1)
        model.rollout_buffer.add(obs.reshape(shape), action, reward, episode_start, value, log_prob)
        episode_start = done
    model.rollout_buffer.compute_returns_and_advantage(next_value, done)


@pytest.mark.parametrize("env_id", (DISCRETE, BOX))
def test_a2c_takes_the_steps_of_stable_baselines3(env_id, monkeypatch):
    agent, optimizer, args, model = make_policies(a2c, monkeypatch, env_id, {}, {})
    rng = np.random.default_rng(0)
    for _ in range(UPDATES):
        steps, truncated = random_steps(rng, model)
        fill_rollout_buffer(model, steps, truncated)
        row = a2c.a2c_update(agent, optimizer, a2c.stack(steps, agent.device), args)
        model.train()
        theirs = model.logger.name_to_value
        losses = {
            "losses/policy_loss": theirs["train/policy_loss"],
            "losses/value_loss": theirs["train/value_loss"] / 2,
            "losses/entropy": -theirs["train/entropy_loss"],
            "losses/explained_variance": theirs["train/explained_variance"],
        }
        assert_same(a2c, agent, model, row, losses)


@pytest.mark.parametrize("env_id", (DISCRETE, BOX))
def test_ppo_takes_the_steps_of_stable_baselines3(env_id, monkeypatch):
    flags = dict(update_epochs=3, num_minibatches=4, clip_coef=0.1, learning_rate=3e-3)
    flags |= dict(norm_adv=True, clip_vloss=False, target_kl=None)
    settings = dict(n_epochs=3, batch_size=NUM_STEPS * NUM_ENVS // 4, clip_range=0.1)
    agent, optimizer, args, model = make_policies(ppo, monkeypatch, env_id, flags, settings)
    rng = np.random.default_rng(0)

    def permutation(size):
        """What ppo.py draws, for rows that are sorted by environment."""
        t, n = np.divmod(torch.randperm(size).numpy(), NUM_ENVS)
        return n * NUM_STEPS + t

    def take_step(agent, optimizer, minibatch, args):
        logs.append(ppo.ppo_step(agent, optimizer, minibatch, args))
        return logs[-1]

    for update in range(UPDATES):
        steps, truncated = random_steps(rng, model)
        fill_rollout_buffer(model, steps, truncated)
        logs = []
        torch.manual_seed(update)
        row = ppo.ppo_update(agent, optimizer, ppo.stack(steps, agent.device), args, take_step)
        torch.manual_seed(update)
        with monkeypatch.context() as patch:
            patch.setattr(np.random, "permutation", permutation)
            model.train()
        theirs = model.logger.name_to_value
        losses = {
            "losses/policy_loss": theirs["train/policy_gradient_loss"],
            "losses/value_loss": theirs["train/value_loss"] / 2,
            "losses/entropy": -theirs["train/entropy_loss"],
            "losses/clipfrac": theirs["train/clip_fraction"],
            "losses/explained_variance": theirs["train/explained_variance"],
            "losses/approx_kl": theirs["train/approx_kl"],
        }
        row["losses/approx_kl"] = np.mean([log["losses/approx_kl"].item() for log in logs[-4:]])
        assert 0 < row["losses/clipfrac"] < 1
        assert_same(ppo, agent, model, row, losses)


# ----- dqn.py, ddpg.py, td3.py, sac.py


def make_learners(module, monkeypatch, flags, settings):
    """Our agent, its optimizers and Args, and SB3's model, whose batch is the whole of its replay buffer."""
    both = dict(tau=0.1, buffer_size=BATCH_SIZE, batch_size=BATCH_SIZE)
    if module is not dqn:
        flags = dict(env_id=BOX, learning_rate=1e-3, q_lr=2e-3) | flags
    agent, optimizers, args = made_by_train(module, monkeypatch, both | dict(gamma=0.9) | flags)
    widths = dict(net_arch=[120, 84] if module is dqn else [256, 256])
    model = make_sb3(module, agent, args, policy_kwargs=widths, **both | settings)
    whole = lambda size, env: model.replay_buffer._get_samples(np.arange(size), env)  # noqa: E731
    monkeypatch.setattr(model.replay_buffer, "sample", whole)
    if module is dqn:
        their_optimizers = [model.policy.optimizer]
    else:
        their_optimizers = [model.critic.optimizer, model.actor.optimizer]
        monkeypatch.setattr(model, "_update_learning_rate", lambda optimizers: None)
        model.critic.optimizer.param_groups[0]["lr"] = args.q_lr
    for ours, theirs in zip(optimizers, their_optimizers, strict=True):
        for group in ours.param_groups + theirs.param_groups:
            assert all(group[name] == theirs.defaults[name] for name in ("betas", "eps", "weight_decay", "amsgrad"))
            group["eps"] = EPS
    return agent, optimizers, args, model


def random_batch(rng, module, model):
    """Transitions, put into the replay buffer of SB3 too; some ended in either way, some in both."""
    obs_shape = model.observation_space.shape
    obs, next_obs = rng.normal(size=(2, BATCH_SIZE, int(np.prod(obs_shape)))).astype(np.float32)
    if module is dqn:
        action = rng.integers(model.action_space.n, size=BATCH_SIZE)
    else:
        action = rng.uniform(-1, 1, (BATCH_SIZE, 2)).astype(np.float32)
    reward = 3 * rng.normal(size=BATCH_SIZE).astype(np.float32)
    terminated, truncated = (rng.permutation(BATCH_SIZE) & np.array([[1], [2]])).astype(bool)
    for i in range(BATCH_SIZE):
        infos = [{"TimeLimit.truncated": truncated[i] and not terminated[i]}]
        before, after = obs[i].reshape(1, *obs_shape), next_obs[i].reshape(1, *obs_shape)
        model.replay_buffer.add(before, after, action[i], reward[i], terminated[i] | truncated[i], infos)
    return module.Transitions(*map(torch.from_numpy, (obs, action, reward, next_obs, terminated)))


def assert_each_critic_is_lower_somewhere(critic, batch):
    first, second = critic(batch.obs, batch.action)
    assert (first < second).any() and (second < first).any()


def test_dqn_takes_the_steps_of_stable_baselines3(monkeypatch):
    flags = dict(env_id=DISCRETE, huber_delta=1.0, double=False, dueling=False)
    settings = dict(max_grad_norm=np.inf, target_update_interval=1)
    agent, (optimizer,), args, model = make_learners(dqn, monkeypatch, flags, settings)
    rng = np.random.default_rng(0)
    for _ in range(UPDATES):
        batch = random_batch(rng, dqn, model)
        row = dqn.dqn_update(agent, optimizer, batch, args)
        dqn.polyak(agent.target_critic, agent.critic, args.tau)
        model.train(gradient_steps=1, batch_size=BATCH_SIZE)
        model._on_step()
        assert_same(dqn, agent, model, row, {"losses/qf_loss": model.logger.name_to_value["train/loss"]})


def test_ddpg_takes_the_steps_of_stable_baselines3(monkeypatch):
    agent, optimizers, args, model = make_learners(ddpg, monkeypatch, {}, {})
    rng = np.random.default_rng(0)
    for _ in range(UPDATES):
        batch = random_batch(rng, ddpg, model)
        row = ddpg.ddpg_update(agent, *optimizers, batch, args)
        model.train(gradient_steps=1, batch_size=BATCH_SIZE)
        theirs = model.logger.name_to_value
        losses = {"losses/qf_loss": theirs["train/critic_loss"], "losses/actor_loss": theirs["train/actor_loss"]}
        assert_same(ddpg, agent, model, row, losses)


@pytest.mark.parametrize("delay", (1, 2, 3))
def test_td3_takes_the_steps_of_stable_baselines3(delay, monkeypatch):
    flags = dict(policy_frequency=delay, policy_noise=0.8, noise_clip=0.9)
    settings = dict(policy_delay=delay, target_policy_noise=0.8, target_noise_clip=0.9)
    agent, optimizers, args, model = make_learners(td3, monkeypatch, flags, settings)
    model._n_updates = delay - 1
    rng = np.random.default_rng(0)
    for update in range(UPDATES):
        batch = random_batch(rng, td3, model)
        assert_each_critic_is_lower_somewhere(agent.target_critic, batch)
        noise = torch.randn(BATCH_SIZE, 2)
        smoothed = agent.target_actor(batch.next_obs) + (0.8 * noise).clamp(-0.9, 0.9)
        assert (0.8 * noise.abs() > 0.9).any() and (smoothed.abs() > 1).any()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda action: noise)
            row = td3.td3_update(agent, *optimizers, batch, args, update % delay == 0)
        theirs = model.logger.name_to_value
        theirs.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "normal_", lambda x, mean, std: x.copy_(mean + std * noise))
            model.train(gradient_steps=1, batch_size=BATCH_SIZE)
        losses = {"losses/qf_loss": theirs["train/critic_loss"]}
        assert ("losses/actor_loss" in row) == ("train/actor_loss" in theirs) == (update % delay == 0)
        if update % delay == 0:
            losses["losses/actor_loss"] = theirs["train/actor_loss"]
        assert_same(td3, agent, model, row, losses)


@pytest.mark.parametrize("autotune", (True, False))
def test_sac_takes_the_steps_of_stable_baselines3(autotune, monkeypatch):
    settings = dict(ent_coef="auto_0.3" if autotune else 0.3)
    agent, optimizers, args, model = make_learners(sac, monkeypatch, dict(alpha=0.3, autotune=autotune), settings)
    model.critic.optimizer.param_groups[0]["eps"] /= 2
    model.actor.log_std.register_forward_hook(lambda layer, inputs, output: -5 + (2 + 5) * (output.tanh() + 1) / 2)
    distribution, density = model.actor.action_dist, model.actor.action_dist.log_prob
    distribution.epsilon = 0
    in_float64 = lambda action, u: density(u.double().tanh(), u.double()).float()  # noqa: E731
    monkeypatch.setattr(distribution, "log_prob", in_float64)
    if autotune:
        model.ent_coef_optimizer.param_groups[0] |= dict(lr=args.q_lr, eps=EPS)
        model.log_ent_coef.register_hook(lambda gradient: gradient * model.log_ent_coef.detach().exp())
    rng = np.random.default_rng(0)
    for _ in range(UPDATES):
        batch = random_batch(rng, sac, model)
        assert_each_critic_is_lower_somewhere(agent.target_critic, batch)
        assert_each_critic_is_lower_somewhere(agent.critic, batch)
        log_alpha = agent.log_alpha.item()
        noise, next_noise = torch.randn(2, BATCH_SIZE, 2)
        with monkeypatch.context() as patch:
            our_draws = iter((next_noise, noise))
            patch.setattr(torch, "randn_like", lambda mean: next(our_draws))
            row = sac.sac_update(agent, *optimizers, batch, args)
        with monkeypatch.context() as patch:
            their_draws = iter((noise, next_noise))
            rsample = lambda normal: normal.loc + normal.scale * next(their_draws)  # noqa: E731
            patch.setattr(torch.distributions.Normal, "rsample", rsample)
            model.train(gradient_steps=1, batch_size=BATCH_SIZE)
        theirs = model.logger.name_to_value
        losses = {
            "losses/qf_loss": theirs["train/critic_loss"] * 2,
            "losses/actor_loss": theirs["train/actor_loss"],
            "losses/alpha": theirs["train/ent_coef"],
        }
        if autotune:
            losses["losses/alpha_loss"] = theirs["train/ent_coef_loss"] / log_alpha * np.exp(log_alpha)
            torch.testing.assert_close(agent.log_alpha.detach(), model.log_ent_coef.detach()[0], **PARAMETERS)
        assert_same(sac, agent, model, row, losses)
