"""Tables of scores as Markdown: lines of scores.summarise() in, text out."""

import re
from pathlib import Path

import numpy as np

import benchmarks
from benchmarks import scores

MOST_PARTS = 8                        # that a headline has room for; more get a table of their own
INTERVALS = "Score with its 95 % interval over questions, retention behind it"
# what a score counts besides, and a table says below
COUNTED = {"unmatched": "answers could not be read",
           "without_yes_or_no": "answers are a yes for want of a no",
           "half_pairs": "pictures lack one of their two questions",
           "incomplete": "questions lack some of their copies",
           "too_long": "questions are longer than the model has positions for, and stay unanswered"}
HARD = ("hard: percent of the questions that the model answers with the whole picture and not with "
        "the picture downsampled to the same K (VTC-Bench, arXiv:2510.07143); how many there are")
NO_PARTS = ("value", "interval", "retention", "retention_interval", "n", "unmatched", "value_sd",
            "retention_sd")


def opening(lines: list[dict], quoted: list[dict] = ()) -> str:
    """What to read first: the headline, what the papers print, what has no average.

    quoted: of scores.printed()
    """
    titles = titles_of(lines)
    blocks = [headline(lines)]
    if quoted:
        blocks += [INTERVALS + ", in italics what the papers print:",
                   intervals_table(lines, quoted), *notes(quoted, titles)]
    blocks += missing_averages(lines)
    modules = [benchmarks.load_module(name) for name in titles]
    return "\n\n".join(blocks + [module.NOTE for module in modules if hasattr(module, "NOTE")])


def report(lines: list[dict], quoted: list[dict] = (), header: dict | None = None) -> str:
    """All tables: opening(), then intervals, parts, costs. header: of a predictions file."""
    titles = titles_of(lines)
    blocks = [opening(lines, quoted)]
    if not quoted:
        blocks += [INTERVALS + ":", intervals_table(lines, quoted)]
    for name, title in titles.items():
        has_room = len(titles) == 1 and len(parts_of(lines, name)) <= MOST_PARTS
        if not has_room and (part := parts_table(lines, name)):
            blocks += [f"{title}, part by part:", part]
    blocks += ["Visual tokens in the language model, FLOPs of its prompt, milliseconds a question; "
               "% of the prefill with all tokens:", costs_table(lines)]
    if hard := hard_table(lines):
        blocks += ["Hard questions, with Wilson's 95 % interval over them:", hard]
    if counted := counted_table(lines):
        blocks += ["What could not be scored as it should:", counted]
    if kept := kept_table(lines):
        blocks += ["Tokens kept, by benchmark:", kept]
    if spreads := spread_table(lines):
        blocks += ["How many tokens were kept where the method decides:", spreads]
    if header:
        steered = header.get("steered", {})
        blocks += [f"{title}: methods that decide how many tokens they keep are steered to K on "
                   f"{steered[name]}" for name, title in titles.items() if name in steered]
        blocks.append(f"model {header['model']}, pictures and prompts as in the protocol "
                      f"{header.get('protocol')!r}")
    return "\n\n".join(blocks)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def titles_of(lines: list[dict]) -> dict[str, str]:
    """{benchmark: title} of all that a line has a score of, sorted."""
    names = sorted({name for line in lines for name in line["scores"]})
    return {name: benchmarks.load_module(name).NAME for name in names}


def budget(k) -> str:
    """K as a table shows it: a number of tokens, or a share of them."""
    if k == 0:
        return "all"
    return f"{100 * k:.1f} %" if not isinstance(k, str) and k < 1 else str(k)


def label(line: dict) -> str:
    """The method; of several seeds how many."""
    n = line.get("runs", 1)
    return line["method"] if n == 1 else f"{line['method']}, mean of {n}"


