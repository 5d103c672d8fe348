"""`mindvl serve`: answer over HTTP with the OpenAI interface."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mindvl_jax.cli.backend import add_backend_arguments, chosen_programs
from mindvl_jax.core.errors import UserError, at_least_one

KEY_VARIABLE = "MINDVL_API_KEYS"
EPILOG = """examples:
  mindvl serve --weights runs/quickstart
  mindvl serve --weights Qwen2.5-VL-7B-Instruct --adapter charts=runs/charts/adapter --adapter forms=runs/forms/adapter
  mindvl serve --weights Qwen2.5-VL-7B-Instruct --host 0.0.0.0 --port 8000 --slots 32 --context 8192
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "quickstart", "messages": [{"role": "user", "content": "Hello"}]}'

Keys come from --api-key or, comma-separated, from the variable MINDVL_API_KEYS.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "--weights", required=True, metavar="DIR", help="one of our runs or checkpoints, or a Hugging Face folder"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="PEFT folder that answers requests for the model NAME, beside the weights; may be given several times, "
        "each with slots and a cache of its own",
    )
    parser.add_argument("--name", help="model name that requests give; default: the folder's name")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine alone)"
    )
    parser.add_argument("--port", type=int, default=8000, help="(default %(default)s)")
    parser.add_argument(
        "--sampling",
        choices=("folder", "openai"),
        default="folder",
        help="settings of requests that do not give them: of the folder's generation_config.json, or the interface's "
        "own, temperature 1 and no limits (default %(default)s)",
    )
    parser.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="accept this key; may be given several times (default: no key needed)",
    )
    _add_sizes(parser)
    _add_limits(parser)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--slots", type=int, default=16, help="answers that decode together (default %(default)s)")
    sizes.add_argument(
        "--context", type=int, default=2048, help="longest prompt plus answer in tokens (default %(default)s)"
    )
    sizes.add_argument(
        "--max-pixels",
        type=int,
        help="largest image area after resizing; default: the model's own setting, within the context",
    )
    sizes.add_argument(
        "--chunk",
        type=int,
        default=4,
        help="tokens decoded between two looks at the queue: small is smooth, large is fast (default %(default)s)",
    )
    sizes.add_argument(
        "--prefix-cache-mb",
        type=int,
        default=512,
        metavar="MB",
        help="memory for prompts that were read, so that one which begins alike is read from there on; 0: none "
        "(default %(default)s)",
    )
    sizes.add_argument(
        "--prefill-chunk",
        type=int,
        default=512,
        metavar="TOKENS",
        help="prompts of more than twice as many tokens are read in such pieces, between which running answers go on; "
        "0: whole (default %(default)s)",
    )
    sizes.add_argument("--mesh", metavar="AXES", help="devices, such as data=2,tensor=4; default: one")
    add_backend_arguments(sizes)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--queue",
        type=int,
        default=1024,
        help="requests that wait or decode; one more is answered 429 (default %(default)s)",
    )
    limits.add_argument("--max-images", type=int, default=16, help="images of a request (default %(default)s)")
    limits.add_argument("--max-body-mb", type=int, default=32, help="size of a request's body (default %(default)s)")
    limits.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="HOST",
        help="fetch https images from this host; may be given several times (default: none)",
    )
    limits.add_argument(
        "--allow-private-addresses", action="store_true", help="also when the host's address is not public"
    )


