"""Scores of predictions files, side by side: retention, intervals, tokens and time, beside what the papers print.

Needs the files alone: no GPU, no model, no data set.
"""

import json
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks import predictions

VANILLA = ("vanilla", 0)
SEED = re.compile(r"_s\d+\b")
PRINTED = Path(__file__).with_name("published.json")


def found(folder: Path, modules: dict) -> tuple[dict, dict]:
    """({benchmark: {(method, K): rows}}, the header they share) of all complete predictions files below a folder.

    Incomplete ones are named and left out. Raises FileNotFoundError where there is none, ValueError for answers of
    different models, or to different questions, side by side, and for a benchmark that is not known.
    """
    out, first = {}, {}
    stems = (f.with_name(predictions.PART.sub("", f.stem) + ".jsonl") for f in sorted(folder.rglob("*.jsonl")))
    for path in dict.fromkeys(stems):
        header, rows = predictions.read(path)
        if header is None:
            continue
        name, turn = header["benchmark"], (header["method"], header["budget"])
        if name not in modules:
            raise ValueError(f"{path} is of the benchmark {name!r}: known are {', '.join(modules)}")
        first = first or header
        for key in ("model", "fingerprint", "dtype", "style", "positions"):
            if header.get(key) != first.get(key):
                raise ValueError(f"{path} has the {key} {header.get(key)!r}, another file {first.get(key)!r}: one "
                                 "folder holds the answers of one model, asked in one way; move one of them away")
        if len(rows) < header["questions"]:
            print(f"{path}: {len(rows)} of {header['questions']} questions are answered; left out, run it again to "
                  "complete it")
            continue
        here = out.setdefault(name, {})
        if turn in here:
            raise ValueError(f"{path} is a second file of {name}, {turn[0]}, {turn[1]}: move one away")
        other = next(iter(here.values()), rows)
        if [(row["id"], row["gold"]) for row in rows] != [(row["id"], row["gold"]) for row in other]:
            raise ValueError(f"{path} answers other questions than the files beside it: retention is of the same "
                             "questions only; move one away")
        here[turn] = rows
    if not out:
        raise FileNotFoundError(f"{folder} holds no complete predictions file")
    return {name: out[name] for name in modules if name in out}, first


# ------------------------------------------------------------------------------------------------- one benchmark

def group(row: dict) -> tuple:
    """(stratum, key) of the questions that are scored as one: the two about a picture of MME, whose categories are
    added up; the rotated copies of a question of MMBench. Else each by itself."""
    gold = row["gold"] if isinstance(row["gold"], dict) else {}
    if "pair" in gold:
        return gold["category"], gold["pair"]
    return "", gold["index"] % 1_000_000 if "copies" in gold else row["id"]


def values_of(module, rows) -> list[np.ndarray] | None:
    """The score as a mean over groups of questions, or a sum over strata of such means: an array of the groups' scores
    for each stratum; None for a score that is neither."""
    strata = {}
    for row in rows:
        stratum, key = group(row)
        strata.setdefault(stratum, {}).setdefault(key, []).append(row)
    values = [np.array([module.score(each)[module.MAIN] for each in groups.values()], float)
              for groups in strata.values()]
    total, together = module.score(rows)[module.MAIN], np.concatenate(values)
    if np.isclose(together.mean(), total):
        return [together]
    return values if np.isclose(sum(x.mean() for x in values), total) else None


def bootstrap(module, rows, seed: int = 0, resamples: int = 1000) -> np.ndarray:
    """(resamples,) scores of as many questions drawn with replacement; the same draws for files of the same questions.

    A score that is no mean (POPE's F1) is computed anew for each draw.
    """
    values, out = values_of(module, rows), np.zeros(resamples)
    for number, x in enumerate(values or [None]):
        rng, n = np.random.default_rng([seed, number]), len(rows if x is None else x)
        for i in tqdm(range(resamples), "resample", leave=False, disable=x is not None):
            drawn = rng.integers(0, n, n)
            # a scorer refuses an id that comes twice
            out[i] += x[drawn].mean() if x is not None else module.score(
                [{**rows[q], "id": f"{rows[q]['id']} {place}"} for place, q in enumerate(drawn)])[module.MAIN]
    return out


