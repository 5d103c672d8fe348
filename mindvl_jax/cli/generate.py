"""`mindvl generate`: answer prompts about images, one from the command line or many from a file."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mindvl_jax.cli import common
from mindvl_jax.cli.backend import add_backend_arguments, chosen_programs
from mindvl_jax.core.errors import UserError, at_least_one, for_terminal
from mindvl_jax.core.progress import LogConsole, counting

EPILOG = common.examples(
    'mindvl generate --weights runs/mine --image cat.png --prompt "What is this?"',
    "mindvl generate --weights runs/mine --requests questions.jsonl --out answers.jsonl --batch 32",
    "mindvl generate --weights runs/quickstart --words",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", required=True, metavar="DIR", help="one of our runs or checkpoints, or a Hugging Face folder"
    )
    _adapter_argument(parser)
    asked = parser.add_argument_group("what to answer")
    asked.add_argument(
        "--prompt",
        metavar="TEXT",
        help="the question; <image> in it marks an image's place (\\\\<image> is text), otherwise images come first",
    )
    asked.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image; may be given several times"
    )
    asked.add_argument(
        "--video", action="append", default=[], metavar="FILE", help="a video; may be given several times"
    )
    asked.add_argument("--system", metavar="TEXT", help="system turn; with --requests, of the lines that have none")
    asked.add_argument(
        "--requests",
        metavar="JSONL",
        help="many requests: lines with prompt or messages, and id, images, videos and sampling settings as "
        "wanted ('-': standard input)",
    )
    _choice_arguments(parser)
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument(
        "--min-pixels", type=int, help="smallest image area after resizing; default: the model's own setting"
    )
    sizes.add_argument(
        "--max-pixels", type=int, help="largest image area after resizing; default: the model's own setting"
    )
    sizes.add_argument("--batch", type=int, default=16, help="answers that decode together")
    sizes.add_argument("--mesh", metavar="AXES", help="devices, such as data=2,tensor=4; default: one")
    add_backend_arguments(sizes)
    sizes.add_argument("--context", type=int, help="longest prompt plus answer; default: what the requests need")
    _output_arguments(parser)


def _adapter_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="PEFT folder (LoRA, DoRA) to use on top of the weights. With names it may be given several times: "
        "--prompt is answered by the weights alone and by each, lines of --requests choose by `adapter`",
    )


def _choice_arguments(parser: argparse.ArgumentParser) -> None:
    chosen = parser.add_argument_group("how tokens are chosen")
    chosen.add_argument("--max-new-tokens", type=int, default=128)
    chosen.add_argument(
        "--sampling",
        choices=("greedy", "folder"),
        default="greedy",
        help="what holds where no option below is given: greedy decoding, or the folder's generation_config.json",
    )
    chosen.add_argument("--temperature", type=float, help="0 is greedy")
    chosen.add_argument("--top-k", type=int, help="0: no limit")
    chosen.add_argument("--top-p", type=float)
    chosen.add_argument("--repetition-penalty", type=float, help="1 changes nothing")
    chosen.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before this text; may be given several times",
    )
    chosen.add_argument("--seed", type=int, default=None, help="the same seed gives the same answers")
    chosen.add_argument("--n", type=int, default=1, help="answers for each prompt")
    chosen.add_argument(
        "--speculative",
        action="store_true",
        help="draft tokens ahead with the model's MTP head (DeepSeek-V3): the same greedy tokens in fewer passes",
    )


def _output_arguments(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="JSONL", help="write answers with tokens' log-probabilities to a file")
    output.add_argument(
        "--words",
        action="store_true",
        help="list the tokens that the model knows and end; of a compact vocabulary these are all its words",
    )
    output.add_argument(
        "--json", action="store_true", help="print one JSON object an answer, with tokens and log-probabilities"
    )
    output.add_argument("--logprobs", action="store_true", help="print each answer's mean log-probability")
    output.add_argument("--no-stream", action="store_true", help="print a single answer only when it is complete")


def run(args: argparse.Namespace) -> int:
    common.load_slow("mindvl_jax.inference.generator", "mindvl_jax.inference.loading")
    from mindvl_jax.inference.generator import Generator
    from mindvl_jax.inference.loading import named_adapters, open_for_inference, with_adapters

    at_least_one(args, "batch", "context", "min_pixels", "max_pixels")
    if args.words:
        return _words(args.weights)
    alone, folders = named_adapters(args.adapter)
    requests = _for_adapters(_requests(args), folders, all_of_them=args.prompt is not None)
    programs = _programs(args)
    with common.busy(f"reading {args.weights}"):
        opened = open_for_inference(args.weights, mesh=args.mesh, adapter=alone)
        models = {None: opened, **with_adapters(opened, folders)}

    def generator(adapter: str | None) -> Generator:
        slots = sum(request.sampling.n for request in requests if request.adapter == adapter)
        return Generator(models[adapter], slots=min(args.batch, slots), context=args.context, programs=programs)

    generators = {adapter: generator(adapter) for adapter in dict.fromkeys(request.adapter for request in requests)}
    single = args.prompt is not None and args.n == 1
    if single and not folders and not args.no_stream and not args.out and not args.json:
        answers = _streamed(generators[None], requests)
    else:
        started = time.perf_counter()
        total, done = sum(request.sampling.n for request in requests), itertools.count(1)
        with counting(LogConsole(stderr=True, stamp=False)) as show:
            show(0, total, "answers")
            answers = _by_adapter(
                generators, requests, skip_errors=not single, on_answer=lambda *_: show(next(done), total, "answers")
            )
        seconds = time.perf_counter() - started
        if args.out:
            _write(Path(args.out), requests, answers)
            tokens = sum(len(answer.tokens) for answer in answers)
            print(f"{len(answers)} answers, {tokens} tokens in {seconds:.1f} s (compilation included) -> {args.out}")
        elif args.json:
            for row in _rows(answers):
                print(json.dumps(row, ensure_ascii=False))
        else:
            for answer in answers:
                label = (answer.id + (f" [{answer.sample}]" if args.n > 1 else "")).strip()
                said = f"error: {answer.error}" if answer.error else answer.text
                print(for_terminal((f"{label}: " if label else "") + said))
    if args.speculative:
        drafted, accepted = (sum(each.drafts[index] for each in generators.values()) for index in (0, 1))
        print(f"{accepted} of {drafted} drafted tokens accepted", file=sys.stderr)
    if args.logprobs:
        for answer in answers:
            mean = sum(answer.logprobs) / max(1, len(answer.logprobs))
            print(
                f"{answer.id or 'answer'}[{answer.sample}]: mean log-probability {mean:.4f} over "
                f"{len(answer.logprobs)} tokens, ended by {answer.finish}",
                file=sys.stderr,
            )
    return 1 if any(answer.error for answer in answers) else 0


def _streamed(generator, requests):
    """Print the text of one answer as it comes; return the answer in a list."""
    answers, pieces = [], generator.stream(requests)
    with common.busy("reading the prompt; programs that are new are compiled"):
        first = next(pieces)
    for piece in itertools.chain([first], pieces):
        print(for_terminal(piece.text), end="", flush=True)
        if piece.answer:
            answers.append(piece.answer)
    print()
    return answers


def _for_adapters(requests, folders, *, all_of_them: bool):
    """Give each request its adapter: the one that it names, or, for a prompt, none and every one in turn.

    Raises:
      UserError: a request names an adapter that was not given.
    """
    if all_of_them and folders:
        names = [None, *folders]
        return [
            dataclasses.replace(request, adapter=name, id=name or "weights") for request in requests for name in names
        ]
    if lost := {request.adapter for request in requests} - {None, *folders}:
        known = ", ".join(map(repr, folders)) or "none"
        raise UserError(f"a request names the adapter {min(lost)!r}; given by --adapter NAME=DIR: {known}")
    return requests


def _by_adapter(generators, requests, **options):
    """Answer requests with the generators of their adapters; the answers keep the requests' order."""
    found = {}
    for adapter, generator in generators.items():
        numbers = [number for number, request in enumerate(requests) if request.adapter == adapter]
        answers = iter(generator.generate([requests[number] for number in numbers], **options))
        for number in numbers:
            found[number] = [next(answers) for _ in range(requests[number].sampling.n)]
    return [answer for number in sorted(found) for answer in found[number]]