def short_names(methods: list[str]) -> dict[str, str]:
    """{method: what a picture calls it}: of a run the last folder that says something, unless two
    runs would be called the same."""
    short = {}
    for method in methods:
        folder, _, way = method.partition(" ")
        name = Path(folder.removesuffix("/selector")).name
        short[method] = f"{name} {way}".strip() if "/" in folder else method
    return short if len({*short.values()}) == len(short) else {name: name for name in methods}


def number(value: float | None, sd: float | None = None) -> str:
    """A percentage with its standard deviation over seeds."""
    if value is None or np.isnan(value):
        return "-"
    return f"{value:.1f}" + ("" if sd is None else f" ±{sd:.1f}")


def cell(values, unit: float = 100) -> str:
    """Mean and, of several, standard deviation, as a table shows them."""
    sd = f" ±{unit * np.std(values, ddof=1):.3g}" if len(values) > 1 else ""
    return f"{unit * np.mean(values):.3g}{sd}"


# ------------------------------------------------------------------------------------ the headline


def headline(lines: list[dict]) -> str:
    """One row per method and K, the seeds of a run as one: of one benchmark with the parts of its
    score, of several with their average. Below it what its figures leave open, see remarks()."""
    titles = titles_of(lines)
    merged = scores.mean_over_seeds(lines)
    if len(titles) == 1:
        table = one_benchmark(merged, next(iter(titles)))
    else:
        table = several_benchmarks(merged, titles, comparable(lines))
    return "\n\n".join([table, *remarks(lines)])


def several_benchmarks(lines: list[dict], titles: dict, entering: list[str]) -> str:
    with_hard = any(hard_of(line) for line in lines)
    rows = []
    for line in lines:
        n = line["benchmarks"]
        cells = [score_and_retention(line["scores"].get(name)) for name in titles]
        average = "-"
        if n == len(entering):
            average = number(line["average"], line.get("average_sd"))
        rows.append([label(line), budget(line["K"]), f"{line['cost']['kept']:.1f}", *cells,
                     *[mean_hard(line, lines)] * with_hard, average, f"{n} of {len(titles)}"])
    table = markdown(["method", "K", "kept", *titles.values(), *["hard (n)"] * with_hard,
                      "average retention", "of benchmarks"], rows)
    return table + "\n\nscore, retention: percent of the score with all tokens"


def one_benchmark(lines: list[dict], name: str) -> str:
    parts = parts_of(lines, name)
    parts = parts if len(parts) <= MOST_PARTS else []
    with_recall = any(name in line.get("recall", {}) for line in lines)
    with_hard = any(hard_of(line) for line in lines)
    head = ["method", "K", "kept", *parts, "score", "retention", *["hard (n)"] * with_hard,
            *["evidence recall"] * with_recall, "select ms", "prefill ms"]
    rows = []
    for line in lines:
        result, cost = line["scores"][name], line["costs"][name]
        recall = number(line.get("recall", {}).get(name), line.get("recall_sd", {}).get(name))
        rows.append([label(line), budget(line["K"]), f"{cost['kept']:.1f}",
                     *(number(result.get(part)) for part in parts),
                     number(result["value"], result.get("value_sd")),
                     number(result.get("retention"), result.get("retention_sd")),
                     *[hard_cell(result.get("hard"))] * with_hard, *[recall] * with_recall,
                     f"{cost['select_ms']:.2f}", f"{cost['prefill_ms']:.2f}"])
    return markdown(head, rows)


def hard_of(line: dict) -> dict[str, dict]:
    """{benchmark: the score of its hard questions}."""
    return {name: result["hard"] for name, result in line["scores"].items() if "hard" in result}


def hard_cell(hard: dict | None) -> str:
    return f"{number(hard['value'])} ({hard['n']})" if hard else "-"


def hard_share(hard: dict | None) -> str:
    if not hard or not hard["n"]:
        return hard_cell(hard)
    low, high = hard["interval"]
    return f"{hard['value']:.1f} ({low:.1f} to {high:.1f}), {hard['n']}"


