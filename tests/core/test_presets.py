"""`--mc_preset` sets defaults, of training and of sessions; a flag that is given still wins."""

from dataclasses import fields

import pytest

from mc.config import MCConfig, add_flags, core_settings, from_flags
from mc.presets import SESSION, TRAINING
from mc.session import config as session
from nanochat.common import FlagParser


def trained(*argv: str) -> MCConfig:
    parser = FlagParser()
    add_flags(parser, argv)
    return from_flags(parser.parse_args(argv))


def shown(*argv: str, **defaults) -> session.SessionConfig:
    parser = FlagParser()
    session.add_flags(parser, argv, **defaults)
    return session.from_flags(parser.parse_args(argv))


def test_presets_name_settings_that_there_are_and_change_each():
    assert TRAINING.keys() == SESSION.keys()
    for presets, settings in ((TRAINING, core_settings()), (SESSION, fields(session.SessionConfig))):
        defaults = {f.name: f.default for f in settings}
        for name, preset in presets.items():
            for setting, value in preset.items():
                assert type(value) is type(defaults[setting]), f"{name}: {setting}"
                assert value != defaults[setting], f"{name} repeats the default of {setting}"


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("form", ["--mc_preset={}", "--mc-preset {}"])
def test_a_preset_is_what_its_flags_are(name, form):
    argv = form.format(name).split()
    assert trained(*argv) == MCConfig(**TRAINING[name]) and shown(*argv) == session.SessionConfig(**SESSION[name])


def test_what_is_given_wins_and_without_a_preset_nothing_changes():
    assert trained("--mc_lens_keys=2", "--mc_preset=code") == MCConfig(**TRAINING["code"] | {"lens_keys": 2})
    assert shown("--mc_preset=code", "--mc_interval=7") == session.SessionConfig(**SESSION["code"] | {"interval": 7})
    assert shown("--mc_preset=code", budget=256).budget == 256, "a command's own default"
    assert trained() == MCConfig() and shown() == session.SessionConfig()


def test_a_preset_that_is_none_is_refused(capsys):
    for parse in (trained, shown):
        with pytest.raises(SystemExit):
            parse("--mc_preset=poetry")
        assert "'poetry'" in (error := capsys.readouterr().err) and error.count("\n") == 1
