"""Tiny tasks of real files; the model and tokenizer are those of tests/inference."""

import importlib.util
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

_path = Path(__file__).parents[1] / "inference" / "conftest.py"
_spec = importlib.util.spec_from_file_location("inference_fixtures", _path)
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
tokenizer, opened, draw_pictures = _shared.tokenizer, _shared.opened, _shared.draw_pictures


def png(text: str, size=(84, 56)) -> bytes:
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).text((8, 18), text, fill="black")
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def draw_text():
    return png


@pytest.fixture(scope="session")
def samples_file(tmp_path_factory):
    """A parquet file in the training format: 24 questions about drawn numbers."""

    def write(name: str, count: int = 24, broken: tuple[int, ...] = ()) -> Path:
        rows = [
            {
                "id": f"s{index}",
                "images": [{"bytes": b"broken" if index in broken else png(str(100 + index)), "path": None}],
                "messages": [
                    {"role": "user", "content": "<image>Which number?"},
                    {"role": "assistant", "content": str(100 + index)},
                ],
                "task": name,
                "answers": [str(100 + index)],
            }
            for index in range(count)
        ]
        schema = pa.schema(
            [
                ("id", pa.string()),
                ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
                ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
                ("task", pa.string()),
                ("answers", pa.list_(pa.string())),
            ]
        )
        path = tmp_path_factory.mktemp(name) / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
        return path

    return write


@pytest.fixture(scope="session")
def model_folder(opened, tokenizer, tmp_path_factory):
    """The tiny model as a Hugging Face folder."""
    from mindvl_jax.weights import OpenedModel, save_parameters
    from mindvl_jax.weights.companions import write_companions

    folder = tmp_path_factory.mktemp("weights")
    config = opened.model.config
    parameters = OpenedModel(opened.model, config, tokenizer, 784, 784 * 16, folder).parameters()
    save_parameters(folder, config, parameters, pad_token_id=tokenizer.pad_id, eos_token_id=tokenizer.eos_id)
    write_companions(folder, config, tokenizer, opened.min_pixels, opened.max_pixels)
    return folder


@pytest.fixture(scope="session")
def benchmark_folder(tmp_path_factory):
    """Small files with the benchmarks' published columns, in both forms."""
    import base64
    import csv

    folder = tmp_path_factory.mktemp("benchmarks")

    def b64(text):
        return base64.b64encode(png(text)).decode()

    def tsv(name, rows):
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)

    def parquet(name, rows):
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        rows = [
            {
                key: {"bytes": value, "path": None} if key.startswith("image") and value is not None else value
                for key, value in row.items()
            }
            for row in rows
        ]
        inferred = pa.Table.from_pylist(rows).schema
        schema = pa.schema(
            [(field.name, image if field.name.startswith("image") else field.type) for field in inferred]
        )
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / name)

    tsv(
        "DocVQA_VAL.tsv",
        [
            {
                "index": i,
                "image": b64(str(i)) if i != 2 else "1",
                "question": f"which number {i}?",
                "answer": str([str(i), f"no. {i}"]),
            }
            for i in range(6)
        ],
    )
    parquet(
        "chartqa_test.parquet",
        [
            {"type": kind, "question": f"value {i}?", "answer": str(100 + i), "image": png(str(i))}
            for i, kind in enumerate(["human_test"] * 3 + ["augmented_test"] * 3)
        ],
    )
    parquet(
        "ocrbench.parquet",
        [
            {
                "dataset": "IIIT5K",
                "question": "what is written in the image?",
                "question_type": kind,
                "answer": ["word"],
                "image": png("word"),
            }
            for kind in (
                "Regular Text Recognition",
                "Digit String Recognition",
                "Handwritten Mathematical Expression Recognition",
            )
        ],
    )
    parquet(
        "mme.parquet",
        [
            {
                "question_id": f"{category}/{i}.jpg",
                "image": png(str(i)),
                "question": f"Is it {answer}? Please answer yes or no.",
                "answer": answer,
                "category": category,
            }
            for category in ("existence", "numerical_calculation")
            for i in range(2)
            for answer in ("Yes", "No")
        ],
    )
    options = ["red", "green", "blue", "black"]
    tsv(
        "MMBench_DEV_EN.tsv",
        [
            {
                "index": index + 1_000_000 * turn,
                "image": b64(str(index)) if turn == 0 else str(index),
                "question": "which colour?",
                "hint": "nan" if index else "look closely",
                "category": "colour",
                "l2-category": "perception",
                "answer": "ABCD"[(index - turn) % 4],
                **{letter: options[(place + turn) % 4] for place, letter in enumerate("ABCD")},
            }
            for turn in range(4)
            for index in range(3)
        ],
    )
    tsv(
        "AI2D_TEST.tsv",
        [
            {
                "index": i,
                "image": b64(str(i)),
                "question": "which part?",
                "A": "root",
                "B": "stem",
                "C": "leaf",
                "D": "seed",
                "answer": "ABCD"[i % 4],
            }
            for i in range(4)
        ],
    )
    parquet(
        "mmmu_val.parquet",
        [
            {
                "id": f"validation_Accounting_{i}",
                "question": "Compare <image 1> and <image 2>.",
                "options": "['x', 'y']" if i < 3 else "[]",
                "image_1": png("1"),
                "image_2": png("2"),
                "image_3": None,
                "answer": "B" if i < 3 else "12",
                "question_type": "multiple-choice" if i < 3 else "open",
            }
            for i in range(4)
        ],
    )
    parquet(
        "textvqa_val.parquet",
        [
            {
                "question_id": 7 + i,
                "question": "what does the sign say?",
                "answers": ["stop"] * 8 + ["halt"] * 2,
                "image": png("stop"),
            }
            for i in range(3)
        ],
    )
    parquet(
        "realworldqa.parquet",
        [
            {
                "image": png("r"),
                "question": "Where?\nA. left\nB. right\nPlease answer directly with only the letter of the correct "
                "option and nothing else.",
                "answer": "B",
            },
            {"image": png("r"), "question": "How many?", "answer": "2"},
        ],
    )
    return folder
