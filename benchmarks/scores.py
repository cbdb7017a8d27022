"""Scores of predictions files: retention, intervals, tokens and time, beside what the papers print.

Needs the files alone: no GPU, no model, no data set. Retention has one definition: score / score
with all tokens, in percent; over several benchmarks the mean of theirs.
"""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

import benchmarks
from benchmarks import predictions

VANILLA = ("vanilla", 0)
SEED = re.compile(r"_s\d+\b")         # what tells the runs of one setting apart, <run>_s0, <run>_s1
PRINTED = Path(__file__).with_name("published.json")
DOWNSAMPLE = "downsample"             # the baseline that tells hard questions from easy ones
RIGHT = 50                            # of 100 points: a question counts as answered [VTC-Bench]
SAME_RUN = ("model", "fingerprint", "dtype", "protocol", "positions")


def complete_files(folder: Path) -> tuple[dict, dict]:
    """({benchmark: {(method, K): rows}}, the header they share) of all complete predictions files
    below a folder.

    Incomplete ones are named and left out. Raises FileNotFoundError where there is none, ValueError
    for answers of different models, or to different questions, side by side, and for a benchmark
    that is not known.
    """
    files = {}
    shared = {}
    known = benchmarks.names()
    paths = (path.with_name(predictions.PART.sub("", path.stem) + ".jsonl")
             for path in sorted(Path(folder).rglob("*.jsonl")))
    for path in dict.fromkeys(paths):
        header, rows = predictions.read(path)
        if header is None:
            continue
        name = header["benchmark"]
        if name not in known:
            raise ValueError(f"{path} is of the benchmark {name!r}: known are {', '.join(known)}")
        shared = shared or dict(header)
        if "steered on" in header:
            shared.setdefault("steered", {})[name] = header["steered on"]
        for key in SAME_RUN:
            if header.get(key) != shared.get(key):
                raise ValueError(f"{path} has the {key} {header.get(key)!r}, another file "
                                 f"{shared.get(key)!r}: one folder holds the answers of one model, "
                                 "asked in one way; move one of them away")
        if len(rows) < header["questions"]:
            print(f"{path}: {len(rows)} of {header['questions']} questions are answered; left out, "
                  "run it again to complete it")
            continue
        add_file(files.setdefault(name, {}), path, header, rows)
    files = {name: files[name] for name in known if files.get(name)}
    if not files:
        raise FileNotFoundError(f"{folder} holds no complete predictions file")
    return files, shared


def add_file(files: dict, path: Path, header: dict, rows: list[dict]) -> None:
    """Put one benchmark's rows beside those that are there. Raises ValueError where they do not
    fit."""
    method, budget = header["method"], header["budget"]
    if (method, budget) in files:
        raise ValueError(f"{path} is a second file of {header['benchmark']}, {method}, {budget}: "
                         "move one away")
    other = next(iter(files.values()), rows)
    if [(row["id"], row["gold"]) for row in rows] != [(row["id"], row["gold"]) for row in other]:
        raise ValueError(f"{path} answers other questions than the files beside it: retention is "
                         "of the same questions only; move one away")
    files[method, budget] = rows


# ------------------------------------------------------------------------------------ intervals


def group(row: dict) -> tuple:
    """(stratum, key) of the questions that are scored as one: the two about a picture of MME, whose
    categories are added up; the rotated copies of a question of MMBench. Else each by itself."""
    gold = row["gold"] if isinstance(row["gold"], dict) else {}
    if "pair" in gold:
        return gold["category"], gold["pair"]
    return "", gold["index"] % 1_000_000 if "copies" in gold else row["id"]


def grouped(rows) -> dict[str, dict]:
    """{stratum: {key: rows}} by group()."""
    strata = {}
    for row in rows:
        stratum, key = group(row)
        strata.setdefault(stratum, {}).setdefault(key, []).append(row)
    return strata


def group_scores(module, rows) -> list[np.ndarray] | None:
    """The score as a mean over groups of questions, or a sum over strata of such means: an array of
    the groups' scores for each stratum; None for a score that is neither."""
    strata = grouped(rows)
    values = [np.array([module.score(members)[module.MAIN] for members in groups.values()], float)
              for groups in strata.values()]
    total = module.score(rows)[module.MAIN]
    together = np.concatenate(values)
    if np.isclose(together.mean(), total):
        return [together]
    return values if np.isclose(sum(x.mean() for x in values), total) else None


