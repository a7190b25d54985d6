"""Duplication on purpose, kept honest: one name means one text, and neighbours differ by their idea alone."""

import ast
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from tests.mutations import MUTATIONS, check

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for path in [*ROOT.glob("*.py"), *ROOT.glob("more/*.py")])

# Definitions that may differ, and why.
LESSONS = {
    "Args": "each script has flags of its own after the common ones (which a test below compares)",
    "train": "the loop follows the pseudocode of each paper",
    "Agent": "its networks are the lesson; the policy-gradient scripts have one text (which a test below compares)",
    "Critic": "one Q in ddpg.py, two side by side in td3.py and sac.py, of which TD3's actor climbs the first alone",
    "critic_loss": "what the target of the critic is made of is the lesson, from dqn.py to sac.py",
    "actor_loss": "what the actor climbs is the lesson, from ddpg.py to sac.py",
}

# Added plus deleted lines between neighbours.
BUDGETS = {
    ("reinforce.py", "a2c.py"): 150,
    ("a2c.py", "ppo.py"): 110,
    ("dqn.py", "ddpg.py"): 190,
    ("ddpg.py", "td3.py"): 70,
    ("td3.py", "sac.py"): 130,
}

COMMON_FLAGS = (
    "env_id seed total_timesteps num_envs learning_rate gamma device num_threads onednn compile track "
    "wandb_project_name wandb_entity wandb_group capture_video "
    "runs_dir log_every eval_episodes eval_every checkpoint_every resume hidden_sizes"
).split()


def definitions(path):
    """The source of each top-level definition, decorators included."""
    source = path.read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            decorators = [ast.get_source_segment(source, d) for d in node.decorator_list]
            yield node.name, "\n".join([*decorators, ast.get_source_segment(source, node)])


def flags(path):
    """{name: (type, default, line)} of Args, in order."""
    source = path.read_text()
    args = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    lines = source.splitlines()
    fields = [n for n in args.body if isinstance(n, ast.AnnAssign)]
    return {f.target.id: (ast.unparse(f.annotation), ast.unparse(f.value), lines[f.lineno - 1]) for f in fields}


def test_there_are_scripts():
    names = {"reinforce.py", "a2c.py", "ppo.py", "dqn.py", "ddpg.py", "td3.py", "sac.py"}
    assert names <= {path.name for path in SCRIPTS}


def test_definitions_of_one_name_are_one_text():
    versions = defaultdict(lambda: defaultdict(list))
    for path in SCRIPTS:
        for name, source in definitions(path):
            versions[name][source].append(path.name)
    for name, copies in versions.items():
        if len(copies) > 1 and name not in LESSONS:
            texts = "\n\n".join(f"--- {', '.join(files)}\n{source}" for source, files in copies.items())
            pytest.fail(f"{name} differs between the scripts:\n{texts}")


def test_the_agent_is_one_text_in_the_policy_gradient_scripts():
    assert len({dict(definitions(ROOT / f"{name}.py"))["Agent"] for name in ("reinforce", "a2c", "ppo")}) == 1


def test_the_plumbing_is_one_text():
    """From its banner to the end of the file, comments and order included."""
    texts = {path.name: path.read_text().split("# ----- plumbing")[1] for path in SCRIPTS}
    assert len(set(texts.values())) == 1, texts.keys()


def test_sections_come_in_the_same_order():
    for path in SCRIPTS:
        banners = [line.split()[2].strip(",") for line in path.read_text().splitlines() if line.startswith("# -----")]
        parallel = ["several"] * (path.name in ("reinforce.py", "a2c.py", "ppo.py"))
        assert banners == ["networks", "memory", "algorithm", "training", *parallel, "plumbing"], path.name


def test_imports_and_metadata_are_one_text():
    """But for `copy`, which makes target networks, and `atexit`, which ends gloo: not every script has those."""

    def head(path):
        text = path.read_text()
        imports = text[text.index("\nimport ") : text.index("@dataclass")]
        return text[: text.index('"""')] + re.sub(r"^import (copy|atexit)\n", "", imports, flags=re.MULTILINE)

    heads = {head(path) for path in SCRIPTS}
    assert len(heads) == 1


def test_common_flags_come_first_and_alike():
    """Same order, names, types and help; but the algorithm may need another default, from another source."""
    for path in SCRIPTS:
        assert list(flags(path))[: len(COMMON_FLAGS)] == COMMON_FLAGS, path.name
    of_the_algorithm = ("env_id", "total_timesteps", "num_envs", "learning_rate", "onednn", "hidden_sizes")
    for name in COMMON_FLAGS:
        types, defaults, lines = zip(*(flags(path)[name] for path in SCRIPTS))
        assert len(set(types)) == 1, name
        assert len(set(defaults)) == 1 or name in of_the_algorithm, name
        texts = {re.sub(r" \([^()]*\)$", "", line.split("  # ")[1]) for line in lines}
        assert len(texts) == 1 or name in ("num_envs", "learning_rate"), name


def test_flags_of_one_name_mean_the_same():
    types = defaultdict(set)
    for path in SCRIPTS:
        for name, (annotation, _, _) in flags(path).items():
            types[name].add(annotation)
    assert all(len(kinds) == 1 for kinds in types.values()), types


def test_every_flag_is_read_and_explained():
    for path in SCRIPTS:
        source = path.read_text()
        body = source[source.index("# ----- networks") :]
        for name, (_, _, line) in flags(path).items():
            assert f"args.{name}" in body or f'"{name}"' in body, f"{path.name} never reads --{name}"
            assert "  # " in line, f"{path.name}: --{name} has no help"


def test_scripts_import_nothing_of_this_repository():
    allowed = set("torch gymnasium mujoco tyro wandb numpy tqdm".split())  # mujoco comes with gymnasium[mujoco]
    import sys

    for path in SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                root = name.split(".")[0]
                assert root in allowed or root in sys.stdlib_module_names, f"{path.name} imports {name}"


@pytest.mark.parametrize("pair", BUDGETS, ids=lambda pair: "→".join(pair))
def test_the_diff_of_neighbours_is_the_lesson(pair):
    command = ["git", "diff", "--no-index", "--numstat", *pair]
    added, deleted, _ = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split(maxsplit=2)
    assert int(added) + int(deleted) <= BUDGETS[pair]


def test_public_definitions_have_docstrings():
    for path in SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("__")
                and node.name != "Args"
            ):
                inner = node.name in ("make_env",)
                assert inner or ast.get_docstring(node), f"{path.name}: {node.name}"


def test_the_table_of_planted_mistakes_is_that_of_the_list():
    check(ROOT)
    rows = [line for line in (ROOT / "tests" / "mutations.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [mutation.name for mutation in MUTATIONS]
    assert not any("**nothing**" in row for row in rows)
    assert f"plants {len(MUTATIONS)} mistakes" in (ROOT / "README.md").read_text()
