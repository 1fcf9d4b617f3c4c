"""The arguments of `dean-interp`, which tyro reads. A word without a place is told the options of its command."""

import io
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from dean_interp.cli.help_examples import after_help, command_name, nearest_command
from dean_interp.cli.steps import Command
from dean_interp.cli.terminal import colours_where_wanted
from dean_interp.errors import InputError, did_you_mean

# `--json` and `--debug` may stand after the step, and no switch has a twin `--no-...`.
_CONFIG = (tyro.conf.CascadeSubcommandArgs, tyro.conf.FlagCreatePairsOff)


def parsed(arguments: Sequence[str]) -> Command:
    """The command that these arguments mean.

    Raises `InputError` where there is an option or a word too many. Prints help and other errors, and raises
    `SystemExit`, where they mean no command.
    """
    try:
        with colours_where_wanted():
            command, unknown = read_arguments(arguments)
    except SystemExit as leaving:
        if leaving.code == 0 and {"-h", "--help"} & {*arguments}:
            print(after_help(arguments))  # noqa: T201 - the end of the help
        elif leaving.code and (hint := nearest_command(arguments)):
            sys.stderr.write(f"{hint}\n")
        raise
    if unknown:
        raise InputError(_too_many(unknown[0], command_name(arguments)))
    return command


def read_arguments(arguments: Sequence[str]) -> tuple[Command, list[str]]:
    """What tyro makes of these arguments, and those that have no place in the command."""
    return tyro.cli(
        Command,
        prog="dean-interp",
        args=arguments,
        config=_CONFIG,
        registry=_registry(),
        return_unknown_args=True,
    )


def as_typed(message: str, arguments: Sequence[str]) -> str:
    """A message with the setting that it begins with called as the command line calls it: `--n-score must be ...`."""
    setting, _, rest = message.partition(" ")
    option = f"--{setting.replace('_', '-')}"
    if rest.startswith("must ") and option in _options_of(command_name(arguments)):
        return f"{option} {rest}"
    return message


def _too_many(word: str, command: str) -> str:
    """What is wrong with a word that has no place in a command, and what was perhaps meant."""
    options = _options_of(command)
    see = f"see dean-interp {command} --help"
    if word.startswith("-"):
        given, _, _ = word.partition("=")
        return f"{command!r} has no option {given}{did_you_mean(given, options)}: {see}"
    example = f", such as --out {word}" if "--out" in options else ""
    return f"{command!r} has no place for {word!r}; a value follows the name of its option{example}: {see}"


def _options_of(command: str) -> set[str]:
    """The options that the help of a command names."""
    # tyro asks standard output for its encoding.
    shown = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with redirect_stdout(shown), suppress(SystemExit):
        read_arguments([*command.split(), "--help"])
    shown.seek(0)
    return {*re.findall(r"^\W*(--[a-z][a-z-]*)", shown.read(), re.MULTILINE)}


def _registry() -> ConstructorRegistry:
    """The rules of tyro, with the help of each option on one line.

    tyro keeps the line ends of a docstring that is indented, and a shell offers each line of a help text as a word.
    """
    registry = ConstructorRegistry()
    is_asking = False

    @registry.struct_rule
    def with_help_on_one_line(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal is_asking
        # tyro's rules are asked through this one, which then stands back.
        if is_asking:
            return None
        is_asking = True
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            is_asking = False
        if not isinstance(spec, StructConstructorSpec):
            return None
        return replace(spec, fields=tuple(map(_with_plain_help, spec.fields)))

    return registry


def _with_plain_help(option: StructFieldSpec) -> StructFieldSpec:
    """The option with its help on one line. Where no value is the default, nothing is named as one."""
    of: Any = option.type
    if option.default == ():
        of = Annotated[of, tyro.conf.arg(help_behavior_hint="(default: none)")]
    return replace(option, type=of, helptext=_on_one_line(option.helptext))


def _on_one_line(helptext: str | Callable[[], str | None] | None) -> Callable[[], str | None]:
    """The text with its lines joined. It is made when it is asked for, since tyro reads source code for it."""

    def joined() -> str | None:
        text = helptext() if callable(helptext) else helptext
        return None if text is None else " ".join(text.split())

    return joined
