"""`mindvl average` as one calls it: two folders of one architecture, every method."""

import json

import numpy as np
import pytest

from mindvl_jax.cli import main as cli
from mindvl_jax.weights import OpenedModel, open_model, save_parameters
from mindvl_jax.weights.companions import write_companions


@pytest.fixture(scope="module")
def other_folder(opened, tokenizer, tmp_path_factory):
    """The tiny model of `model_folder` with every parameter moved."""
    folder = tmp_path_factory.mktemp("other")
    config = opened.model.config
    parameters = OpenedModel(opened.model, config, tokenizer, 784, 784 * 16, folder).parameters()
    save_parameters(
        folder,
        config,
        {path: value * 1.5 + 0.125 for path, value in parameters.items()},
        pad_token_id=tokenizer.pad_id,
        eos_token_id=tokenizer.eos_id,
    )
    write_companions(folder, config, tokenizer, opened.min_pixels, opened.max_pixels)
    return folder


@pytest.mark.parametrize(
    "arguments, share",
    [
        (["--method", "weighted", "--by", "3", "1"], 0.75),
        (["--method", "ema", "--decay", "0.8"], 0.8),
        (["--method", "uniform"], 0.5),
    ],
    ids=["weighted", "ema", "uniform"],
)
def test_each_method_gives_the_first_model_its_share(model_folder, other_folder, tmp_path, capsys, arguments, share):
    out = tmp_path / "mean"
    assert cli.main(["average", "--weights", str(model_folder), str(other_folder), "--out", str(out), *arguments]) == 0
    assert capsys.readouterr().out == f"{out}: {arguments[1]} average of 2 models (recipe in average.json)\n"
    first, second, mean = (open_model(folder).parameters() for folder in (model_folder, other_folder, out))
    difference = max(
        np.abs(
            np.asarray(mean[path], np.float64)
            - share * np.asarray(first[path], np.float64)
            - (1 - share) * np.asarray(second[path], np.float64)
        ).max()
        for path in first
    )
    assert difference < 1e-6, (
        f"max difference {difference}"
    )  # two float32 products, a sum and a division of numbers up to 4
    recipe = json.loads((out / "average.json").read_text())
    assert recipe["method"] == arguments[1] and [round(model["weight"], 4) for model in recipe["models"]] == [
        share,
        round(1 - share, 4),
    ]


def test_a_soup_tells_what_it_tried_and_keeps_what_does_not_hurt(
    model_folder, other_folder, samples_file, tmp_path, capsys
):
    out = tmp_path / "soup"
    task = f"numbers={samples_file('souped', count=6)}"
    assert (
        cli.main(
            [
                "average",
                "--weights",
                str(model_folder),
                str(other_folder),
                "--method",
                "soup",
                "--tasks",
                task,
                "--limit",
                "3",
                "--out",
                str(out),
                "--batch",
                "4",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    steps = json.loads((out / "average.json").read_text())["steps"]
    assert [step["model"] for step in steps] == [str(model_folder), str(other_folder)]  # of equals the one named first
    for step in steps:
        assert (
            f"{step['model']}: alone {step['alone']:.4f}, soup with it {step['with']:.4f}: "
            f"{'kept' if step['kept'] else 'left out'}" in printed
        )
        assert step["kept"] == (step["with"] >= steps[0]["alone"])
    share = 0.5 if steps[1]["kept"] else 1.0
    first, second, soup = (open_model(folder).parameters() for folder in (model_folder, other_folder, out))
    difference = max(
        np.abs(np.asarray(soup[path]) - share * np.asarray(first[path]) - (1 - share) * np.asarray(second[path])).max()
        for path in first
    )
    assert difference < 1e-6, f"max difference {difference}"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--weights", "{model}"], "an average needs two at least"),
        (["--weights", "{model}", "{model}", "--method", "weighted"], "--method weighted and --by belong together"),
        (["--weights", "{model}", "{model}", "--by", "1", "2"], "--method weighted and --by belong together"),
        (["--weights", "{model}", "{model}", "--method", "weighted", "--by", "1"], "1 weights for 2 models"),
        (["--weights", "{model}", "{model}", "--method", "ema", "--decay", "1"], "decay is 1.0"),
        (["--weights", "{model}", "{model}", "--method", "soup"], "--method soup and --tasks belong together"),
        (["--weights", "{model}", "{data}"], "config.json"),
        (["--weights", "{model}", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_what_cannot_be_averaged_is_refused_and_nothing_is_written(
    model_folder, benchmark_folder, tmp_path, capsys, arguments, message
):
    filled = [argument.format(model=model_folder, data=benchmark_folder) for argument in arguments]
    assert cli.main(["average", *filled, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
