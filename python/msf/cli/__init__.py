"""The command ``msf``: its arguments, one of ``commands``, and a line for every failure."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn, TextIO

from ..files import printable
from ..progress import say
from . import signals
from .commands import COMMANDS
from .errors import Failure, explain
from .outputs import to_json

CLOSED = "the terminal was closed", 130  # as after SIGHUP, which raises KeyboardInterrupt
LIBRARY = r"^(sample|evaluation): "  # what begins its lines, as the command begins ours


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)}; see {self.prog} --help\n")


def process() -> int:
    """Run ``main`` as all that this process does. Python's own end, too, is then undisturbed by
    signals: torch's part of it ends in a traceback."""
    signals.interrupt()
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # stderr does so by itself
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main()
    except KeyboardInterrupt:  # pressed once more, while the line about the first was printed
        return 130
    finally:
        signals.ignore()


def _open_closed_streams() -> None:
    """Let what the caller has closed of stdin, stdout and stderr lead nowhere. Else the next file
    opened, as one that is written, gets its number, and what libraries print goes into it."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status is 0, 2 for bad input, 130 when interrupted, else 1."""
    args = _parser().parse_args(argv)
    command = COMMANDS[args.command]
    # For OpenMP, which reads it with the import of torch: threads that spin while they wait for
    # others made two threads on two busy cores 4 to 10 times slower than one.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of files that our line is about, or none
    try:
        document = command.run(args)
        if document:
            with suppress(BrokenPipeError):  # `msf flops | head -1` has simply seen enough
                _tell(to_json(document) if args.json else command.text(document), sys.stdout)
        return 1 if document.get("problems") else 0
    except (Exception, KeyboardInterrupt) as error:
        signals.heard()
        ended = isinstance(error, OSError) and signals.terminal_is_closed()
        message, status = CLOSED if ended else explain(error)
        message = printable(re.sub(LIBRARY, "", message))
        if message:
            with suppress(OSError, Failure):  # nobody reads stderr any more
                _tell(f"msf {args.command}: {message}", sys.stderr)
        return status


def _parser() -> Parser:
    parser = Parser(
        prog="msf", description="Multi-scale latent factorization of images (arXiv 2501.13349)"
    )
    parser.add_argument("--version", action="version", version=f"msf {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        about = module.__doc__ or ""  # python -OO leaves it out
        command = commands.add_parser(
            name,
            help=about.partition("\n")[0].rstrip("."),
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "--json", action="store_true", help="print one JSON document instead of text"
        )
        module.add_arguments(command)
    return parser


def _version() -> str:
    try:
        return version("msf-diffusion")
    except PackageNotFoundError:
        return "(not installed)"


def _tell(text: str, file: TextIO) -> None:
    try:
        say(text, file)
    except OSError:
        ended = signals.terminal_is_closed()
        # Python flushes once more at its end; without this it would fail there, with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
        if ended:
            raise Failure(*CLOSED) from None
        raise
