"""Secrets of the environment are in nothing that a run prints, records or sends, and still reach those they are for."""

import base64
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common import UserError, run_main
from nanochat.redact import redacted, scrubbed, userinfo
from nanochat.telemetry.opening import open_recorder
from nanochat.telemetry.sinks import WandbSink
from nanochat.telemetry.tracing import Trace

SECRET = "s3cret"  # part of every planted secret


@pytest.mark.parametrize("url, shown", [
    ("http://127.0.0.1:4318", "http://127.0.0.1:4318"),
    ("https://host/otlp/v1/metrics", "https://host/otlp/v1/metrics"),
    ("http://alice:s3cret@host:4318", "http://***@host:4318"), ("http://s3cret@host", "http://***@host"),
    ("alice:s3cret@host:4317", "***@host:4317"),
    ("http://alice:s3cret%40x@host/v1", "http://***@host/v1"),
    ("http://alice:s3/c@ret?#s3cret@host/v1", "http://***@host/v1"),
    ("http://host/v1?api_key=s3cret", "http://host/v1?***"), ("http://host/v1#s3cret", "http://host/v1?***"),
    ("http://host:port with blanks s3@host", "http://***@host"), ("", "")])
def test_an_address_to_be_shown(url, shown):
    assert redacted(url) == shown == redacted(shown)


@given(st.text("aZ9-_.~!$&'()*+,;=:@/?#% ", min_size=1, max_size=12))
def test_whatever_a_password_is_made_of(password):
    shown = redacted(f"http://alice:X{password}X@host:4318/v1")
    assert shown == "http://***@host:4318/v1"


@pytest.mark.parametrize("url, login, rest", [
    ("http://alice:p%40ss@host:4317", "alice:p@ss", "http://host:4317"),
    ("alice:pw@host:4317", "alice:pw", "host:4317"),
    ("http://host/a@b", "", "http://host/a@b"), ("host:4317", "", "host:4317")])
def test_user_and_password_of_an_address(url, login, rest):
    assert userinfo(url) == (login, rest)


@pytest.mark.parametrize("name, value, text", [
    ("WANDB_API_KEY", "s3cretkey", "key s3cretkey is wrong"), ("HF_TOKEN", "s3cret", "401 for s3cret"),
    ("AWS_SECRET_ACCESS_KEY", "s3cret", "s3cret"),
    ("OTEL_EXPORTER_OTLP_HEADERS", "x-key=s3cret,y=1", "header x-key: s3cret"),
    ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "authorization=Basic%20s3cret", "sent s3cret"),
    ("OTEL_EXPORTER_OTLP_HEADERS", "s3cret pair", "Header format invalid: s3cret pair"),
    ("OTEL_RESOURCE_ATTRIBUTES", "s3cret", "Invalid pair s3cret"),
    ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://a:s3cret%21@h", "login a, s3cret!"),
    ("OTEL_EXPORTER_OTLP_ENDPOINT", "a:s3cret@h:1", "dns:///a s3cret"),
    ("HTTPS_PROXY", "http://u:s3cret@proxy:1", "proxy refuses u s3cret"),
    ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://h/?k=s3cret", "s3cret"),
    ("X", "", "Max retries exceeded with url: /v1?api_key=s3cret&b=s3cret (Caused by"),
    ("X", "", "Failed to parse: http://a:s3cret@h:port/v1"),
    ("X", "", "{'Authorization': 'Basic s3cret'}")])
def test_a_message_without_its_secrets(name, value, text, monkeypatch):
    monkeypatch.setenv(name, value)
    assert SECRET not in scrubbed(text) and "***" in scrubbed(text)


def test_messages_without_secrets_stay_as_they_are(monkeypatch):
    for name, value in dict(TOKENIZERS_PARALLELISM="false", OTEL_EXPORTER_OTLP_CLIENT_KEY="/etc/key.pem", HF_TOKEN="",
                            X_TOKEN="a").items():
        monkeypatch.setenv(name, value)
    for text in ("cannot read /etc/key.pem: false", "--data=/a?b@c: no such directory", "basic training, mail a@b.c",
                 "must begin with http:// or https://"):
        assert scrubbed(text) == text


@pytest.mark.parametrize("error, code",
                         [(UserError("cannot reach http://a:s3cret@h"), 2),
                          (ValueError("cannot reach http://a:s3cret@h"), 1)])
def test_last_words(error, code, capsys):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        run_main(main)
    err = capsys.readouterr().err
    assert left.value.code == code and SECRET not in err and "http://***@h" in err


# -- a run ------------------------------------------------------------------------------------------------------------