def interval(draws: np.ndarray) -> list[float]:
    """The middle 95 % of them."""
    return np.percentile(draws, [2.5, 97.5]).tolist()


def retention(scores: dict, base: dict) -> tuple[float | None, int]:
    """(mean over benchmarks of 100 * score / base, how many entered): those of both, whose base is not 0."""
    parts = [100 * score / base[name] for name, score in scores.items() if base.get(name)]
    return (float(np.mean(parts)) if parts else None), len(parts)


def summarise(files: dict, modules: dict, seed: int = 0, resamples: int = 1000) -> list[dict]:
    """A line per method and K. scores[benchmark]: all of score(), with value: the one that the papers print; interval,
    retention, retention_interval. average, benchmarks: retention(). costs[benchmark], and cost, their mean."""
    lines, draws, full = {}, {}, {}
    for name, turns in files.items():
        for turn, rows in sorted(turns.items(), key=lambda x: x[0] != VANILLA):          # vanilla first
            module, line = modules[name], lines.setdefault(turn, {"method": turn[0], "K": turn[1], "scores": {},
                                                                  "costs": {}})
            all_of = module.score(rows)
            x = line["scores"][name] = {**all_of, "value": float(all_of[module.MAIN])}
            drawn = draws[name, turn] = bootstrap(module, rows, seed, resamples)
            x["interval"] = interval(drawn)
            if turn == VANILLA:
                full[name] = x["value"]
            if full.get(name):
                x["retention"] = 100 * x["value"] / full[name]
                base = draws[name, VANILLA]
                x["retention_interval"] = interval(100 * drawn[base > 0] / base[base > 0])
            line["costs"][name] = cost(rows)
    for line in lines.values():
        line["average"], line["benchmarks"] = retention({n: x["value"] for n, x in line["scores"].items()}, full)
        each = list(line["costs"].values())
        line["cost"] = {key: float(np.mean([x[key] for x in each])) for key in each[0]}
    methods = ["vanilla", *dict.fromkeys(line["method"] for line in lines.values())]
    return sorted(lines.values(), key=lambda x: (methods.index(x["method"]), isinstance(x["K"], str) or -x["K"]))


def cost(rows) -> dict:
    """Means over the questions: the three token counts, FLOPs, and milliseconds per stage."""
    entering, last, mean = np.mean([row["seen"] for row in rows], 0).tolist()
    stages = {f"{stage}_ms": float(np.mean([row["ms"][stage] for row in rows])) for stage in rows[0]["ms"]}
    return {"kept": float(np.mean([row["kept"] for row in rows])), "entering": entering, "last_layer": last,
            "layer_mean": mean, "gflops": float(np.mean([row["flops"] for row in rows])) / 1e9, **stages}


# ----------------------------------------------------------------------------------------------- what is printed

def backbone(model: str) -> str | None:
    """The backbone of the printed tables that a checkpoint's name stands for."""
    name = model.lower().replace("_", "-")
    return next((b for b, words in json.loads(PRINTED.read_text())["backbones"].items()
                 if any(all(part in name for part in word.split()) for word in words)), None)


def printed(lines: list[dict], model: str | None) -> list[dict]:
    """The papers' rows about this backbone whose method and budget stand among the lines: {"of": method of ours, "K",
    "source", "scores": {benchmark: value}, "base": of the table's unpruned model, "flags": {benchmark: letter}}."""
    data, out = json.loads(PRINTED.read_text()), []
    for line in lines:
        method = line["method"].split(",")[0].split("/")[-1]
        for table in data["tables"] if model else []:
            base = next(row["scores"] for row in table["rows"] if row["budget"] is None)
            for row in table["rows"]:
                if model in table["backbones"] and same(method, line["method"], row["ours"]) and (
                        row["budget"] is None if line["K"] == 0 else fits(line["K"], row["budget"])):
                    flags = {name: letter for letter, flag in data["flags"].items() for name in flag["columns"]
                             if name in row["scores"] and row["method"] in flag.get("methods", [row["method"]])}
                    out.append({"of": line["method"], "K": line["K"], "source": table["source"], "flags": flags,
                                "method": row["method"], "scores": row["scores"], "base": base})
    return out


