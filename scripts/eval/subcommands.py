"""A command of several sub-commands, each a module with `add_flags(parser)` and `run(args)` whose
docstring begins with its help.

Only the module that the command line names is imported: a start costs what is asked for, and an extra package that one
sub-command needs is missed by that one alone. All of them are imported for help, for a name that is
none, and for the table of flags.
"""

import argparse
import sys
from importlib import import_module
from types import ModuleType

from nanochat.common import FlagParser, UserError


class Subcommands:
    """name: of the command's module; description: its docstring; modules: name of a sub-command -> its module's."""

    def __init__(self, name: str, description: str, modules: dict[str, str]):
        self.name, self.description, self.modules = name, description.split("\n\n")[0], modules

    def make_parser(self, only: str = "") -> FlagParser:
        """With all sub-commands, or the one that is named."""
        parser = FlagParser(prog=f"python -m {self.name}", description=self.description)
        kinds = parser.add_subparsers(dest="command", required=True, parser_class=FlagParser,
                                      metavar="|".join(self.modules))
        for name in [only] if only else self.modules:
            module = import_module(self.modules[name])
            title = " ".join(module.__doc__.split("\n\n")[0].split())
            module.add_flags(kinds.add_parser(name, help=title, description=title))
        return parser

    def main(self) -> None:
        asked = sys.argv[1] if len(sys.argv) > 1 else ""
        args = self.make_parser(asked if asked in self.modules else "").parse_args()
        import_module(self.modules[args.command]).run(args)


def call(module: ModuleType, flags: dict[str, object]) -> None:
    """What a sub-command does with these flags, in this process."""
    parser = FlagParser(description=module.__doc__)
    module.add_flags(parser)
    module.run(parser.parse_args([f"--{name}={value}" for name, value in flags.items()]))


def check_least(args: argparse.Namespace, **least: int) -> None:
    """UserError for a flag below its least value."""
    for name, low in least.items():
        if getattr(args, name) < low:
            raise UserError(f"--{name}={getattr(args, name)} must be at least {low}")