PLANTED = {
    "WANDB_MODE": "offline", "WANDB_BASE_URL": "http://u:s3cret-a@127.0.0.1:9", "WANDB_API_KEY": "s3cret-b" + "0" * 32,
    "HF_TOKEN": "s3cret-c",
    "HTTPS_PROXY": "http://u:s3cret-d@127.0.0.1:9", "OTEL_EXPORTER_OTLP_HEADERS": "x-key=s3cret-e,s3cret-f",
    "OTEL_RESOURCE_ATTRIBUTES": "s3cret-g",
    "WANDB_ERROR_REPORTING": "false"}  # fmt: skip


@pytest.fixture
def planted(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("OTEL_", "WANDB_"))]:
        monkeypatch.delenv(name)
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))


def record(folder: Path, run: str = "") -> None:
    with open_recorder(folder, run=run, config={"depth": 1}, total_steps=1) as recorder:
        recorder.trace(Trace("train.step", torch.device("cpu"), keep=True, step=1))
        recorder.record("train.loss", 1.0)
        recorder.flush(1)


def leaks(folder: Path, printed: str) -> list[str]:
    """Where a planted secret is: lines that were printed, and files."""
    found = [line for line in printed.splitlines() if SECRET in line]
    return found + [str(path) for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
@pytest.mark.parametrize("of", ["", "METRICS_", "TRACES_"])
def test_what_a_collector_is_sent_and_what_is_said_of_it(protocol, of, planted, tmp_path, monkeypatch, capfd):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc")
    from otlp_receiver import Receiver

    with Receiver(protocol) as receiver:
        path = "" if protocol == "grpc" or not of else f"/v1/{of[:-1].lower()}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{of}ENDPOINT",
                           f"http://al%40ice:s3cret%2Fpw@127.0.0.1:{receiver.port}{path}")
        record(tmp_path)
    printed = "".join(capfd.readouterr())
    assert "http://***@127.0.0.1" in printed and leaks(tmp_path, printed) == []
    wanted = {"METRICS_": ["metrics"], "TRACES_": ["traces"]}.get(of, ["metrics", "traces"])
    assert [signal for signal in ("metrics", "traces") if receiver.requests[signal]] == wanted
    for headers in receiver.headers:
        assert headers["authorization"] == f"Basic {base64.b64encode(b'al@ice:s3cret/pw').decode()}" and headers["x-key"] == "s3cret-e"  # noqa: E501
    assert not any(SECRET in str(request) for signal in wanted for request in receiver.requests[signal])


@pytest.mark.parametrize("endpoint", [
    "http://alice:s3cret-h@127.0.0.1:9", "http://127.0.0.1:9/?api_key=s3cret-h", "http://alice:s3cret/h@127.0.0.1:9",
    "http://alice:s3cret-h@[::1",
    "http://alice:s3cret-h@no.such.host.invalid:1"])
@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_collector_that_cannot_be_reached(protocol, endpoint, planted, tmp_path, monkeypatch, capfd):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc")
    from scripts import mc_bench

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.3")
    monkeypatch.setattr(sys, "argv", ["mc_bench", "otlp"])
    with pytest.raises(SystemExit):
        run_main(mc_bench.main)
    printed = "".join(capfd.readouterr())
    assert printed and leaks(tmp_path, printed) == []


@pytest.mark.parametrize("protocol, endpoint",
                         [("http/protobuf", "alice:s3cret-h@127.0.0.1:9"), ("http/protobuf", "s3cret@h")])
def test_an_endpoint_that_is_refused(protocol, endpoint, planted, monkeypatch, tmp_path):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    with pytest.raises(UserError, match="must begin with") as refused:
        record(tmp_path)
    assert SECRET not in str(refused.value)


def test_weights_and_biases_offline(planted, tmp_path, capfd):
    pytest.importorskip("wandb")
    record(tmp_path, run="trial")
    assert list(tmp_path.rglob("*.wandb")) and leaks(tmp_path, "".join(capfd.readouterr())) == []


def test_weights_and_biases_that_complains(planted, tmp_path, monkeypatch, capfd):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")

    def unreachable(**kwargs):
        raise wandb.errors.CommError(f"cannot reach {PLANTED['WANDB_BASE_URL']} with {PLANTED['WANDB_API_KEY']}")

    monkeypatch.setattr(wandb, "login", unreachable)
    WandbSink("trial", tmp_path, {}).close()
    printed = "".join(capfd.readouterr())
    assert "cannot reach http://***@127.0.0.1:9 with ***" in printed and leaks(tmp_path, printed) == []
