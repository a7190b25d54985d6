"""Finished runs as two small tables, each with a row a run: results, and curves of the training return.

    python benchmark/collect.py runs/benchmark     # into benchmark/results.csv and benchmark/curves.csv

A row that is in the tables already stays, unless its seed was run again. Where the runs of a cell (script, environment,
steps, variant) have other settings than its rows, --replace puts them in the place of the rows. Runs of run.py on the
seeds on which settings were chosen are left out; --tuning takes those, and only those. What is left out is said.
"""

import contextlib
import csv
import hashlib
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro
from experiments import CHOOSE

HERE = Path(__file__).resolve().parent
CELL = ("script", "env_id", "steps", "variant")
MADE_WITH = ("settings", "flags", "commit", "versions", "machine")
RESULT = (*CELL, "seed", "return", "return_std", "episodes", "wall_s", "steps_per_s", *MADE_WITH)
# What a run's result does not depend on, beside rounding; anything else makes it another run.
NOT_SETTINGS = ("script", "seed", "device", "num_threads", "onednn", "compile", "track", "wandb_project_name")
NOT_SETTINGS += ("wandb_entity", "wandb_group", "capture_video", "runs_dir", "log_every", "eval_every", "resume")
# --hidden-sizes is younger than most results, all made with these: at them it does not count.
HIDDEN_SIZES = dict.fromkeys(("reinforce", "a2c", "ppo"), [64, 64]) | {"dqn": [120, 84]}
HIDDEN_SIZES |= dict.fromkeys(("ddpg", "td3", "sac"), [256, 256])
POINTS = 40
CURVE = (*CELL, "seed", *map(str, range(1, POINTS + 1)))  # column k: the k-th fortieth of the steps


@dataclass
class Options:
    runs_dir: tyro.conf.Positional[Path]  # a folder with runs in it, at any depth
    out: Path = HERE  # where results.csv and curves.csv are
    tuning: bool = False  # take the seeds on which settings are chosen, and leave out the others
    replace: bool = False  # runs with other settings than the rows of their cell take the place of these


def fail(message: str) -> None:
    """Ends the program with one line on stderr; exit code 2 says that the input was bad."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_json(path: Path) -> dict:
    """What a JSON file says; nothing if it isn't there or is torn."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def read_rows(folder: Path) -> list[dict]:
    """The rows of a run's metrics; torn or damaged ones are left out."""
    rows, path = [], folder / "metrics.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "global_step" in row:
            rows.append(row)
    return rows


def settings_hash(args: dict, edits: tuple = ()) -> str:
    """A short hash of what a result depends on beside the seed: all flags, defaults included, and edits of the text.

    `args` are the flags by name, and the script.
    """
    settings = {name: value for name, value in args.items() if name not in NOT_SETTINGS}
    if list(settings.get("hidden_sizes", ())) == HIDDEN_SIZES.get(args["script"]):
        del settings["hidden_sizes"]
    text = json.dumps(settings, sort_keys=True) + (json.dumps(edits) if edits else "")
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def is_finished(args: dict, rows: list[dict]) -> bool:
    """Whether a run was trained to its end and evaluated there."""
    last = rows[-1] if rows else {}
    return "eval/episodic_return" in last and last["global_step"] >= args.get("total_timesteps", math.inf)


def summarize(args: dict, rows: list[dict], about: dict) -> dict:
    """A finished run's row of results, with its `curve` beside; `about` says what it was made with."""
    trained = [row for row in rows if "charts/SPS" in row]
    # Time is what the training took, by the rows' own clocks: neither evaluations nor pauses between resumptions.
    wall, before = 0.0, 0
    sums = [(0.0, 0)] * POINTS
    for row in trained:
        wall += (row["global_step"] - before) / row["charts/SPS"]
        before = row["global_step"]
        if ended := row["charts/episodes"]:
            point = min(math.ceil(POINTS * before / args["total_timesteps"]), POINTS) - 1
            total, episodes = sums[point]
            sums[point] = total + ended * row["charts/episodic_return"], episodes + ended
    last = rows[-1]
    result = {"script": args["script"], "env_id": args["env_id"], "steps": args["total_timesteps"]}
    result |= {"variant": about.get("variant", ""), "seed": args["seed"]}
    result |= {
        "return": round(last["eval/episodic_return"], 3),
        "return_std": round(last["eval/episodic_return_std"], 3),
    }
    result |= {"episodes": int(last["eval/episodes"]), "wall_s": round(wall, 1)}
    result |= {"steps_per_s": round(before / wall) if wall else ""}
    made = {"settings": settings_hash(args)} | about
    result |= {key: made.get(key, "") for key in MADE_WITH}
    return result | {"curve": [float(f"{total / episodes:.4g}") if episodes else "" for total, episodes in sums]}


def settings_of_cells(runs: list[dict]) -> dict[tuple, str]:
    """The settings that each cell had last, of runs with the oldest first."""
    return {tuple(str(run[name]) for name in CELL): run["settings"] for run in runs}