def mean_hard(line: dict, lines: list[dict]) -> str:
    """Mean over benchmarks that have hard questions, and how many these have; nothing where a
    method lacks one that others have at the same K."""
    own = {name: hard for name, hard in hard_of(line).items() if hard["n"]}
    others = {name for other in lines if other["K"] == line["K"]
              for name, hard in hard_of(other).items() if hard["n"]}
    if not own or others - {*own}:
        return "-"
    return hard_cell({"value": np.mean([hard["value"] for hard in own.values()]),
                      "n": sum(hard["n"] for hard in own.values())})


def remarks(lines: list[dict]) -> list[str]:
    """What a reader of the headline must know besides: hard questions, what K counts, and what
    could not be scored as it should."""
    said = [HARD] if any(hard_of(line) for line in lines) else []
    for line in lines:
        more = line["cost"].get("entering", 0) / max(line["cost"]["kept"], 1) - 1
        if line["K"] == 0 and more > .001:
            said.append("K and kept count units of the picture in every row; tokens that end a "
                        f"line, {100 * more:.1f} % of the units, come on top")
    for name, title in titles_of(lines).items():
        having = [(line, line["scores"][name]) for line in lines if name in line["scores"]]
        for key, words in COUNTED.items():
            counts = [result.get(key, 0) for _, result in having]
            if not any(counts):
                continue
            low, high = min(counts), max(counts)
            line = having[counts.index(high)][0]
            many = high if low == high else f"{low} to {high}"
            most = "" if low == high else f", most of {line['method']}, K = {budget(line['K'])}"
            said.append(f"{title}: {many} {words}{most}; of {having[0][1]['n']} answers")
    return said


def score_and_retention(result: dict | None) -> str:
    if result is None:
        return "-"
    text = number(result["value"], result.get("value_sd"))
    if "retention" in result:
        text += ", " + number(result["retention"], result.get("retention_sd"))
    return text


def comparable(lines: list[dict]) -> list[str]:
    """The benchmarks that an average is over: those in which the unpruned model scores."""
    return [name for line in lines if line["K"] == 0
            for name, result in line["scores"].items() if result["value"]]


def missing_averages(lines: list[dict]) -> list[str]:
    """A sentence on the methods that have no average, if there are any."""
    entering = comparable(lines)
    few = [f"{line['method']} {line['K']}" for line in lines if line["benchmarks"] < len(entering)]
    if not few:
        return []
    return [f"No average of {', '.join(few)}: they lack some of {', '.join(entering)}, and "
            "averages over different benchmarks do not compare."]


def summary(lines: list[dict]) -> str:
    """Average retention in percent, a row a method, a column a K, the unpruned model above, then
    best first at the smallest K; of runs that differ in the seed alone mean ± standard deviation.
    In brackets what was kept, where it is not K, or the mean number of visual tokens in a layer of
    the language model, where it is not what is kept."""
    budgets = sorted({line["K"] for line in lines if not isinstance(line["K"], str) and line["K"]},
                     reverse=True)
    methods = {}
    for line in scores.mean_over_seeds(lines):
        if line["average"] is not None and line["K"] in budgets:
            methods.setdefault(line["method"], {})[line["K"]] = line

    def at_smallest(method: str) -> float:
        line = methods[method].get(budgets[-1])
        return -line["average"] if line else 0.
    full = [line for line in lines if line["K"] == 0 and line["average"] is not None]
    rows = [["all tokens", *(number(line["average"]) for _ in budgets)] for line in full[:1]]
    names = short_names([*methods])
    for method in sorted(methods, key=at_smallest):
        by_k = methods[method]
        cells = [in_layers(by_k[k]) if k in by_k else "-" for k in budgets]
        rows.append([names[method], *cells])
    return markdown(["method", *(f"K = {budget(k)}" for k in budgets)], rows)


