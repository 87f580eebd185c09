"""One grammar of flags: what many commands take has one name, one form and one default."""

from collections import defaultdict

import pytest

from nanochat.common import DEVICES, FlagParser
from scripts.make_docs import commands, flags_of, parser_of

SAME = ("--checkpoint_dir", "--step", "--device", "--seed", "--out")


@pytest.fixture(scope="module")
def found() -> dict[str, list[tuple[str, object]]]:
    """Flag -> (command, its action) wherever it is."""
    found = defaultdict(list)
    for command in commands():
        for title, actions in flags_of(parser_of(command)):
            for action in actions:
                for name in action.option_strings:
                    found[name].append((f"{command} {title}", action))
    return found


@pytest.mark.parametrize("name", SAME)
def test_a_flag_of_many_commands_has_one_form(found, name):
    forms = {(a.type, tuple(a.choices or ()), a.nargs) for _, a in found[name]}
    assert len(found[name]) >= 6 and len(forms) == 1, forms


def test_defaults_are_the_same_everywhere(found):
    assert {a.default for _, a in found["--device"]} == {"auto"} and DEVICES[0] == "auto"
    assert {a.default for _, a in found["--step"]} == {"latest"}
    assert {a.default for _, a in found["--out"]} <= {None} | {a.default for c, a in found["--out"] if "make_docs" in c}
    # what trains begins at the seed of base_train, what only draws at 0, and base_eval at what trained its model
    assert {a.default for _, a in found["--seed"]} == {42, 0, "==SUPPRESS=="}


def test_what_is_shared_is_what_the_parser_offers():
    parser = FlagParser()
    parser.add_checkpoint()
    parser.add_step()
    parser.add_device()
    parser.add_seed("draws")
    parser.add_out("folder", "x")
    assert {name for a in parser._actions for name in a.option_strings} - {"-h", "--help"} == set(SAME)
