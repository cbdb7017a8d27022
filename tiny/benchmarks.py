"""Local copies of the benchmarks, filled with the tiny world, for a rehearsal offline:
`python -m tiny.benchmarks DIR`.

DIR/<benchmark> has the files, configs, splits and columns of the hub's; the questions are about
scenes. DIR/llava and DIR/qwen2_5_vl are the tiny VLMs with a tokenizer that skips what follows the
question's first line, such as "Answer the question using a single word or phrase.", and all words
that they have not learnt.

    python evaluate.py --model DIR/llava --data_root DIR --benchmarks pope mme gqa --methods all
"""

import io
import json
import shutil
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List

import runs
from tiny import scenes

ROUND = 1_000_000                     # MMBench: how far apart a question's rotated copies stand
CATEGORIES = ("random", "popular", "adversarial")                              # of POPE


def asked(n: int, family: str, first: int = 0):
    """n of (picture as a cell, question), each about a scene of its own, from number `first` of the
    test scenes on."""
    number = scenes.SPLITS["test"] + first
    while n > 0:
        scene = scenes.make_scene(number)
        question = scenes.ASK[family](scene, np.random.default_rng([number, 17]))
        if question:                                   # not every scene can be asked everything
            yield cell(scene), question
            n -= 1
        number += 1


def cell(scene) -> dict:
    buffer = io.BytesIO()
    scenes.render(scene).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{scene.seed}.png"}


def options(question, i: int) -> tuple[list[str], int]:
    """Four answers of the question's kind, and the place of the right one, which depends on i."""
    pool = list(scenes.COLOURS) if question.family == "colour" else list(scenes.SHAPES)
    wrong = [x for x in pool if x != question.answer]
    others = [wrong[(i + k) % len(wrong)] for k in range(3)]
    return others[:i % 4] + [question.answer] + others[i % 4:], i % 4