def in_layers(line: dict) -> str:
    layers, kept, k = line["cost"]["layer_mean"], line["cost"]["kept"], line["K"]
    brackets = f" ({layers:.0f})" if abs(layers - kept) > 1 else ""
    if not brackets and k >= 1 and abs(kept - k) >= .05:
        brackets = f" (kept {kept:.1f})"
    return number(line["average"], line.get("average_sd")) + brackets


# ------------------------------------------------------------------------------------ more tables


def intervals_table(lines: list[dict], quoted=()) -> str:
    """Scores with their intervals and retention, the printed rows below the lines they belong to.

    An average stands only where all those benchmarks entered that the unpruned model has a score
    in. Of one benchmark there is none: it is its retention.
    """
    titles = titles_of(lines)
    entering = comparable(lines)

    def averages(value: float | None, n: int) -> list[str]:
        if len(titles) == 1:
            return []
        enough = n == len(entering)
        return [number(value) if enough else "-", f"{n} of {len(titles)}"]
    rows = []
    for line in lines:
        cells = [with_interval(line["scores"].get(name)) for name in titles]
        rows.append([line["method"], budget(line["K"]), *cells,
                     *averages(line["average"], line["benchmarks"])])
        for row in quoted:
            if (row["of"], row["K"]) == (line["method"], line["K"]):
                own = {name: row["scores"][name] for name in titles if name in row["scores"]}
                cells = [printed_cell(row, name) if name in own else "-" for name in titles]
                counted = {name: own[name] for name in own if name in entering}
                rows.append([f"*printed: {row['method']}, {row['source']}*", budget(line["K"]),
                             *cells, *averages(*scores.retention(counted, row["base"]))])
    averaged = ["average retention", "of benchmarks"] if len(titles) > 1 else []
    return markdown(["method", "K", *titles.values(), *averaged], rows)


def with_interval(result: dict | None) -> str:
    if result is None:
        return "-"
    low, high = result["interval"]
    kept = f", {result['retention']:.1f}" if "retention" in result else ""
    return f"{result['value']:.1f} ({low:.1f} to {high:.1f}){kept}"


def printed_cell(row: dict, name: str) -> str:
    value, base = row["scores"][name], row["base"].get(name)
    kept = f", {100 * value / base:.1f}" if base else ""
    mark = f" [{row['flags'][name]}]" if name in row["flags"] else ""
    return f"*{value:g}{kept}*{mark}"


def notes(quoted, names) -> list[str]:
    """What the letters beside the printed figures of these benchmarks stand for."""
    flags = scores.published()["flags"]
    used = sorted({letter for row in quoted for name, letter in row["flags"].items()
                   if name in names})
    return [f"[{letter}] {flags[letter]['text']}" for letter in used]


def parts_of(lines: list[dict], name: str) -> list[str]:
    """The parts of a benchmark's score, such as families or categories."""
    main = benchmarks.load_module(name).MAIN
    result = next(line["scores"][name] for line in lines if name in line["scores"])
    return [key for key, value in result.items()
            if key not in (*NO_PARTS, main) and isinstance(value, float)]


def parts_table(lines: list[dict], name: str) -> str:
    """The parts of one benchmark's score; "" if it has none."""
    parts = parts_of(lines, name)
    rows = []
    for line in lines:
        if result := line["scores"].get(name):
            rows.append([line["method"], budget(line["K"]),
                         *(number(result.get(part)) for part in parts), str(result["n"]),
                         number(result.get("retention"))])
    return markdown(["method", "K", *parts, "n", "retention %"], rows) if parts else ""


