"""Write docs/man/flatmount.1 from the command line itself, so that the page cannot say anything else.

python tools/man.py           write it
python tools/man.py --check   exit 1 if it is not what would be written
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from flatmount import VERSION
from flatmount.cli.main import EXIT_CODES, parser

PAGE = Path(__file__).parents[1] / "docs" / "man" / "flatmount.1"


def roff(text: str) -> str:
    """Text as roff takes it."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join("\\&" + line if line.startswith((".", "'")) else line for line in escaped.splitlines())


def verbs_of(command: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The verbs directly below a command, in the order of its help."""
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def options_of(command: argparse.ArgumentParser) -> Iterator[str]:
    """Each argument as a roff paragraph."""
    formatter = argparse.HelpFormatter(command.prog)
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction | argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        name = formatter._format_action_invocation(action)
        yield f".TP\n.B {roff(name)}\n{roff(formatter._expand_help(action) if action.help else '')}"


def command_section(name: str, command: argparse.ArgumentParser) -> Iterator[str]:
    """One verb and the verbs below it."""
    below = list(verbs_of(command))
    if not below:
        yield f".SS {roff(name)}"
        yield roff(" ".join(command.format_usage().removeprefix("usage: ").split()))
        if command.description:
            yield f".PP\n{roff(command.description)}"
        yield from options_of(command)
        if command.epilog:
            yield f".PP\n{roff(command.epilog.strip())}"
    for verb, parser_below in below:
        yield from command_section(f"{name} {verb}", parser_below)


def page() -> str:
    """The whole page."""
    # Where the store and the cache are differs between machines; the page speaks of their defaults.
    for name in [name for name in os.environ if name.startswith(("FLATMOUNT_", "XDG_"))]:
        del os.environ[name]
    os.environ["HOME"] = "~"
    top = parser()
    parts = [
        f'.TH FLATMOUNT 1 "" "flatmount {VERSION}"',
        ".SH NAME",
        "flatmount \\- container root file systems with a constant number of mounts",
        ".SH SYNOPSIS",
        ".B flatmount",
        "[\\-\\-version] [\\-\\-debug] VERB ...",
        ".SH DESCRIPTION",
        roff(top.description or ""),
        ".SH VERBS",
    ]
    for verb, command in verbs_of(top):
        parts += command_section(verb, command)
    parts += [
        ".SH EXIT STATUS",
        roff(EXIT_CODES),
        ".SH FILES",
        ".TP\n.I /var/lib/flatmount\nthe store; another by \\-\\-root or FLATMOUNT_ROOT",
        ".TP\n.I /run/flatmount\nrecords of live mounts and workplaces; another by FLATMOUNT_RUN",
    ]
    return "\n".join(parts) + "\n"


def main() -> int:
    written = page()
    if "--check" in sys.argv[1:]:
        if PAGE.read_text(encoding="utf-8") != written:
            print(f"{PAGE.name} is not what the command line says: run tools/man.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