def bootstrap(module, rows, seed: int = 0, resamples: int = 1000) -> np.ndarray:
    """(resamples,) scores of as many questions drawn with replacement; the same draws for files of
    the same questions.

    A score that is no mean, as POPE's F1, is computed anew for each draw: from counts, where the
    benchmark has cell(row) and from_counts(), else from the rows.
    """
    if hasattr(module, "from_counts"):
        return bootstrap_counts(module, rows, seed, resamples)
    draws = np.zeros(resamples)
    values = group_scores(module, rows)
    if values is None:
        rng = np.random.default_rng([seed, 0])
        strata = [[*groups.values()] for groups in grouped(rows).values()]
        for i in tqdm(range(resamples), "resample", leave=False):
            drawn = [groups[q] for groups in strata
                     for q in rng.integers(0, len(groups), len(groups))]
            again = [renamed(row, place) for place, members in enumerate(drawn) for row in members]
            draws[i] = module.score(again)[module.MAIN]
        return draws
    for number, x in enumerate(values):
        rng = np.random.default_rng([seed, number])
        for i in range(resamples):
            draws[i] += x[rng.integers(0, len(x), len(x))].mean()
    return draws


def renamed(row: dict, place: int) -> dict:
    """A row that is drawn at this place: a scorer refuses an id that comes twice, and a pair."""
    gold = row["gold"]
    if isinstance(gold, dict) and "pair" in gold:
        gold = gold | {"pair": f"{gold['pair']} {place}"}
    return {**row, "id": f"{row['id']} {place}", "gold": gold}


def bootstrap_counts(module, rows, seed: int, resamples: int) -> np.ndarray:
    """bootstrap() of a score that follows from how many rows are of each kind."""
    cells = [module.cell(row) for row in rows]
    kinds = list(dict.fromkeys(cells))
    index = np.array([kinds.index(cell) for cell in cells])
    rng = np.random.default_rng([seed, 0])
    draws = np.zeros(resamples)
    for i in range(resamples):
        drawn = index[rng.integers(0, len(rows), len(rows))]
        counts = np.bincount(drawn, minlength=len(kinds)).tolist()
        present = Counter({kind: n for kind, n in zip(kinds, counts) if n})
        draws[i] = module.from_counts(present)[module.MAIN]
    return draws


def interval(draws: np.ndarray) -> list[float]:
    """The middle 95 % of them."""
    return np.percentile(draws, [2.5, 97.5]).tolist()


# ------------------------------------------------------------------------------------ lines


def retention(scores: dict, base: dict) -> tuple[float | None, int]:
    """(mean over benchmarks of 100 * score / base, how many entered): those of both, whose base is
    not 0."""
    parts = [100 * score / base[name] for name, score in scores.items() if base.get(name)]
    return (float(np.mean(parts)) if parts else None), len(parts)


def summarise(files: dict, seed: int = 0, resamples: int = 1000) -> list[dict]:
    """A line per method and K, from complete_files(): {
        "method", "K",
        "scores": {benchmark: all of score(), with value, the one that papers print, interval,
                   retention, retention_interval; too_long, how many questions are longer than the
                   model has positions for; hard, see hard_scores(), where there are answers to the
                   downsampled pictures},
        "average", "benchmarks": retention() over them,
        "costs": {benchmark: cost()}, "cost": their mean,
        "recall": {benchmark: share of the evidence that was kept, percent}, where it is known,
        "spread": {benchmark: spread()}, where a method decides how many tokens it keeps}
    """
    lines, draws, full = {}, {}, {}
    for name, ways in files.items():
        module = benchmarks.load_module(name)
        hard = hard_scores(module, ways)
        for key, rows in sorted(ways.items(), key=lambda item: item[0] != VANILLA):
            line = lines.setdefault(key, {"method": key[0], "K": key[1], "scores": {}, "costs": {},
                                          "recall": {}, "spread": {}})
            result = module.score(rows)
            result["value"] = float(result[module.MAIN])
            drawn = draws[name, key] = bootstrap(module, rows, seed, resamples)
            result["interval"] = interval(drawn)
            if key == VANILLA:                         # which comes first
                full[name] = result["value"]
            if full.get(name):
                base = draws[name, VANILLA]
                result["retention"] = 100 * result["value"] / full[name]
                result["retention_interval"] = interval(100 * drawn[base > 0] / base[base > 0])
            if too_long := sum("too long" in row for row in rows):
                result["too_long"] = too_long
            if key in hard:
                result["hard"] = hard[key]
            line["scores"][name] = result
            line["costs"][name] = cost(rows)
            known = [row["recall"] for row in rows if row.get("recall") is not None]
            if known:
                line["recall"][name] = 100 * float(np.mean(known))
            if decides := spread(module, rows):
                line["spread"][name] = decides
    for line in lines.values():
        values = {name: result["value"] for name, result in line["scores"].items()}
        line["average"], line["benchmarks"] = retention(values, full)
        costs = list(line["costs"].values())
        line["cost"] = {key: float(np.mean([x[key] for x in costs])) for key in costs[0]}
    methods = ["vanilla", *dict.fromkeys(line["method"] for line in lines.values())]
    return sorted(lines.values(), key=lambda line: (
        methods.index(line["method"]), isinstance(line["K"], str) or -line["K"]))