def costs_table(lines: list[dict]) -> str:
    """Tokens, FLOPs of the language model's prompt and milliseconds a question, mean over
    benchmarks; the selection and the prefill also in percent of the prefill with all tokens in the
    same run."""
    whole = next((line["cost"]["prefill_ms"] for line in lines if line["K"] == 0), float("nan"))
    rows = []
    for line in lines:
        cost = line["cost"]
        stages = [cell for stage in ("select", "prefill") for cell in (
            f"{cost[f'{stage}_ms']:.2f}", f"{100 * cost[f'{stage}_ms'] / whole:.1f}")]
        tokens = [f"{cost[key]:.1f}" for key in ("kept", "entering", "last_layer", "layer_mean")]
        rows.append([line["method"], budget(line["K"]), *tokens, f"{cost['gflops']:.4g}",
                     f"{cost['vision_ms']:.2f}", *stages, f"{cost['decode_ms']:.2f}"])
    return markdown(["method", "K", "kept", "enter", "in the last layer", "mean over layers",
                     "prefill GFLOPs", "vision ms", "select ms", "%", "prefill ms", "%",
                     "decode ms"], rows)


def hard_table(lines: list[dict]) -> str:
    """Per benchmark the score of its hard questions, its interval and how many there are; ""
    without any."""
    titles = titles_of(lines)
    rows = [[line["method"], budget(line["K"]), *(hard_share(hard.get(name)) for name in titles)]
            for line in lines if (hard := hard_of(line))]
    head = ["method", "K", *(f"hard, {title} (n)" for title in titles.values())]
    return markdown(head, rows) if rows else ""


def counted_table(lines: list[dict]) -> str:
    """Of every line how much could not be scored as it should, see COUNTED; "" if nothing."""
    columns = [(name, key, f"{title}: {COUNTED[key]}") for name, title in titles_of(lines).items()
               for key in COUNTED
               if any(line["scores"].get(name, {}).get(key) for line in lines)]
    rows = [[line["method"], budget(line["K"]),
             *(str(line["scores"][name].get(key, 0)) if name in line["scores"] else "-"
               for name, key, _ in columns)] for line in lines]
    return markdown(["method", "K", *(text for *_, text in columns)], rows) if columns else ""


def kept_table(lines: list[dict]) -> str:
    """Mean number of kept units per benchmark, of the lines where it differs; "" if of none."""
    titles = titles_of(lines)
    rows = []
    for line in lines:
        kept = {name: f"{cost['kept']:.1f}" for name, cost in line["costs"].items()}
        if len(set(kept.values())) > 1:
            rows.append([line["method"], budget(line["K"]),
                         *(kept.get(name, "-") for name in titles)])
    head = ["method", "K", *(f"kept, {title}" for title in titles.values())]
    return markdown(head, rows) if rows else ""


def spread_table(lines: list[dict]) -> str:
    """How methods that decide for themselves spread their tokens; "" if there are none."""
    rows = []
    for line in lines:
        for spread in line.get("spread", {}).values():
            families = ", ".join(f"{name} {k:.0f}" for name, k in spread["families"].items())
            buckets = ", ".join(f"{b['from']}-{b['to']}: {b['score']:.0f} ({b['n']})"
                                for b in spread["buckets"] if b["n"])
            deciles = " ".join(f"{k:.0f}" for k in spread["deciles"][1:-1])
            rows.append([line["method"], budget(line["K"]), f"{spread['mean']:.1f}", deciles,
                         families, f"{spread['things']:.2f}", buckets])
    head = ["method", "wished K", "mean K", "deciles 10 .. 90", "K by family",
            "correlation with number of things", "score by bucket of K (n)"]
    return markdown(head, rows) if rows else ""


# ------------------------------------------------------------------------------------ pages


def refresh(page: Path) -> None:
    """Put the tables that a page quotes between <!-- table: FILE --> and <!-- end --> in again from
    their files."""
    page = Path(page)

    def quote(mark):
        table = (page.parent / mark[2]).read_text(encoding="utf-8").strip()
        return f"{mark[1]}\n{table}\n<!-- end -->"
    text = re.sub(r"(<!-- table: (\S+) -->)\n.*?<!-- end -->", quote,
                  page.read_text(encoding="utf-8"), flags=re.S)
    page.write_text(text, encoding="utf-8")
