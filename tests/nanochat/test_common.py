import pytest

from nanochat.common import FlagParser, flag_type


def test_boolean_flags(capsys):
    parser = FlagParser()
    parser.add_switch("--on", False, "")
    assert parser.parse_args(["--on=1"]).on is True and parser.parse_args(["--on",
                                                                           "0"]).on is parser.parse_args([]).on is False
    with pytest.raises(SystemExit):
        parser.parse_args(["--on=yes"])
    assert "'yes' is neither 0 nor 1" in capsys.readouterr().err


def test_a_flag_is_read_as_its_default_is():
    assert flag_type(True)("0") is False and flag_type(1)("0") == 0 and flag_type(0.5)("1") == 1.0
