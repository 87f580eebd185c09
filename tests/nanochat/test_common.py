import pytest

from nanochat.common import FlagParser, boolean


def test_boolean_flags(capsys):
    parser = FlagParser()
    parser.add_argument("--on", type=boolean, default=False)
    assert parser.parse_args(["--on=1"]).on is True and parser.parse_args(["--on",
                                                                           "0"]).on is parser.parse_args([]).on is False
    with pytest.raises(SystemExit):
        parser.parse_args(["--on=yes"])
    assert "'yes' is neither 0 nor 1" in capsys.readouterr().err
