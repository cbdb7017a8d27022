"""The claims of three papers, each with a verdict: `python -m measure.claims`.

From the answers in results/claims/, which `python -m measure.experiments` makes, it writes
results/claims.md, a row a claim, and beside the answers raw tables, which every row links to. A
claim whose runs are not all there, or were made by other code than today's, says so in place of a
verdict.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np

import runs
from benchmarks.plots import draw_kept_counts
from benchmarks.tables import markdown
from measure.evidence import DRAWS, VERDICTS, Claim, Draws, Table, judge
from measure.experiments import BUDGETS, RESULTS, TABLES, papers, settings

OPEN = "runs are missing"
OPENING = f"""# Does it hold?

What three papers claim, tried on the tiny world. `python -m measure.experiments` trains and
answers what this page stands on, {{hours:.0f}} hours of training so far, a core or a GPU for each;
`python -m measure.claims` makes the page of the answers.

**Ours** are points of retention (percent of the score with all tokens) unless a unit is named, of
several seeds on the same questions, and in brackets the middle 95 % of {DRAWS:,} draws of questions
and seeds, the same for both sides of a difference. Of a setting with one seed the verdict says so:
how far seeds lie apart is not in its interval.

**The rule**, one for all: an effect *holds* where that interval lies inside what is claimed (above
0, or within a margin that is named), *does not hold* where it lies outside, else it is *within
noise*. A claim holds where all of its effects do, and does not hold where one of them does not. Of
forty such intervals two are expected to miss. Budgets were chosen before anything was trained.