def write(folder: Path, split: str, rows: list[dict]) -> None:
    """One parquet file as the hub has it; pictures as pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    data = Dataset.from_list(rows)
    for name in data.column_names:
        first = next((row[name] for row in rows if row[name] is not None), None)
        if name.startswith("image_") and first is None:
            data = data.cast_column(name, Image())
        elif isinstance(first, dict) and "bytes" in first:
            data = data.cast_column(name, Image())
        elif isinstance(first, list) and isinstance(first[0], dict) and "bytes" in first[0]:
            data = data.cast(Features({**data.features, name: List(Image())}))
    data.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def short(out: Path, n: int) -> None:
    """GQA, MME, POPE, VQAv2, TextVQA, VizWiz, DocVQA, InfoVQA, ChartQA."""
    colours = list(asked(n, "colour"))
    signs = list(asked(n, "text"))
    write(out / "gqa/testdev_balanced_instructions", "testdev", [
        {"id": str(i), "imageId": f"n{i}", "question": q.question, "answer": q.answer}
        for i, (_, q) in enumerate(colours)])
    write(out / "gqa/testdev_balanced_images", "testdev", [
        {"id": f"n{i}", "image": image} for i, (image, _) in enumerate(colours)])
    write(out / "pope", "test", [
        {"question_id": str(i), "question": q.question, "answer": q.answer,
         "category": CATEGORIES[i % 3], "image_source": f"{i}", "image": image}
        for i, (image, q) in enumerate(asked(n, "exist"))])
    write(out / "mme", "test", [row for rows in mme(n) for row in rows])
    write(out / "vqav2", "validation", [
        {"question_id": i, "question": q.question, "question_type": "what",
         "answer_type": "other", "image": image, "answers": [
             {"answer": q.answer, "answer_id": k + 1, "answer_confidence": "yes"}
             for k in range(10)]}
        for i, (image, q) in enumerate(colours)])
    for name, split, key in (("textvqa", "validation", "question_id"),
                             ("vizwiz", "val", "question_id"),
                             ("docvqa/DocVQA", "validation", "questionId"),
                             ("infovqa/InfographicVQA", "validation", "questionId")):
        write(out / name, split, [
            {key: str(i), "image_id": str(i), "question": q.question, "answers": [q.answer] * 10,
             "image": image, "ocr_tokens": q.answer.split(), "category": "other"}
            for i, (image, q) in enumerate(signs)])
    write(out / "chartqa", "test", [
        {"type": ("human_test", "augmented_test")[i % 2], "question": q.question,
         "answer": q.answer, "image": image}
        for i, (image, q) in enumerate(asked(n, "count"))])


def mme(n: int):
    """The two rows of each picture, which is asked about once with the answer yes and once no."""
    categories = ["existence", "color", "code_reasoning"] * n
    for category, (image, first) in zip(categories, asked(n // 2, "exist")):
        number = int(image["path"][:-4])
        scene = scenes.make_scene(number)
        by_answer = {first.answer: first}
        for seed in range(100):
            other = scenes.ask_exist(scene, np.random.default_rng([number, 18, seed]))
            by_answer.setdefault(other.answer, other)
        yield [{"question_id": f"{category}/{number}.png", "image": image,
                "answer": answer.capitalize(), "category": category,
                "question": f"{question.question} Please answer yes or no."}
               for answer, question in sorted(by_answer.items(), reverse=True)]


def letters(out: Path, n: int) -> None:
    """MMBench, MMBench-CN, ScienceQA, SEED, MMMU, AI2D."""
    both = [*asked(n - n // 2, "colour"), *asked(n // 2, "shape", 5000)]
    chosen = [(image, q, *options(q, i)) for i, (image, q) in enumerate(both)]
    circular = []
    for turn in range(4):
        for i, (image, q, four, _) in enumerate(chosen[:max(1, n // 4)]):
            turned = four[turn:] + four[:turn]
            circular.append({"index": i + turn * ROUND, "question": q.question, "hint": None,
                             "answer": "ABCD"[turned.index(q.answer)],
                             **dict(zip("ABCD", turned)), "category": q.family,
                             "L2-category": q.family, "image": image, "split": "dev"})
    write(out / "mmbench/en", "dev", circular)
    write(out / "mmbench_cn/cn", "dev", circular)
    write(out / "scienceqa/ScienceQA-IMG", "test", [
        {"question": q.question, "choices": four, "answer": right, "hint": "", "image": image}
        for image, q, four, right in chosen])
    for name in ("seed", "seed_all", "seed_video"):
        write(out / name, "test", [
            {"question_id": str(i), "question": q.question,
             **{f"choice_{x}": option for x, option in zip("abcd", four)},
             "answer": "ABCD"[right], "data_type": ("image", "image", "video")[i % 3],
             "image": [image] * (3 if i % 3 == 2 else 1)}
            for i, (image, q, four, right) in enumerate(chosen)])
    write(out / "mmmu", "validation", [
        {"id": f"validation_Tiny_{i}", "question": f"<image 1> {q.question}", "options": str(four),
         "answer": "ABCD"[right], "question_type": "multiple-choice", "image_1": image,
         **{f"image_{k}": None for k in range(2, 8)}}
        for i, (image, q, four, right) in enumerate(chosen)])
    write(out / "ai2d", "test", [
        {"question": q.question, "options": four, "answer": str(right), "image": image}
        for image, q, four, right in chosen])


def reader(source: Path, out: Path) -> None:
    """A tiny VLM whose tokenizer skips what it has not learnt, see above."""
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("stages"))
    file = out / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    known = "|".join(word for word in tokenizer["model"]["vocab"] if word.isalnum())
    unknown = rf"\b(?!(?:{known})\b)\w+\b|[^\w\s.,?]"
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"Regex": r"\n[\s\S]*"}, "content": " "},
        {"type": "Lowercase"},
        {"type": "Replace", "pattern": {"Regex": unknown}, "content": " "}]}
    file.write_text(json.dumps(tokenizer))


def main(args: list[str]) -> None:
    parser = runs.Parser([], description=__doc__)
    parser.add_argument("dir", type=Path, help="where it goes")
    parser.add_argument("--n", type=int, default=60, help="questions of each, about")
    cfg = parser.parse_args(args)
    runs.check_options(cfg, n=2)
    runs.writable(cfg.dir)
    short(cfg.dir, cfg.n)
    letters(cfg.dir, cfg.n)
    for name in ("llava", "qwen2_5_vl"):
        reader(Path(__file__).with_name(name), cfg.dir / name)
    print(f"{cfg.dir}: {', '.join(sorted(p.name for p in cfg.dir.iterdir()))}")


if __name__ == "__main__":
    runs.command(main)