def same(last: str, whole: str, ours: str | None) -> bool:
    """Is a line's method, a baseline's name or a run's folder, the printed one?"""
    return ours is not None and (whole == ours or last == ours or ("/" in whole and ours in last.split("_")))


def fits(k, budget) -> bool:
    """A printed budget is a number of tokens or, as a share of them, a number below 1."""
    if budget is None or isinstance(k, str) or isinstance(budget, str):
        return False
    return abs(k - budget) < .002 if k < 1 and budget < 1 else k == budget


# -------------------------------------------------------------------------------------------------------- tables

def table(lines: list[dict], names: dict, quoted=(), partial: bool = False) -> str:
    """Scores with their intervals and retention, as Markdown, the printed rows below the lines they belong to.

    names: benchmark -> title. An average stands only where all those benchmarks entered that the unpruned model has a
    score in, or with `partial`: averages over different benchmarks do not compare. Their number is always shown.
    """
    head = ["method", "K", *names.values(), "average retention", "of benchmarks"]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    entering = comparable(lines)

    def average(value, n):
        return "-" if value is None or (n < len(entering) and not partial) else f"{value:.1f}"
    for line in lines:
        cells = [line["method"], budget(line["K"])]
        for name in names:
            if (x := line["scores"].get(name)) is None:
                cells.append("-")
                continue
            low, high = x["interval"]
            cells.append(f"{x['value']:.1f} ({low:.1f} to {high:.1f})" +
                         (f", {x['retention']:.1f}" if "retention" in x else ""))
        n = line["benchmarks"]
        out.append("| " + " | ".join([*cells, average(line["average"], n), f"{n} of {len(names)}"]) + " |")
        for row in quoted:
            if (row["of"], row["K"]) != (line["method"], line["K"]):
                continue
            own = {name: row["scores"][name] for name in names if name in row["scores"]}
            cells = [f"*printed: {row['method']}, {row['source']}*", cells[1]]
            for name in names:
                ratio = f", {100 * own[name] / row['base'][name]:.1f}" if name in own and name in row["base"] else ""
                mark = f" [{row['flags'][name]}]" if name in row["flags"] else ""
                cells.append(f"*{own[name]:g}{ratio}*{mark}" if name in own else "-")
            value, n = retention({name: own[name] for name in own if name in entering}, row["base"])
            out.append("| " + " | ".join([*cells, average(value, n), f"{n} of {len(names)}"]) + " |")
    return "\n".join(out) + "\n\nscore (95 % interval), retention: percent of all tokens' score"


def comparable(lines: list[dict]) -> list[str]:
    """The benchmarks that an average is over: those in which the unpruned model scores."""
    return [name for line in lines if line["K"] == 0 for name, x in line["scores"].items() if x["value"]]


def parts_table(lines: list[dict], name: str, main: str) -> str:
    """The parts of one benchmark's score, such as categories, as Markdown; "" if it has none."""
    counts = {"value", "interval", "retention", "retention_interval", "n", "unmatched", main}
    keys = [key for key, x in lines[0]["scores"].get(name, {}).items() if key not in counts and isinstance(x, float)]
    out = ["| " + " | ".join(["method", "K", *keys, "n", "retention %"]) + " |", "|" + "---|" * (len(keys) + 4)]
    for line in lines if keys else ():
        if x := line["scores"].get(name):
            cells = [line["method"], budget(line["K"]), *(f"{x.get(key, np.nan):.1f}" for key in keys), str(x["n"]),
                     f"{x['retention']:.1f}" if "retention" in x else "-"]
            out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) if keys else ""


def seeds_table(lines: list[dict], names: dict) -> str:
    """Retention of runs that differ in the seed at the end of their name, <run>_s0, <run>_s1: mean ± standard deviation
    (n - 1), as Markdown; "" if there are none."""
    groups = {}
    for line in lines:
        if found := SEED.search(line["method"]):
            groups.setdefault((SEED.sub("", line["method"]), line["K"]), []).append((found[0], line))
    groups = {key: [line for _, line in same] for key, same in groups.items() if len(same) > 1}
    out = ["| runs | n | K | kept | " + " | ".join(f"{title}: retention %" for title in names.values()) + " |",
           "|" + "---|" * (4 + len(names))]
    for (name, k), same in groups.items():
        cells = [name, str(len(same)), budget(k), f"{np.mean([x['cost']['kept'] for x in same]):.1f}"]
        for each in names:
            found = [x["scores"][each]["retention"] for x in same if "retention" in x["scores"].get(each, {})]
            cells.append(f"{np.mean(found):.1f} ±{np.std(found, ddof=1):.1f}" if len(found) > 1 else "-")
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) if groups else ""


