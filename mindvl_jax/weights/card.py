"""Files that an export keeps of its base folder, and its README.md."""

from __future__ import annotations

import json
from pathlib import Path

from mindvl_jax.checkpoints.names import run_folder
from mindvl_jax.config.schema import Config
from mindvl_jax.core.files import read_json, write_text

DTYPES = ("float32", "bfloat16", "float16")


def base_of(config: Config) -> Path | None:
    """Return the Hugging Face folder that a run started from, if it did and the folder is still there."""
    if config.run.init_from is None:
        return None
    folder = run_folder(config.run.init_from)
    return folder if (folder / "config.json").is_file() else None


def base_dtype(folder: Path) -> str | None:
    """Return the dtype that a published folder names for its weights."""
    described = _read(folder / "config.json")
    named = described.get("dtype") or described.get("torch_dtype")
    return named if named in DTYPES else None


def keep_generation_settings(out: Path, base: Path) -> None:
    """Add the base's sampling settings to those of the export, whose token ids are the ones that training saw."""
    kept, ours = _read(base / "generation_config.json"), _read(out / "generation_config.json")
    kept = {name: value for name, value in kept.items() if not name.endswith("_token_id") and name[:1] != "_"}
    if kept and ours:
        ids = {name: value for name, value in ours.items() if name.endswith("_token_id")}
        write_text(out / "generation_config.json", json.dumps({**kept, **ids}, indent=2, ensure_ascii=False) + "\n")


def write_card(out: Path, config: Config, run: Path, *, kind: str, dtype: str, in_transformers: bool) -> None:
    """Write README.md: where the model comes from, how it was trained, its held-out scores, how to open it."""
    base = config.run.init_from
    lines = ["---"]
    if in_transformers:
        lines += ["library_name: transformers", "pipeline_tag: image-text-to-text"]
    if base is not None:
        lines += [f"base_model: {json.dumps(run_folder(base).name, ensure_ascii=False)}"]
    lines += ["tags: [mindvl-jax]", "---", "", f"# {run.resolve().name}", ""]
    start = f"started from `{run_folder(base).name}`" if base is not None else "started from random weights"
    lines += [f"Trained with MindVL-JAX, {start}; model type `{kind}`, weights in {dtype}.", ""]
    lines += ["| Phase | Steps | Trained | Data | Learning rate |", "|---|---|---|---|---|"]
    for phase in config.training.phases:
        length = f"{phase.epochs:g} epochs" if phase.steps is None else f"{phase.steps:,}"
        trained = ", ".join(f"`{glob}`" for glob in phase.train)
        lines.append(f"| {phase.name} | {length} | {trained} | {', '.join(phase.sources)} | {phase.learning_rate:g} |")
    tasks = _read(run / "scores.json").get("tasks", {})
    if tasks:
        lines += ["", "| Held out | Exact match | 95 % interval | Samples |", "|---|---|---|---|"]
        for name, task in tasks.items():
            low, high = task["ci95"]
            lines.append(f"| {name} | {task['exact_match']:.3f} | {low:.3f} to {high:.3f} | {task['n']} |")
    if in_transformers:
        lines += ["", "```python", "from transformers import AutoModelForImageTextToText", ""]
        lines += ['model = AutoModelForImageTextToText.from_pretrained("PATH", dtype="auto")', "```"]
    lines += ["", "```bash", 'mindvl generate --weights PATH --image cat.png --prompt "What is this?"', "```"]
    write_text(out / "README.md", "\n".join(lines) + "\n")


def _read(path: Path) -> dict:
    try:
        content = read_json(path, {})
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
