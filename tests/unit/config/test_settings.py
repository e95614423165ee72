"""Settings: what is right is taken, what is wrong is named in one line, what is secret is never shown."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from config.settings import Settings, SettingsError, load, unknown_variables
from scripts.tools import settings_doc

SECRET = "a-secret-that-nobody-may-ever-see-in-a-log"
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("RELAY_"):
            monkeypatch.delenv(name)


def wrong(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load()
    assert caught.value.__cause__ is None
    return str(caught.value)


def test_nothing_has_to_be_set() -> None:
    settings = load()
    assert settings.port == 8080
    assert settings.host == "127.0.0.1"
    assert settings.mongo_uri is None
    assert settings.jwt_secret is None
    assert settings.message_ttl_days == 30


def test_limits_are_on_from_the_start() -> None:
    found = Settings()
    assert (found.message_rate, found.message_burst) == (500, 2000)
    assert (found.rate_login_address, found.rate_login_account) == ("20/minute", "10/minute")
    assert (found.rate_register, found.rate_connect) == ("20/minute", "1000/10 seconds")
    off = [
        name for name in Settings.model_fields if name.startswith("rate_") and getattr(found, name) == "off"
    ]
    assert off == []


def test_defaults_are_valid_values() -> None:
    values = {name: field.default for name, field in Settings.model_fields.items()}
    assert Settings(**values) == load()


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("RELAY_PORT", "0", "port", 0),
        ("RELAY_DATA_DIR", "some/where", "data_dir", Path("some/where")),
        ("RELAY_LOG_FORMAT", "json", "log_format", "json"),
        ("RELAY_MONGO_URI", "mongodb://h/?replicaSet=r", "mongo_uri", SecretStr("mongodb://h/?replicaSet=r")),
        ("RELAY_MONGO_URI", "mongodb+srv://h", "mongo_uri", SecretStr("mongodb+srv://h")),
        ("RELAY_REDIS_URL", "rediss://h:6379", "redis_url", SecretStr("rediss://h:6379")),
        ("RELAY_TRUSTED_PROXIES", "10.0.0.0/8, ::1", "trusted_proxies", "10.0.0.0/8, ::1"),
        ("RELAY_RATE_CONNECT", "1000/10 seconds", "rate_connect", "1000/10 seconds"),
        ("RELAY_RATE_CONNECT", "off", "rate_connect", "off"),
        ("RELAY_AUTO_PROVISION", "false", "auto_provision", False),
        ("RELAY_MESSAGE_TTL_DAYS", "0.5", "message_ttl_days", 0.5),
        ("RELAY_JWT_SECRET", "x" * 32, "jwt_secret", SecretStr("x" * 32)),
        ("RELAY_DRAIN_SECONDS", "0", "drain_seconds", 0),
        ("relay_window", "7", "window", 7),
    ],
)
def test_a_variable_sets_its_field(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, field: str, expected: Any
) -> None:
    monkeypatch.setenv(name, value)
    assert getattr(load(), field) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RELAY_PORT", "70000"),
        ("RELAY_PORT", "-1"),
        ("RELAY_PORT", "http"),
        ("RELAY_PORT", ""),
        ("RELAY_WORKERS", "0"),
        ("RELAY_WORKERS", "two"),
        ("RELAY_WORKER_PORT", "70000"),
        ("RELAY_LOG_FORMAT", "xml"),
        ("RELAY_LOG_LEVEL", "loud"),
        ("RELAY_MONGO_DATABASE", "a b"),
        ("RELAY_MONGO_DATABASE", ""),
        ("RELAY_MONGO_DATABASE", "x" * 39),
        ("RELAY_EMBEDDED_CACHE_GB", "0.1"),
        ("RELAY_JWT_AUDIENCE", ""),
        ("RELAY_AUTO_PROVISION", "maybe"),
        ("RELAY_TRUSTED_PROXIES", "10.0.0.0/33"),
        ("RELAY_TRUSTED_PROXIES", "10.0.0.1 10.0.0.2"),
        ("RELAY_RATE_SEARCH", "often"),
        ("RELAY_RATE_SEARCH", "0/minute"),
        ("RELAY_RATE_SEARCH", "5/fortnight"),
        ("RELAY_MESSAGE_RATE", "-1"),
        ("RELAY_MESSAGE_RATE", "nan"),
        ("RELAY_MESSAGE_BURST", "0"),
        ("RELAY_MESSAGE_TTL_DAYS", "0"),
        ("RELAY_MESSAGE_TTL_DAYS", "366"),
        ("RELAY_MESSAGE_TTL_DAYS", "nan"),
        ("RELAY_FATE_HOURS", "-1"),
        ("RELAY_FATE_HOURS", "nan"),
        ("RELAY_DEVICE_INACTIVE_DAYS", "0"),
        ("RELAY_MAX_FRAME_BYTES", "10"),
        ("RELAY_MAX_BODY_BYTES", "0"),
        ("RELAY_INLINE_RECIPIENTS", "0"),
        ("RELAY_WINDOW", "0"),
        ("RELAY_WINDOW", "10001"),
        ("RELAY_WINDOW_BYTES", "1"),
        ("RELAY_OUTBOX_BYTES", "1"),
        ("RELAY_MAX_CONNECTIONS", "0"),
        ("RELAY_HEARTBEAT_SECONDS", "0"),
        ("RELAY_HEARTBEAT_SECONDS", "inf"),
        ("RELAY_HEARTBEAT_SECONDS", "nan"),
        ("RELAY_AUTH_SECONDS", "-5"),
        ("RELAY_COMMIT_MESSAGES", "0"),
        ("RELAY_COMMIT_BYTES", "1"),
        ("RELAY_COMMITS_IN_FLIGHT", "17"),
        ("RELAY_QUEUE_MESSAGES", "0"),
        ("RELAY_QUEUE_BYTES", "0"),
        ("RELAY_COMMIT_TIMEOUT_SECONDS", "0"),
        ("RELAY_SEND_DEADLINE_SECONDS", "soon"),
        ("RELAY_SWEEP_SECONDS", "0"),
        ("RELAY_EXPIRY_SECONDS", "0"),
        ("RELAY_EXPIRY_SECONDS", "inf"),
        ("RELAY_DRAIN_SECONDS", "61"),
    ],
)
def test_a_wrong_value_is_named_and_shown_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    text = wrong(monkeypatch, **{name: value})
    assert text.startswith(f"{name}: ")
    assert "\n" not in text
    assert repr(value) in text
    assert "pydantic" not in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RELAY_JWT_SECRET", SECRET[:31]),
        ("RELAY_JWT_SECRET", ""),
        ("RELAY_MONGO_URI", f"http://ann:{SECRET}@host"),
        ("RELAY_MONGO_URI", f"{SECRET}"),
        ("RELAY_REDIS_URL", f"amqp://:{SECRET}@host"),
    ],
)
def test_a_wrong_secret_is_named_but_never_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    text = wrong(monkeypatch, **{name: value})
    assert text.startswith(f"{name}: must ")
    assert "\n" not in text
    assert SECRET[:12] not in text
    assert "@host" not in text


def test_every_secret_of_the_settings_is_hidden_when_they_are_printed() -> None:
    fields = {
        "jwt_secret": SECRET,
        "mongo_uri": f"mongodb://ann:{SECRET}@host",
        "redis_url": f"redis://:{SECRET}@host",
    }
    settings = Settings(**fields)  # type: ignore[arg-type]
    for shown in (repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json()):
        assert SECRET not in shown


def test_a_body_must_fit_its_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    text = wrong(monkeypatch, RELAY_MAX_BODY_BYTES="4000", RELAY_MAX_FRAME_BYTES="4096")
    assert text == "RELAY_MAX_BODY_BYTES must be at most half of RELAY_MAX_FRAME_BYTES"


def test_settings_do_not_change_while_the_relay_runs() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().port = 1  # type: ignore[misc]


def test_a_variable_that_is_none_of_ours_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unknown_variables() == []
    for name in ("RELAY_PROT", "RELAY_MONGO_URL", "RELAY_PORT", "RELAY_TOKEN", "RELAY_URL", "OTHER"):
        monkeypatch.setenv(name, "1")
    assert unknown_variables() == ["RELAY_MONGO_URL", "RELAY_PROT"]


def test_every_setting_has_a_meaning() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_the_page_of_settings_is_what_the_settings_say() -> None:
    page = settings_doc.PAGE.read_text(encoding="utf-8")
    assert page == settings_doc.render(), "run scripts/settings-doc"
    for name in Settings.model_fields:
        assert page.count(f"| `RELAY_{name.upper()}` |") == 1


def test_the_check_of_the_page_says_when_it_is_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert settings_doc.main(["--check"]) == 0
    monkeypatch.setattr(settings_doc, "PAGE", tmp_path / "settings.md")
    assert settings_doc.main(["--check"]) == 1
    assert "scripts/settings-doc" in capsys.readouterr().err
    assert settings_doc.main([]) == 0
    assert settings_doc.main(["--check"]) == 0
    (tmp_path / "settings.md").write_text("edited by hand")
    assert settings_doc.main(["--check"]) == 1


def test_the_script_is_a_valid_shell_script_that_can_be_run() -> None:
    script = ROOT / "scripts" / "settings-doc"
    shell = shutil.which("sh")
    assert shell is not None
    assert os.access(script, os.X_OK)
    assert subprocess.run([shell, "-n", str(script)], check=False).returncode == 0


@pytest.mark.parametrize(("first", "port"), [("9000", "9001"), ("65535", "8080")])
def test_the_workers_own_ports_exist_and_leave_out_the_one_they_share(
    monkeypatch: pytest.MonkeyPatch, first: str, port: str
) -> None:
    ports = {"RELAY_WORKER_PORT": first, "RELAY_PORT": port}
    assert "RELAY_WORKER_PORT" in wrong(monkeypatch, RELAY_WORKERS="2", **ports)
    monkeypatch.setenv("RELAY_WORKERS", "1")
    assert load().worker_port == int(first)
