"""Answers on disk: a JSON line for what they are of, then one per question; all that scores need.

    header  benchmark, model, fingerprint, method, budget, style, seed, ..., questions: how many
            there are in all
    row     number: place among the questions | id, prompt, answer, gold
            kept: units that reached the end of the language model
            seen: visual tokens that entered it, that its last layer saw, mean over its layers
            flops: of the prompt in the language model | ms: {stage: milliseconds}
            recall: share of the units that show the answer which were kept, None where it is not
            known; only of benchmarks that say where the answer stands
            too long: tokens of a prompt that the model has no positions for; the answer is empty

Rows are appended, whole lines at a time. Of several processes each has a file,
-00001-of-00002; they are read together, and by any number of processes continued. One evaluation
at a time writes into a folder: whoever adds to a file there holds its lock, which the system takes
back when the process ends, however it ends.
"""

import json
import re
from pathlib import Path

from filelock import FileLock, Timeout

from runs import append

ROW = {"number", "id", "prompt", "answer", "gold", "kept", "seen", "flops", "ms"}
HEADER = {"benchmark", "method", "budget", "questions"}
PART = re.compile(r"-\d{5}-of-\d{5}$")
SAME_ANSWER = ("prompt", "answer", "gold")             # what two rows of a question must agree in


def file_name(method: str, budget) -> str:
    """What the file of a method and budget is called, without its ending."""
    return re.sub(r"[^\w.+-]+", "_", f"{method}-{budget}").strip("_")


def own_file(path: Path, process: int, processes: int) -> Path:
    """The file that process number `process`, from 0, of so many appends to; path: <name>.jsonl."""
    if processes == 1:
        return path
    return path.with_name(f"{path.stem}-{process + 1:05d}-of-{processes:05d}.jsonl")


def parts(path: Path) -> list[Path]:
    """The files there are of <name>.jsonl, whatever number of processes wrote them."""
    return sorted(file for file in path.parent.glob("*.jsonl")
                  if PART.sub("", file.stem) == path.stem)


def lock(folder: Path, process: int) -> FileLock:
    """The lock of process number `process`, from 0, on the predictions of a folder. It is held as
    long as somebody has it, or the process lives; within one process it may be taken again.

    Every evaluation has a process 0, so two of them meet here. Raises RuntimeError at once where
    another one holds it.
    """
    held = FileLock(folder / f".lock-{process + 1:05d}", timeout=0, thread_local=False,
                    is_singleton=True)
    try:
        held.acquire()
    except Timeout:
        raise RuntimeError(f"another evaluation is writing into {folder}: wait for it to end, or "
                           "name another folder by --out") from None
    return held


def read_file(path: Path, repair: bool = False) -> tuple[dict | None, list[dict]]:
    """Header and rows of one file; None and no rows where it has not even a whole header.

    Half a line at the end, which a kill leaves, is left out, and with `repair` cut off; either is
    printed. A whole line that lacks its end is a row, and with `repair` gets it. Raises ValueError
    naming file and line for anything else that is no row.
    """
    data = path.read_bytes()
    lines = data.split(b"\n")
    last = lines.pop()
    if last and is_whole(last, not lines):
        lines.append(last)
        if repair:
            with open(path, "ab") as file:
                file.write(b"\n")
    elif last:
        what = "cut off and asked again" if repair else "left out"
        print(f"{path}: half a row at its end, {len(last)} bytes, is {what}")
        if repair:
            with open(path, "r+b") as file:
                file.truncate(len(data) - len(last))
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parsed(line, number == 1))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no row of a predictions file ({error}): "
                             "put the file right, or move it away to ask all of its questions "
                             "again") from None
    return (rows[0], rows[1:]) if rows else (None, [])


def parsed(line: bytes, is_header: bool) -> dict:
    """A line of a file. Raises ValueError for one that is no header, or no row."""
    row = json.loads(line)
    if not is_header and not (isinstance(row, dict) and ROW <= set(row)):
        raise ValueError(f"expected {', '.join(sorted(ROW))}")
    if is_header and not isinstance(row, dict):
        raise ValueError("expected a header")
    if is_header and not HEADER <= set(row):
        raise ValueError("expected a header that names benchmark, method, budget and questions")
    return row