def answered(module, rows) -> dict:
    """{question: was it answered}: with at least half of the points that it can give, as VTC-Bench
    counts what is scored softly. The copies of a question of MMBench are one question, the two
    about a picture of MME are two."""
    if hasattr(module, "right"):
        return {row["id"]: module.right(row) for row in rows}
    groups = {}
    for row in rows:
        groups.setdefault(group(row), []).append(row)
    return {key: module.score(members)[module.MAIN] >= RIGHT for key, members in groups.items()}


def hard_scores(module, ways: dict) -> dict[tuple, dict]:
    """{(method, K): {"value": percent of the hard questions that it answers, None if there are
    none; "n": how many there are; "interval": wilson()}}.

    Hard is what the model answers with the whole picture and not with the picture downsampled to
    the same K: group A of VTC-Bench, arXiv:2510.07143. Nothing where there are no such answers, and
    of these two themselves, whose score follows from the definition. ways: {(method, K): rows}
    """
    found = {}
    budgets = [k for method, k in ways if method == DOWNSAMPLE and VANILLA in ways]
    whole = answered(module, ways[VANILLA]) if budgets else {}
    for k in budgets:
        small = answered(module, ways[DOWNSAMPLE, k])
        hard = [question for question, right in whole.items() if right and not small[question]]
        for key in ways:
            if key[1] == k and key[0] != DOWNSAMPLE:
                own = answered(module, ways[key])
                found[key] = share([own[question] for question in hard])
    return found


def share(answers: list[bool]) -> dict:
    """How many percent are true, see hard_scores()."""
    n = len(answers)
    if not n:
        return {"value": None, "n": 0}
    return {"value": 100 * sum(answers) / n, "n": n, "interval": wilson(sum(answers), n)}


def wilson(right: int, n: int, z: float = 1.96) -> list[float]:
    """Wilson's 95 % interval of a share, in percent: hard questions can be few, and a bootstrap of
    a few that are all right has no width."""
    middle = (right + z ** 2 / 2) / (n + z ** 2)
    half = z / (n + z ** 2) * (right * (n - right) / n + z ** 2 / 4) ** .5
    return [100 * max(middle - half, 0), 100 * min(middle + half, 1)]


def cost(rows) -> dict:
    """Means over the questions that were asked: the three token counts, FLOPs, and milliseconds per
    stage."""
    rows = [row for row in rows if "too long" not in row] or rows
    entering, last, mean = np.mean([row["seen"] for row in rows], 0).tolist()
    stages = {f"{stage}_ms": float(np.mean([row["ms"][stage] for row in rows]))
              for stage in rows[0]["ms"]}
    return {"kept": float(np.mean([row["kept"] for row in rows])), "entering": entering,
            "last_layer": last, "layer_mean": mean,
            "gflops": float(np.mean([row["flops"] for row in rows])) / 1e9, **stages}


def spread(module, rows, buckets: int = 6) -> dict | None:
    """How a method that decides for itself spread its tokens over questions whose gold says how
    many things the picture shows: K's deciles, its correlation with that number, its mean per
    family, and the score per log-spaced bucket of K. None where K is the same everywhere."""
    if not all(isinstance(row["gold"], dict) and "things" in row["gold"] for row in rows):
        return None
    kept = np.array([row["kept"] for row in rows])
    if len(set(kept.tolist())) == 1:
        return None
    points = np.array([module.score([row])[module.MAIN] for row in rows])
    edges = np.geomspace(kept.min(), kept.max() + 1, buckets + 1).round().astype(int)
    edges = np.unique(edges).tolist()
    bucketed = []
    for low, high in zip(edges, edges[1:]):
        inside = (kept >= low) & (kept < high)
        bucketed.append({"from": low, "to": high - 1, "n": int(inside.sum()),
                         "score": float(points[inside].mean()) if inside.any() else None})
    families = {}
    for row in rows:
        families.setdefault(row["gold"].get("family", ""), []).append(row["kept"])
    things = [row["gold"]["things"] for row in rows]
    with np.errstate(invalid="ignore"):                # every picture may show as many
        correlation = float(np.corrcoef(kept, things)[0, 1])
    return {"mean": float(kept.mean()),
            "deciles": np.percentile(kept, range(0, 101, 10)).tolist(), "things": correlation,
            "families": {name: float(np.mean(x)) for name, x in families.items()},
            "buckets": bucketed}


