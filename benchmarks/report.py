"""The tables of evaluate.py on the tiny world, and those of the papers' ablations beside them."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import scenes
from benchmarks.speed import Clock

# the papers' ablations: average retention on LLaVA-1.5-7B over GQA, MMB, POPE and MME, at 192, 128 and 64 of 576
# tokens; StepPrune's Table 4 has one budget. Quoted for their direction; the tiny world's figures are of another kind.
PUBLISHED = {"autoselect": {"base": (98.3, 97.3, 95.5), "scale_gate": (96.5, 94.8, 93.2),
                            "global_denoiser": (95.9, 95.0, 92.7)},
             "recon": {},
             "stepprune": {"base": (94.7,), "causal": (92.4,), "last": (90.3,), "uniform": (83.9,), "alive": (89.5,)}}


class Hit(NamedTuple):
    """One answered question. recall: share of its evidence that was kept, nan where nothing bears on it. seen: the
    token_budget() of a rival inside the language model."""
    family: str
    right: float
    recall: float
    kept: int
    things: int
    seen: tuple | None = None


def summarise(results: dict, clock: Clock) -> list[dict]:
    """One line per method and budget: accuracy per family, average, retention, recall, kept tokens, milliseconds, n."""
    lines, full = [], {}
    for (name, budget), hits in results.items():
        families = {f: [h.right for h in hits if h.family == f] for f in scenes.FAMILIES}
        accuracy = {f: float(np.mean(r)) for f, r in families.items() if r}
        full = full or accuracy                        # the first entry is the unpruned model
        known = [f for f in accuracy if full[f] > 0]
        lines.append({
            "method": name, "K": budget or "all", "n": len(hits), "families": accuracy,
            "average": float(np.mean(list(accuracy.values()))),
            "error": float(np.sqrt(sum(np.var(r) / len(r) for r in families.values() if r)) / len(accuracy)),
            "retention": float(np.mean([accuracy[f] / full[f] for f in known])),
            "recall": float(np.nanmean([h.recall for h in hits])), "kept": float(np.mean([h.kept for h in hits])),
            "vision_ms": clock.ms("vision"), "select_ms": clock.ms(f"select {name} {budget}"),
            "prefill_ms": clock.ms(f"prefill {name} {budget}")})
        if hits[0].seen:
            entering, last, mean = np.mean([h.seen for h in hits], 0).tolist()
            lines[-1] |= {"entering": entering, "last_layer": last, "layer_mean": mean}
    return lines


def adaptive(hits: list[Hit], buckets: int = 6) -> dict:
    """How a selector that decides for itself spread its tokens: K's deciles, its correlation with the number of things
    in the scene, per family, and accuracy per log-spaced bucket of K (the paper's Figure 4)."""
    kept, right = np.array([h.kept for h in hits]), np.array([h.right for h in hits])
    edges = np.unique(np.geomspace(kept.min(), kept.max() + 1, buckets + 1).round().astype(int)).tolist()
    inside = [(kept >= low) & (kept < high) for low, high in zip(edges, edges[1:])]
    return {"mean": float(kept.mean()), "deciles": np.percentile(kept, range(0, 101, 10)).tolist(),
            "things": float(np.corrcoef(kept, [h.things for h in hits])[0, 1]) if kept.std() else float("nan"),
            "families": {f: float(np.mean([h.kept for h in hits if h.family == f]))
                         for f in scenes.FAMILIES if any(h.family == f for h in hits)},
            "buckets": [{"from": low, "to": high - 1, "n": int(b.sum()),
                         "accuracy": float(right[b].mean()) if b.any() else None}
                        for low, high, b in zip(edges, edges[1:], inside)]}


def inside_table(lines: list[dict]) -> str | None:
    """Visual tokens that the language model's layers see, on average, with rivals inside it; None without one."""
    table = ["| method | K | enter | in the last layer | mean over layers |", "|" + "---|" * 5]
    table += [f"| {x['method']} | {x['K']} | {x['entering']:.1f} | {x['last_layer']:.1f} | {x['layer_mean']:.1f} |"
              for x in lines if "layer_mean" in x]
    return "\n".join(table) if len(table) > 2 else None


def adaptive_table(found: dict) -> str:
    """{(name, K): adaptive()} as Markdown."""
    out = ["| method | wished K | mean K | deciles 10 .. 90 | K by family | correlation with number of things | "
           "accuracy by bucket of K (n) |", "|" + "---|" * 7]
    for (name, budget), x in found.items():
        families = ", ".join(f"{f} {k:.0f}" for f, k in x["families"].items())
        buckets = ", ".join(f"{b['from']}-{b['to']}: {100 * b['accuracy']:.0f} ({b['n']})"
                            for b in x["buckets"] if b["n"])
        deciles = " ".join(f"{k:.0f}" for k in x["deciles"][1:-1])
        out.append(f"| {name} | {budget} | {x['mean']:.1f} | {deciles} | {families} | {x['things']:.2f} | {buckets} |")
    return "\n".join(out)


def spread(lines: list[dict], names: list[str], label: str) -> list[dict]:
    """Mean of the runs' lines per budget, with their standard deviation (n-1) as average_sd, recall_sd, ..."""
    merged = []
    for budget in dict.fromkeys(line["K"] for line in lines if line["method"] in names):
        group = [line for line in lines if line["method"] in names and line["K"] == budget]
        mean = {k: float(np.mean([g[k] for g in group])) for k, v in group[0].items() if isinstance(v, float)}
        sd = {f"{k}_sd": float(np.std([g[k] for g in group], ddof=1)) for k in ("average", "retention", "recall")}
        families = {f: float(np.mean([g["families"][f] for g in group])) for f in group[0]["families"]}
        merged.append({**group[0], **mean, **sd, "method": label, "runs": len(group), "families": families})
    return merged


def table(lines: list[dict]) -> str:
    """The lines as Markdown: percent, and milliseconds a selection and a question's prefill."""
    head = ["method", "K", "kept", *scenes.FAMILIES, "average", "retention", "evidence recall", "select ms",
            "prefill ms"]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        def percent(key, line=line):
            return f"{100 * line[key]:.1f}" + (f" ±{100 * line[key + '_sd']:.1f}" if key + "_sd" in line else "")
        families = (line["families"].get(f, float("nan")) for f in scenes.FAMILIES)
        cells = [line["method"], str(line["K"]), f"{line['kept']:.1f}", *(f"{100 * x:.1f}" for x in families),
                 percent("average"), percent("retention"), percent("recall"),
                 f"{line['select_ms']:.2f}", f"{line['prefill_ms']:.2f}"]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def ablation_table(method: str, results: Path = Path("results")) -> str:
    """Every results/ablations/<method>/<variant>/evaluation.json against the method's own results, mean over seeds."""
    variants = sorted(p for p in (results / "ablations" / method).iterdir() if p.is_dir())
    files = {"base": results / f"{method}_tiny", **{p.name: p for p in variants}}
    means = {name: {(line["method"].split(",")[0], line["K"]): line
                    for line in json.loads((path / "evaluation.json").read_text())
                    if "runs" in line and line["method"].startswith(method)} for name, path in files.items()}
    budgets = sorted({k for _, k in means["base"] if isinstance(k, int)}, reverse=True)
    head = ["variant", *(f"K = {k}: retention, - base" for k in budgets), "published: retention, - base"]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, lines in means.items():
        for kind in dict.fromkeys(kind for kind, _ in lines):
            cells = []
            for k in budgets:
                if (kind, k) not in lines:             # a mask has no budget
                    break
                x, full = lines[kind, k], means["base"][method, k]
                cells.append(f"{100 * x['retention']:.1f} ±{100 * x['retention_sd']:.1f}, "
                             f"{100 * (x['retention'] - full['retention']):+.1f}")
            if not cells:
                continue
            paper = PUBLISHED[method].get(name, ()) if kind == method else ()
            quoted = [f"{p:.1f}, {p - q:+.1f}" for p, q in zip(paper, PUBLISHED[method].get("base", ()))]
            out.append(f"| {name}{kind[len(method):]} | " + " | ".join(cells) + f" | {' / '.join(quoted) or '-'} |")
    return "\n".join(out)


def refresh(page: Path) -> None:
    """Put the tables that a page quotes between <!-- table: FILE --> and <!-- end --> in again from their files."""
    def quote(found):
        return f"{found[1]}\n{(page.parent / found[2]).read_text().strip()}\n<!-- end -->"
    page.write_text(re.sub(r"(<!-- table: (\S+) -->)\n.*?<!-- end -->", quote, page.read_text(), flags=re.S))


def cell(values, unit: float = 100) -> str:
    """Mean and, of several, standard deviation, as a table shows them."""
    more = f" ±{unit * np.std(values, ddof=1):.3g}" if len(values) > 1 else ""
    return f"{unit * np.mean(values):.3g}{more}"