def matrix(lines: list[dict]) -> str:
    """Average retention in percent, a row a method, a column a K, best first at the smallest K, as Markdown; of runs
    that differ in the seed alone mean ± standard deviation. In brackets the mean number of visual tokens in a layer of
    the language model, where it is not that K."""
    budgets = sorted({line["K"] for line in lines if line["K"] != 0 and not isinstance(line["K"], str)}, reverse=True)
    cells = {}
    for line in lines:
        if line["average"] is not None and line["K"] in budgets:
            cells.setdefault(SEED.sub("", line["method"]), {}).setdefault(line["K"], []).append(line)

    def shown(same):
        spread = f" ±{np.std([x['average'] for x in same], ddof=1):.1f}" if len(same) > 1 else ""
        layers, kept = (np.mean([x["cost"][key] for x in same]) for key in ("layer_mean", "kept"))
        inside = f" ({layers:.0f})" if abs(layers - kept) > 1 else ""
        return f"{np.mean([x['average'] for x in same]):.1f}{spread}{inside}"
    order = sorted(cells, key=lambda name: -max((x["average"] for x in cells[name].get(budgets[-1], [])), default=0))
    out = ["| method | " + " | ".join(budget(k) for k in budgets) + " |", "|" + "---|" * (1 + len(budgets))]
    out += ["| " + " | ".join([name, *(shown(cells[name][k]) if k in cells[name] else "-" for k in budgets)]) + " |"
            for name in order]
    return "\n".join(out)


def budget(k) -> str:
    """K as a table shows it: a number of tokens, or a share of them."""
    return "all" if k == 0 else f"{100 * k:.1f} %" if not isinstance(k, str) and k < 1 else str(k)


def notes(quoted, names) -> list[str]:
    """What the letters beside the printed figures of these benchmarks stand for."""
    flags = json.loads(PRINTED.read_text())["flags"]
    used = sorted({letter for row in quoted for name, letter in row["flags"].items() if name in names})
    return [f"[{letter}] {flags[letter]['text']}" for letter in used]


def cost_table(lines: list[dict]) -> str:
    """Tokens, FLOPs of the language model's prompt and milliseconds a question, mean over benchmarks, as Markdown; the
    selection and the prefill also in percent of the prefill with all tokens in the same run."""
    head = ["method", "K", "kept", "enter", "in the last layer", "mean over layers", "prefill GFLOPs", "vision ms",
            "select ms", "%", "prefill ms", "%", "decode ms"]
    whole = next((line["cost"]["prefill_ms"] for line in lines if line["K"] == 0), float("nan"))
    keys = ("entering", "last_layer", "layer_mean")
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        x = line["cost"]
        select, prefill = (f"{x[f'{stage}_ms']:.2f} | {100 * x[f'{stage}_ms'] / whole:.1f}"
                           for stage in ("select", "prefill"))
        cells = [line["method"], budget(line["K"]), f"{x['kept']:.1f}", *(f"{x[key]:.1f}" for key in keys),
                 f"{x['gflops']:.4g}", f"{x['vision_ms']:.2f}", select, prefill, f"{x['decode_ms']:.2f}"]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def kept_table(lines: list[dict], names: dict) -> str:
    """Mean number of kept units per benchmark, as Markdown, of the lines where it differs; empty if of none."""
    out = []
    for line in lines:
        kept = {name: f"{x['kept']:.1f}" for name, x in line["costs"].items()}
        if len(set(kept.values())) > 1:
            cells = [line["method"], budget(line["K"]), *(kept.get(name, "-") for name in names)]
            out.append("| " + " | ".join(cells) + " |")
    head = ["method", "K", *(f"kept, {title}" for title in names.values())]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *out]) if out else ""