def mean_over_seeds(lines: list[dict]) -> list[dict]:
    """The lines with those of runs that differ in the seed at the end of their name, <run>_s0,
    <run>_s1, merged: "runs", how many; means; and standard deviations (n - 1) as value_sd,
    retention_sd, average_sd, recall_sd. Intervals, which are over questions, are left out."""
    groups = {}
    for line in lines:
        groups.setdefault((SEED.sub("", line["method"]), line["K"]), []).append(line)
    several = {name for (name, _), members in groups.items() if len(members) > 1}
    merged = []
    for (name, k), members in groups.items():
        if name in several:
            merged.append({**merge(members), "method": name, "K": k, "runs": len(members)})
        else:
            merged += members
    return merged


def merge(lines: list[dict]) -> dict:
    """The mean of some lines."""
    line = mean(lines)
    if len(lines) == 1:
        return line
    for name, result in line["scores"].items():
        for key in ("value", "retention"):
            if key in result:
                result[f"{key}_sd"] = deviation(x["scores"][name][key] for x in lines)
    if line["average"] is not None:
        line["average_sd"] = deviation(x["average"] for x in lines)
    line["recall_sd"] = {name: deviation(x["recall"][name] for x in lines)
                         for name in line.get("recall", {})}
    return line


def deviation(values) -> float:
    return float(np.std(list(values), ddof=1))


def mean(values: list):
    """Of numbers the mean, of dicts the mean of every key that all have; else the first."""
    first = values[0]
    if isinstance(first, dict):
        return {key: mean([x[key] for x in values]) for key in first
                if key not in ("interval", "retention_interval", "spread")
                and all(key in x for x in values)}
    return float(np.mean(values)) if isinstance(first, float) else first


# ---------------------------------------------------------------------------------- what is printed


def backbone(model: str) -> str | None:
    """The backbone of the printed tables that a checkpoint's name stands for."""
    name = model.lower().replace("_", "-")
    return next((backbone for backbone, words in published()["backbones"].items()
                 if any(all(part in name for part in word.split()) for word in words)), None)


def published() -> dict:
    """published.json."""
    return json.loads(PRINTED.read_text(encoding="utf-8"))


def printed(lines: list[dict], backbone: str | None) -> list[dict]:
    """The papers' rows about this backbone whose method and budget stand among the lines: {
        "of": method of ours, "K", "method", "source", "scores": {benchmark: value},
        "base": of the table's unpruned model, "flags": {benchmark: letter}}."""
    data = published()
    tables = [table for table in data["tables"] if backbone and backbone in table["backbones"]]
    quoted = []
    for line in lines:
        for table in tables:
            base = next(row["scores"] for row in table["rows"] if row["budget"] is None)
            for row in table["rows"]:
                if is_method(line["method"], row["ours"]) and is_budget(line["K"], row["budget"]):
                    quoted.append({
                        "of": line["method"], "K": line["K"], "source": table["source"],
                        "method": row["method"], "scores": row["scores"], "base": base,
                        "flags": flags_of(row, data["flags"])})
    return quoted


def flags_of(row: dict, flags: dict) -> dict[str, str]:
    """{benchmark: letter of the flag that says what a printed figure is of}."""
    return {name: letter for letter, flag in flags.items() for name in flag["columns"]
            if name in row["scores"] and row["method"] in flag.get("methods", [row["method"]])}


def is_method(method: str, ours: str | None) -> bool:
    """Is a line's method, a baseline's name or a run's folder, the printed one?"""
    if ours is None:
        return False
    folder = method.split("/")[-1]
    return method == ours or folder == ours or "/" in method and ours in folder.split("_")


def is_budget(k, budget) -> bool:
    """A printed budget is a number of tokens, a share of them below 1, or None for all."""
    if budget is None or k == 0:
        return budget is None and k == 0
    if isinstance(k, str) or isinstance(budget, str):
        return False
    return abs(k - budget) < .002 if k < 1 and budget < 1 else k == budget
