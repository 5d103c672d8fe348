"""Write the carried handwritten digits as samples: the user names a digit, the assistant answers with its image.

    python -m examples.digits_flow.build [--out data/digits-flow] [--shuffle-labels]

`train.parquet` holds the 3,800 digits of the quickstart's training part, `held_out.parquet` the 1,000 of its test part.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from examples.quickstart import assets


def write(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    """Write (n, 20, 20) uint8 digits and their labels as one parquet file of samples."""
    rows = []
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        messages = [{"role": "user", "content": str(label)}, {"role": "assistant", "content": "<image>"}]
        rows.append(
            {"id": f"{path.stem}-{index}", "images": [{"bytes": file.getvalue(), "path": ""}], "messages": messages}
        )
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("id", pa.string()), ("images", pa.list_(image)), ("messages", pa.list_(message))])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/digits-flow"))
    parser.add_argument(
        "--shuffle-labels",
        action="store_true",
        help="give the training digits each other's labels: the floor of the score",
    )
    args = parser.parse_args()
    pixels, labels = assets.digit_cells("train")
    if args.shuffle_labels:
        labels = np.random.default_rng(0).permutation(labels)
    write(args.out / "train.parquet", pixels, labels)
    write(args.out / "held_out.parquet", *assets.digit_cells("test"))
    print(f"{args.out}: {len(labels)} digits to train on, {len(assets.digit_cells('test')[1])} held out")


if __name__ == "__main__":
    main()