def is_whole(line: bytes, is_header: bool) -> bool:
    """Is a line that lacks its end all there? Of half a line JSON can make nothing."""
    try:
        return bool(parsed(line, is_header))
    except ValueError:
        return False


def header_differences(here: dict, there: dict) -> str:
    """What two headers disagree in, versions left out; empty if in nothing."""
    keys = [key for key in (here | there)
            if key != "versions" and here.get(key) != there.get(key)]
    return "; ".join(f"{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in keys)


def read(path: Path, repair: bool = False) -> tuple[dict | None, list[dict]]:
    """Header and rows, in the order of the questions, of all files of <name>.jsonl; None if there
    are none.

    Of several rows of an id that have the same answer the first counts, which is printed. Raises
    ValueError for files that do not belong together, and for an id that has two answers.
    """
    header = None
    rows, where, again = {}, {}, []
    for file in parts(path):
        own_header, own_rows = read_file(file, repair)
        if own_header is None:
            continue
        if header and (differ := header_differences(own_header, header)):
            raise ValueError(f"{file} does not belong to the other files of {path.stem} "
                             f"({differ}): move one away")
        header = header or own_header
        for row in own_rows:
            there = rows.setdefault(row["id"], row)
            if any(row[key] != there[key] for key in SAME_ANSWER):
                raise ValueError(f"the id {row['id']!r} has a row in {where[row['id']]} and "
                                 f"another in {file}, with another answer: delete one of the two "
                                 "lines")
            if there is not row:
                again.append(row["id"])
            where.setdefault(row["id"], file)
    if again:
        print(f"{path}: rows that stand there once more with the same answer are left out: "
              f"{len(again)}, such as that of {again[0]!r}")
    return header, sorted(rows.values(), key=lambda row: row["number"])


class Predictions:
    """One method's answers to a list of questions, to be added to; done: ids that have one.

    As long as it lives no other evaluation may write into the folder: see lock(). Raises ValueError
    naming what differs where the file is of another model, method or setting, or of other
    questions.
    """

    def __init__(self, path: Path, header: dict, questions, process: int = 0, processes: int = 1):
        self.path = Path(path)
        self.file = own_file(self.path, process, processes)
        self.header = header
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.path.parent, process)
        # each process repairs its own file, and reads the others'
        if self.file.exists() and read_file(self.file, repair=True)[0] is None:
            self.file.unlink()
        there, rows = read(self.path)
        elsewhere = "name another folder by --out, or move the file away"
        if there and (differ := header_differences(header, there)):
            raise ValueError(f"{self.path} holds answers of something else ({differ}): {elsewhere}")
        if there and there.get("versions") != header.get("versions"):
            print(f"{self.path}: begun with {there.get('versions')}, continued with "
                  f"{header.get('versions')}")
        known = {question.id: question for question in questions}
        for row in rows:
            question = known.get(row["id"])
            if question is None:
                raise ValueError(f"{self.path} answers the question {row['id']!r}, which is none "
                                 f"of these: {elsewhere}")
            for key, value in (("prompt", question.prompt), ("gold", plain(question.gold))):
                if row[key] != value:
                    raise ValueError(f"{self.path}: the {key} of {row['id']!r} differs: "
                                     f"{row[key]!r} there, {value!r} here; {elsewhere}")
        self.done = {row["id"] for row in rows}

    def add(self, rows: list[dict]) -> None:
        """Append those rows whose ids are not there yet, in one piece, and see them on disk.
        Raises OSError where they cannot be written."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n"
                       for row in rows if row["id"] not in self.done)
        if not text:
            return
        if not self.file.exists() or not self.file.stat().st_size:
            text = json.dumps(self.header, ensure_ascii=False) + "\n" + text
        append(self.file, text)
        self.done |= {row["id"] for row in rows}


def plain(value):
    """What becomes of a value that is written as JSON and read again: tuples are lists, keys are
    str."""
    return json.loads(json.dumps(value))