**What a world this small teaches, and what not.** Pictures have 144 tokens, things are one or two
of them large, answers one to three words, and the frozen model has a million parameters. So it
shows whether a mechanism works as its paper says (does a gate press, does a stop adapt, does a
regulariser collapse), in what order variants stand when little else differs, and where a rule does
not train as printed. It does not show how large an effect is at 7B: backgrounds are empty, so that
a third of the tokens is already more than enough, most families of questions are at their ceiling
there, and whatever reads the question has an easier time than among real words. What fails here may
need what is missing here. Printed figures are for the direction only.
"""


def holds_sign(verdict: str) -> str:
    return dict(zip(VERDICTS, ("", " (within noise)", " (**not**)")))[verdict]


def effects_of(claim: Claim, draws: Draws) -> tuple[str, str]:
    """What was measured, a line an effect, and the verdict."""
    found, verdict = judge(claim, draws)
    digits = 2 if claim.unit in ("cosine", "correlation") else 1
    lines = [f"{what}: {value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
             + holds_sign(own) for what, (value, (low, high), own) in found.items()]
    return "<br>".join(lines), verdict


def row_of(claim: Claim, draws: dict[str, Draws]) -> list[str]:
    """Of the page."""
    said = claim.says + (f" *{claim.note[0].upper()}{claim.note[1:]}.*" if claim.note else "")
    start = [claim.place, said, claim.printed]
    if claim.table not in draws:
        return [*start, "", "", f"*{OPEN}*"]
    of_table = draws[claim.table]
    of_table.used.clear()
    try:
        ours, verdict = effects_of(claim, of_table)
    except KeyError as error:
        return [*start, "", "", f"*{OPEN}: {error.args[0][0]}*"]
    made = of_table.table.made
    names = [name for name in settings() if any(name == used or used.startswith(f"{name} ")
                                                for used in of_table.used)]
    stale = [name for name in names if is_stale(made[name], settings()[name])]
    seeds = sorted({len(x) for (name, _), x in of_table.table.right.items() if name in names})
    if seeds[:1] == [1]:
        verdict += ", one seed"              # whose own spread no interval can know
    unit = f"*{claim.unit}*<br>" if claim.unit else ""
    some = "seed" if seeds == [1] else "seeds"
    raw = f"[{' / '.join(map(str, seeds))} {some}](claims/{claim.table}.md)"
    return [*start, unit + ours, raw, f"*made by other code: {', '.join(stale)}*" if stale
            else f"**{verdict}**"]


def is_stale(made: dict, setting) -> bool:
    method = setting.train.split()[1]
    return (made["train"], made["code"]) != (setting.train, runs.code_of(
        runs.load_method(method).__name__))


def page(tables: dict[str, Table]) -> str:
    """results/claims.md."""
    draws = {name: Draws(table) for name, table in tables.items()}
    blocks, count = [], Counter()
    for module in papers().values():
        rows = [row_of(claim, draws) for claim in module.CLAIMS]
        count.update(re.split("[:,]", row[-1].strip("*"))[0] for row in rows)
        blocks += [f"## {module.PAPER}", markdown(
            ["where", "claim", "printed", "ours", "raw", "verdict"], rows)]
    minutes = {(vlm, name): made["minutes"] * len(right)
               for vlm, table in tables.items() if "crowded" not in vlm
               for name, made in table.made.items()
               for (method, _), right in table.right.items() if method == name}
    summary = ", ".join(f"{n} {verdict}" for verdict, n in count.most_common())
    opening = OPENING.format(hours=sum(minutes.values()) / 60)
    return "\n\n".join([opening.strip(), f"**{sum(count.values())} claims**: {summary}.", *blocks])


def raw(name: str, table: Table) -> str:
    """Retention of every method at every K: mean and deviation over seeds, tokens kept where they
    are not K."""
    draws = Draws(table, draws=1)
    rows = []
    for method in sorted({method for method, k in table.right if k}):
        cells, seeds = [], 0
        for k in [*BUDGETS, *sorted({k for m, k in table.right if m == method and k}
                                    - {*BUDGETS}, key=str)]:
            if (method, k) not in table.right:
                cells.append("")
                continue
            families = np.unique(table.families)
            right = table.right[method, k]
            scores = [np.mean([100 * row[table.families == family].mean() for family in families])
                      for row in right]
            values = 100 * np.array(scores) / draws.score("vanilla")[0]
            seeds = len(values)
            kept = table.kept[method, k].mean()
            is_k = not isinstance(k, str) and abs(kept - k) < .05
            cells.append(f"{values.mean():.1f}"
                         + (f" ±{values.std(ddof=1):.1f}" if seeds > 1 else "")
                         + ("" if is_k else f" (kept {kept:.1f})"))
        made = table.made.get(method, {}).get("train", "")
        rows.append([method, str(seeds), *cells[:len(BUDGETS)], "; ".join(cells[len(BUDGETS):]),
                     f"`{made}`" if made else ""])
    whole = Draws(table, draws=1).score("vanilla")[0]
    head = ["method", "seeds", *(f"K = {k}" for k in BUDGETS), "its own K", "trained by"]
    return (f"# Retention, {name}\n\n{len(table.families):,} questions, of which "
            f"{whole:.1f} % (mean over families) are right with all tokens. Mean ± deviation over "
            f"seeds.\n\n{markdown(head, rows)}")


def draw_operating_points(tables: dict[str, Table], folder: Path) -> None:
    """operating_points.png: how many tokens each way to reach a mean keeps, of the first seed."""
    for module in papers().values():
        counts = {(title, k): tables["llava"].kept[name, k][0]
                  for name, title in getattr(module, "OPERATING_POINTS", {}).items()
                  for k in (48, 32, 16) if (name, k) in tables["llava"].kept}
        if counts:
            draw_kept_counts(counts, folder / "operating_points.png")


def main(args: list[str]) -> str:
    parser = runs.Parser([], description=__doc__, allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the answers")
    options = parser.parse_args(args)
    paths = {name: options.results / f"{name}.json.gz" for name in TABLES}
    tables = {name: Table.load(path) for name, path in paths.items() if path.exists()}
    if not tables:
        raise FileNotFoundError(f"{options.results} holds no answers: python -m "
                                "measure.experiments makes them")
    for name, table in tables.items():
        runs.write_text(options.results / f"{name}.md", raw(name, table) + "\n")
    draw_operating_points(tables, options.results)
    text = page(tables)
    runs.write_text(options.results.with_suffix(".md"), text + "\n")
    print(text)
    return text


if __name__ == "__main__":
    runs.command(main)