def keep_newest(runs: list[dict]) -> list[dict]:
    """Of the runs, oldest first, those with the settings that their cell had last, and of each seed the last."""
    settings, kept, others = settings_of_cells(runs), {}, Counter()
    for run in runs:
        cell = tuple(str(run[name]) for name in CELL)
        if run["settings"] == settings[cell]:
            kept[*cell, str(run["seed"])] = run
        else:
            others[cell] += 1
    for cell, count in others.items():
        runs_of = f"{count} run{'s' if count > 1 else ''} of {' '.join(filter(None, cell))}"
        print(f"left out: {runs_of} with other settings than the newest", file=sys.stderr)
    return list(kept.values())


def read_folder(runs_dir: Path, tuning: bool = False) -> list[dict]:
    """The finished runs in a folder, those of run.py and others; says on stderr which it leaves out."""
    runs, others = [], 0
    # Only a finished run has agent.pt; the oldest come first.
    for path in sorted(runs_dir.rglob("agent.pt"), key=lambda path: path.stat().st_mtime):
        folder, about = path.parent, read_json(path.parent.parent / "run.json")
        args = read_json(folder / "args.json")
        rows = read_rows(folder) if args else []
        if not is_finished(args, rows):
            print(f"left out: {folder}, not evaluated at the end or damaged", file=sys.stderr)
        elif not about and (folder.parent / "lock").exists():  # of run.py, but of which variant?
            print(f"left out: {folder}, whose run.json is lost or torn", file=sys.stderr)
        elif (bool(about) and args["seed"] in CHOOSE) == (bool(about) and tuning):
            runs.append(summarize(args, rows, about))
        else:
            others += 1
    if others:
        of = "other seeds than those" if tuning else "the seeds"
        hint = "" if tuning else "; --tuning takes them"
        print(f"left out: {others} finished runs on {of} on which settings are chosen{hint}", file=sys.stderr)
    return keep_newest(runs)


def read_tables(folder: Path) -> list[dict]:
    """The runs in results.csv and curves.csv; none if neither is there. They must be of the same runs, all numbers."""
    tables = []
    for name in ("results.csv", "curves.csv"):
        try:
            with (folder / name).open(newline="") as file:
                rows = list(csv.DictReader(file))
            for row in rows if name == "results.csv" else []:
                int(row["steps"]), int(row["seed"]), float(row["return"])  # raise here if they are no numbers
            tables.append({tuple(row[key] for key in (*CELL, "seed")): row for row in rows})
        except (ValueError, TypeError) as error:
            fail(f"{folder / name}: {error}")
        except FileNotFoundError:
            tables.append({})
        except KeyError as error:
            fail(f"{folder / name} has no column {error}")
    results, curves = tables
    if results.keys() != curves.keys():  # one is missing or was cut off; writing would lose what the other has
        fail(f"results.csv and curves.csv in {folder} are not of the same runs; restore them from git")
    return [row | {"curve": [curves[key][str(k)] for k in range(1, POINTS + 1)]} for key, row in results.items()]


def write_tables(folder: Path, runs: list[dict]) -> None:
    """Writes results.csv and curves.csv, sorted."""
    runs = sorted(
        runs, key=lambda run: (run["script"], run["env_id"], int(run["steps"]), run["variant"], int(run["seed"]))
    )
    runs = [run | {str(k): x for k, x in enumerate(run["curve"], 1)} for run in runs]
    tables = {"results.csv": RESULT, "curves.csv": CURVE}
    parts = [folder / f"{name}.part" for name in tables]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part, fields in zip(parts, tables.values()):
            with part.open("w", newline="") as file:
                writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
                writer.writeheader()
                writer.writerows(runs)
        for part, name in zip(parts, tables):  # when both are written whole
            part.replace(folder / name)
    except OSError as error:
        for part in parts:
            with contextlib.suppress(OSError):
                part.unlink()
        fail(f"the tables in {folder} cannot be written: {error}")


def main(options: Options) -> None:
    """Adds the finished runs to the tables."""
    if not options.runs_dir.is_dir():
        fail(f"there is no folder {options.runs_dir}")
    runs, rows = read_folder(options.runs_dir, options.tuning), read_tables(options.out)
    now = settings_of_cells(rows + runs)
    gone = [" ".join(filter(None, cell)) for cell, old in settings_of_cells(rows).items() if now[cell] != old]
    if gone and not options.replace:
        fail(f"the runs have other settings than the rows of {', '.join(gone)}; --replace puts them in their place")
    before = {tuple(str(row[key]) for key in (*CELL, "seed")): float(row["return"]) for row in rows}
    for run in runs:
        *cell, seed = key = tuple(str(run[name]) for name in (*CELL, "seed"))
        if before.get(key, run["return"]) != run["return"]:
            print(f"{' '.join(filter(None, cell))} seed {seed}: {run['return']} in the place of {before[key]}")
    merged = keep_newest(rows + runs)
    write_tables(options.out, merged)
    print(f"{len(runs)} finished runs in {options.runs_dir}, {len(merged)} in {options.out / 'results.csv'}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
