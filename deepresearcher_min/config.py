"""Configuration: one flat record of values, from config.yaml, a preset laid over it, and --key=value.

config.yaml alone knows the keys, their types, values and meanings: a line more there is a key more here.
"""

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, make_dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIG_FILE = ROOT / "config.yaml"
DEFAULTS: dict[str, Any] = yaml.safe_load(CONFIG_FILE.read_text())
PRESETS: dict[str, dict[str, Any]] = DEFAULTS.pop("presets")
TYPES = {key: type(value) for key, value in DEFAULTS.items()}  # bool, int, float or str
CHOICES = {
    "preset": tuple(PRESETS),
    "dtype": ("float32", "bfloat16"),
    "method": ("agent", "cot", "rag"),
    "engine": ("auto", "vllm", "hf"),
    "search": ("serper", "searxng", "wikipedia", "retriever", "local", "toy"),
    "reader": ("engine", "openai", "extractive"),
    "cassette_mode": ("live", "record", "replay"),
}
MAY_BE_ZERO = {key for key, value in DEFAULTS.items() if value == 0} | {  # all others must be greater
    "max_tool_calls", "weight_decay", "kl_coef", "importance_cap", "tool_threads", "max_retries", "search_ttl",
    "price_search", "steps",
}  # fmt: skip
MAY_BE_NEGATIVE = {"format_reward"}
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)+")


class ConfigError(ValueError):
    """A value that cannot be used; the message names the key, the value and what is allowed."""


class Config(make_dataclass("Keys", TYPES.items(), frozen=True)):  # type: ignore[misc]
    """All keys of config.yaml, each in its type; never changed (dataclasses.replace makes another, unchecked)."""


def load_config(argv: list[str], base: dict[str, Any] | None = None) -> Config:
    """The values of config.yaml, then the preset's, then every --key=value (or --key value) of argv.

    `base`, the saved config of a run, comes in place of the preset. Raises ConfigError with the nearest known name.
    """
    typed = parse_arguments(argv)
    preset = typed.get("preset", DEFAULTS["preset"] if base is None else "")
    values = {**DEFAULTS, **(base or {}), **PRESETS.get(preset, {}), **typed}
    config = Config(**{key: convert(key, value) for key, value in values.items()})
    check(config)
    return config


def parse_arguments(argv: list[str]) -> dict[str, str]:
    """['--lr=1e-4', '--steps', '5', '--resume'] -> {'lr': '1e-4', 'steps': '5', 'resume': 'newest'}."""
    typed, rest = {}, list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"cannot read the argument {word!r}: write --key=value")
        key, has_value, value = word[2:].partition("=")
        key = key.replace("-", "_")
        kind = type_of(key)
        if not has_value:
            if kind is bool:
                value = "true"
            elif rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif key == "resume":
                value = "newest"
            else:
                raise ConfigError(f"--{key} needs a value: --{key}=VALUE")
        typed[key] = value
    return typed


def type_of(key: str) -> type:
    if key not in TYPES:
        raise ConfigError(f"unknown key {key!r}{nearest(key, TYPES)}; config.yaml lists every key")
    return TYPES[key]


def nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def convert(key: str, value: Any) -> Any:
    """The value in the type of this key."""
    kind = type_of(key)
    if kind is str:
        return "" if value is None else str(value)
    try:
        return BOOLEANS[str(value).lower()] if kind is bool else kind(value)
    except (KeyError, TypeError, ValueError):
        wanted = {bool: "true or false", int: "not a whole number", float: "not a number"}[kind]
        raise ConfigError(f"{key}={value!r}: {wanted}") from None


def check(config: Config) -> None:
    for key, allowed in CHOICES.items():
        if (value := getattr(config, key)) not in allowed:
            raise ConfigError(f"{key}={value!r}{nearest(value, allowed)}; allowed: {', '.join(allowed)}")
    for key in (key for key, kind in TYPES.items() if kind in (int, float) and key not in MAY_BE_NEGATIVE):
        value, limit = getattr(config, key), "at least 0" if key in MAY_BE_ZERO else "greater than 0"
        if not (0 < value < float("inf") or (value == 0 and key in MAY_BE_ZERO)):
            raise ConfigError(f"{key}={value}: must be {limit}")
    if config.max_turn_tokens >= config.max_model_len:
        limit = f"max_model_len={config.max_model_len}"
        raise ConfigError(f"max_turn_tokens={config.max_turn_tokens}: must be less than {limit}")
    if config.questions_per_step % config.updates_per_rollout:
        whole = f"questions_per_step={config.questions_per_step}"
        raise ConfigError(f"updates_per_rollout={config.updates_per_rollout}: must divide {whole}")
    host_list(config)
    if config.group_size < 2:
        raise ConfigError(f"group_size={config.group_size}: a group needs at least 2 trajectories to compare")


def host_list(config: Config) -> list[str]:
    """The names in `blocked_hosts`, as plain_host writes them; auto, which eval.py spells out, and none are empty."""
    if config.blocked_hosts in ("auto", "none"):
        return []
    hosts = []
    for word in config.blocked_hosts.split() or [""]:
        host = plain_host(word)
        if not HOST.fullmatch(host):
            raise ConfigError(
                f"blocked_hosts={config.blocked_hosts!r}: {word!r} is no host; write auto, none, or names "
                "like huggingface.co separated by spaces (no http://, port or *: subdomains count)"
            )
        hosts.append(host)
    return hosts


def plain_host(name: str) -> str:
    """'Bücher.Example.' -> 'xn--bcher-kva.example': one spelling for each name; empty for what cannot be one."""
    try:
        return name.strip(".").encode("idna").decode().strip(".").lower()
    except UnicodeError:
        return ""


def describe(config: Config) -> str:
    """The resolved config as one line for each key that differs from the values of config.yaml."""
    changed = {key: value for key, value in asdict(config).items() if value != DEFAULTS[key]}
    return "\n".join(f"  {key}: {value}  (default {DEFAULTS[key]})" for key, value in changed.items())


def replace_file(path: Path, content: bytes) -> None:
    """Write aside and rename: a kill in between leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_bytes(content)
    aside.replace(path)


def require_environment(name: str, purpose: str) -> str:
    """The value of an environment variable, or a ConfigError that says what it is for."""
    value = os.environ.get(name, "").strip()
    if not value:
        raise ConfigError(f"{name} is not set: {purpose}")
    return value
