"""`mindvl completion`: commands and options for the Tab key of bash, zsh and fish."""

from __future__ import annotations

import argparse
import importlib

from mindvl_jax.cli import common

EPILOG = common.examples(
    'eval "$(mindvl completion bash)"', "mindvl completion fish > ~/.config/fish/completions/mindvl.fish"
)

_BASH = """_mindvl() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" command="${{COMP_WORDS[1]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then words="{commands}"; else
    case "$command" in
{cases}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  if [ ${{#COMPREPLY[@]}} -eq 0 ]; then COMPREPLY=($(compgen -f -- "$word")); fi
}}
complete -o filenames -F _mindvl mindvl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def run(args: argparse.Namespace) -> int:
    print(script(args.shell), end="")
    return 0


def script(shell: str) -> str:
    """Return the completion script: no Python starts while completing."""
    words = {name: _words(name) for name in _commands()}
    if shell == "fish":
        lines = [f"complete -c mindvl -f -n __fish_use_subcommand -a {name}" for name in words]
        for name, listed in words.items():
            lines += [
                f"complete -c mindvl -n '__fish_seen_subcommand_from {name}' "
                + (f"-l {word[2:]}" if word.startswith("--") else f"-a {word}")
                for word in listed
            ]
        return "\n".join(lines) + "\n"
    cases = "\n".join(f'      {name}) words="{" ".join(listed)}" ;;' for name, listed in words.items())
    body = _BASH.format(commands=" ".join(words), cases=cases)
    return body if shell == "bash" else "autoload -U +X bashcompinit && bashcompinit\n" + body


def _commands() -> dict:
    from mindvl_jax.cli.main import COMMANDS

    return COMMANDS


def _words(name: str) -> list[str]:
    """Options of a command, and those of its actions."""
    parser = argparse.ArgumentParser()
    importlib.import_module(_commands()[name][0]).add_arguments(parser)
    return list(dict.fromkeys(_options(parser)))


def _options(parser: argparse.ArgumentParser):
    for action in parser._actions:
        yield from (option for option in action.option_strings if option.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for inner, subparser in action.choices.items():
                yield inner
                yield from _options(subparser)
        elif not action.option_strings and action.choices:
            yield from map(str, action.choices)