def run(args: argparse.Namespace) -> int:
    at_least_one(args, "slots", "context", "max_pixels", "chunk", "queue", "max_images", "max_body_mb")
    try:
        import uvicorn

        from mindvl_jax.inference.server.app import Server
    except ImportError as error:
        raise UserError(f"serving needs the package {error.name!r}: pip install 'mindvl-jax[serve]'") from None

    for name in ("prefix_cache_mb", "prefill_chunk"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 0 or more")
    programs = chosen_programs(args)
    runner, settings = make_runner(args, programs)
    _warm_up(runner, Console(stderr=True))
    server = Server(runner, settings, reload=lambda folder: _parameters(folder, args.mesh))
    print(
        f"serving {settings.model!r} at http://{args.host}:{args.port} (chat page at /, OpenAI interface at /v1)",
        flush=True,
    )
    # A client that never ends its headers or its body must not hold a connection for ever.
    config = uvicorn.Config(
        server.app(),
        host=args.host,
        port=args.port,
        log_level="warning",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=60,
        h11_max_incomplete_event_size=64 << 10,
        http="h11",
    )
    uvicorn.Server(config).run()
    return 0


def make_runner(args: argparse.Namespace, programs=None):
    """The runner and the settings that the arguments ask for; nothing is compiled yet."""
    from mindvl_jax.inference.generator import Generator
    from mindvl_jax.inference.loading import named_adapters, open_for_inference, with_adapters
    from mindvl_jax.inference.placement import mesh_of, row_groups
    from mindvl_jax.inference.prompts import vision_of
    from mindvl_jax.inference.server.metrics import Metrics
    from mindvl_jax.inference.server.runner import Runner
    from mindvl_jax.inference.server.settings import ServerSettings
    from mindvl_jax.inference.server.sizes import prompt_sizes

    alone, folders = named_adapters(args.adapter)
    opened = open_for_inference(args.weights, mesh=args.mesh, adapter=alone)
    adapted = with_adapters(opened, folders)
    vision = vision_of(opened.model)
    sees = hasattr(opened.model.config, "vision")
    # An image must leave room for its question and an answer.
    highest = (args.context * 3 // 4) * vision.pixels_per_token**2
    max_pixels = max(opened.min_pixels, min(args.max_pixels or opened.max_pixels, highest)) if sees else None
    keys = tuple(args.api_key) or tuple(filter(None, os.environ.get(KEY_VARIABLE, "").split(",")))
    settings = ServerSettings(
        model=args.name or Path(args.weights).resolve().name,
        api_keys=keys,
        queue=args.queue,
        body_bytes=args.max_body_mb << 20,
        images=args.max_images,
        max_pixels=max_pixels,
        hosts=tuple(args.allow_host),
        private_addresses=args.allow_private_addresses,
        chunk=args.chunk,
        sampling=_default_sampling(args),
    )
    if settings.model in adapted:
        raise UserError(f"--adapter {settings.model}=...: that is the model's own name; choose another, or --name")
    generator, *others = (
        Generator(
            each,
            slots=args.slots,
            context=args.context,
            programs=programs,
            prefix_bytes=args.prefix_cache_mb << 20,
            prefill_chunk=args.prefill_chunk,
        )
        for each in (opened, *adapted.values())
    )
    patches = args.context * vision.merge_unit if sees else 0
    sizes = prompt_sizes(
        context=args.context, patches=patches, images=args.max_images, rows=row_groups(mesh_of(opened.model))
    )
    adapters = dict(zip(adapted, others, strict=True))
    owners = max(1, len(set(settings.api_keys)))
    runner = Runner(generator, Metrics(), sizes, limit=args.queue, chunk=args.chunk, adapters=adapters, owners=owners)
    return runner, settings


def _default_sampling(args: argparse.Namespace) -> dict[str, float]:
    """Sampling settings of requests that give none; told on the terminal where they are the folder's."""
    from mindvl_jax.inference.folder_sampling import folder_sampling

    if args.sampling != "folder":
        return {}
    found = folder_sampling(args.weights)
    if found.settings:
        told = ", ".join(f"{name} {value:g}" for name, value in found.settings.items())
        print(f"sampling unless a request says otherwise: {told} ({found.path.name})", flush=True)
    if found.not_built:
        print(f"note: {found.path.name} also asks for {', '.join(found.not_built)}, which is not built", flush=True)
    return found.settings


def _warm_up(runner, console: Console) -> None:
    columns = (
        TextColumn("compiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        for done, total, what in runner.warm_up():
            progress.update(task, completed=done, total=total, description=what)
            if not console.is_terminal and done % 10 == 0:
                console.print(f"compiling {done} of {total}: {what}")
    console.print("compiled: no request waits for a compilation")


def _parameters(folder: str, mesh: str | None):
    from flax import nnx

    from mindvl_jax.inference.loading import open_for_inference

    return nnx.state(open_for_inference(folder, mesh=mesh).model)