def _programs(args: argparse.Namespace):
    """Choose the device programs for `Generator(programs=...)`.

    Raises:
      UserError: --speculative beside a mesh or npu_bridge.
    """
    programs = chosen_programs(args)
    if not args.speculative:
        return programs
    if programs is not None or args.mesh:
        raise UserError("--speculative runs on one device by XLA; leave --mesh and --backend npu_bridge out")
    from mindvl_jax.inference import speculative

    return speculative


def _requests(args: argparse.Namespace):
    from mindvl_jax.inference.folder_sampling import sampling_for
    from mindvl_jax.inference.request import Request, Sampling, with_system
    from mindvl_jax.inference.requests_file import read_requests

    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    common = dict(
        max_new_tokens=args.max_new_tokens,
        **sampling_for(args.weights, args.sampling, given, lambda line: print(line, file=sys.stderr)),
        stop=tuple(args.stop),
        seed=args.seed,
        n=args.n,
    )
    pixels = dict(min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    if (args.prompt is None) == (args.requests is None):
        raise UserError("give either --prompt TEXT (with --image FILE as wanted) or --requests FILE")
    if args.prompt is not None:
        for path in (*args.image, *args.video):
            if not Path(path).is_file():
                raise UserError(f"there is no file {path!r}; --image and --video want paths of existing files")
        request = Request.from_prompt(
            args.prompt, tuple(args.image), videos=tuple(args.video), sampling=Sampling(**common), **pixels
        )
        return [with_system(request, args.system) if args.system else request]
    if args.image or args.video:
        raise UserError("--image and --video go with --prompt; in a file of requests each line names its own")
    requests = read_requests(args.requests, common, pixels)
    return [with_system(request, args.system) for request in requests] if args.system else requests


def _words(weights: str) -> int:
    """Print every token of the model's vocabulary, one a line, as text."""
    from mindvl_jax.config.schema import TokenizerConfig
    from mindvl_jax.data.text.tokenizer import load_tokenizer
    from mindvl_jax.weights.described import described

    sections = described(weights)
    if "tokenizer" not in sections:
        raise UserError(f"{weights} has no tokenizer.json")
    tokenizer = load_tokenizer(TokenizerConfig.model_validate(sections["tokenizer"]))
    for token in range(tokenizer.vocab_size):
        print(json.dumps(tokenizer.decode([token]), ensure_ascii=False))
    return 0


def _rows(answers) -> Iterator[dict]:
    for answer in answers:
        row = {
            "id": answer.id,
            "sample": answer.sample,
            "text": answer.text,
            "finish": answer.finish,
            "tokens": list(answer.tokens),
            "logprobs": [round(value, 6) for value in answer.logprobs],
            "prompt_tokens": answer.prompt_tokens,
        }
        yield row | ({"error": answer.error} if answer.error else {})


def _write(path: Path, requests, answers) -> None:
    from mindvl_jax.core.files import write_jsonl

    write_jsonl(path, _rows(answers))
