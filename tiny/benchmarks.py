"""Local copies of the benchmarks, filled with the tiny world: `python -m tiny.benchmarks DIR`, for a rehearsal offline.

DIR/<benchmark> has the files, configs, splits and columns of the hub's; the questions are about scenes. DIR/llava and
DIR/qwen2_5_vl are the tiny VLMs with a tokenizer that skips what follows the question's first line, such as "Answer the
question using a single word or phrase.", and all words that they have not learnt.

    python evaluate.py --model DIR/llava --data_root DIR --benchmarks pope mme gqa --methods all
"""

import argparse
import io
import json
import shutil
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List

from tiny import scenes

ROUND = 1_000_000                                      # MMBench: how far apart the rotated copies of a question stand


def asked(n: int, family: str, first: int = 0):
    """n of (picture as a cell, question), each about a scene of its own, from number `first` of the test scenes on."""
    number, found = scenes.SPLITS["test"] + first, 0
    while found < n:
        scene = scenes.make_scene(number)
        if question := scenes.ASK[family](scene, np.random.default_rng([number, 17])):
            yield cell(scene), question
            found += 1
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
    colours, signs = list(asked(n, "colour")), list(asked(n, "text"))
    write(out / "gqa/testdev_balanced_instructions", "testdev", [
        {"id": str(i), "imageId": f"n{i}", "question": q.question, "answer": q.answer}
        for i, (_, q) in enumerate(colours)])
    write(out / "gqa/testdev_balanced_images", "testdev", [{"id": f"n{i}", "image": c}
                                                           for i, (c, _) in enumerate(colours)])
    write(out / "pope", "test", [
        {"question_id": str(i), "question": q.question, "answer": q.answer,
         "category": ("random", "popular", "adversarial")[i % 3], "image_source": f"{i}", "image": c}
        for i, (c, q) in enumerate(asked(n, "exist"))])
    mme = []
    for category, (c, q) in zip(["existence", "color", "code_reasoning"] * n, asked(n // 2, "exist")):
        number = int(c["path"][:-4])
        scene, said = scenes.make_scene(number), {q.answer: q}
        for seed in range(100):                        # a picture is asked about twice, once yes and once no
            other = scenes.ask_exist(scene, np.random.default_rng([number, 18, seed]))
            said.setdefault(other.answer, other)
        mme += [{"question_id": f"{category}/{number}.png", "image": c, "answer": answer.capitalize(),
                 "question": f"{x.question} Please answer yes or no.", "category": category}
                for answer, x in sorted(said.items(), reverse=True)]
    write(out / "mme", "test", mme)
    write(out / "vqav2", "validation", [
        {"question_id": i, "question": q.question, "question_type": "what", "answer_type": "other", "image": c,
         "answers": [{"answer": q.answer, "answer_id": k + 1, "answer_confidence": "yes"} for k in range(10)]}
        for i, (c, q) in enumerate(colours)])
    for name, split, key in (("textvqa", "validation", "question_id"), ("vizwiz", "val", "question_id"),
                             ("docvqa/DocVQA", "validation", "questionId"),
                             ("infovqa/InfographicVQA", "validation", "questionId")):
        write(out / name, split, [
            {key: str(i), "image_id": str(i), "question": q.question, "answers": [q.answer] * 10, "image": c,
             "ocr_tokens": q.answer.split(), "category": "other"} for i, (c, q) in enumerate(signs)])
    write(out / "chartqa", "test", [
        {"type": ("human_test", "augmented_test")[i % 2], "question": q.question, "answer": q.answer, "image": c}
        for i, (c, q) in enumerate(asked(n, "count"))])


def letters(out: Path, n: int) -> None:
    """MMBench, MMBench-CN, ScienceQA, SEED, MMMU, AI2D."""
    chosen = [(c, q, *options(q, i)) for i, (c, q) in enumerate([*asked(n - n // 2, "colour"),
                                                                 *asked(n // 2, "shape", 5000)])]
    circular = []
    for turn in range(4):
        for i, (c, q, four, _) in enumerate(chosen[:max(1, n // 4)]):
            turned = four[turn:] + four[:turn]
            circular.append({"index": i + turn * ROUND, "question": q.question, "hint": None,
                             "answer": "ABCD"[turned.index(q.answer)], **dict(zip("ABCD", turned)),
                             "category": q.family, "L2-category": q.family, "image": c, "split": "dev"})
    write(out / "mmbench/en", "dev", circular)
    write(out / "mmbench_cn/cn", "dev", circular)
    write(out / "scienceqa/ScienceQA-IMG", "test", [
        {"question": q.question, "choices": four, "answer": right, "hint": "", "image": c}
        for c, q, four, right in chosen])
    for name in ("seed", "seed_all", "seed_video"):
        write(out / name, "test", [
            {"question_id": str(i), "question": q.question, **{f"choice_{x}": o for x, o in zip("abcd", four)},
             "answer": "ABCD"[right], "data_type": ("image", "image", "video")[i % 3],
             "image": [c] * (3 if i % 3 == 2 else 1)} for i, (c, q, four, right) in enumerate(chosen)])
    write(out / "mmmu", "validation", [
        {"id": f"validation_Tiny_{i}", "question": f"<image 1> {q.question}", "options": str(four),
         "answer": "ABCD"[right], "question_type": "multiple-choice", "image_1": c,
         **{f"image_{k}": None for k in range(2, 8)}} for i, (c, q, four, right) in enumerate(chosen)])
    write(out / "ai2d", "test", [{"question": q.question, "options": four, "answer": str(right), "image": c}
                                 for c, q, four, right in chosen])


def reader(source: Path, out: Path) -> None:
    """A tiny VLM whose tokenizer skips what it has not learnt, see above."""
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("stages"))
    file = out / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    known = "|".join(word for word in tokenizer["model"]["vocab"] if word.isalnum())
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"Regex": r"\n[\s\S]*"}, "content": " "}, {"type": "Lowercase"},
        {"type": "Replace", "pattern": {"Regex": rf"\b(?!(?:{known})\b)\w+\b|[^\w\s.,?]"}, "content": " "}]}
    file.write_text(json.dumps(tokenizer))


def main(args=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--n", type=int, default=60, help="questions of each, about [60]")
    cfg = parser.parse_args(args)
    short(cfg.dir, cfg.n)
    letters(cfg.dir, cfg.n)
    for name in ("llava", "qwen2_5_vl"):
        reader(Path(__file__).with_name(name), cfg.dir / name)
    print(f"{cfg.dir}: {', '.join(sorted(p.name for p in cfg.dir.iterdir()))}")


if __name__ == "__main__":
    main()
