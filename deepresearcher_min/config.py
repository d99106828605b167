"""Configuration: one flat frozen dataclass, its values from config.yaml, a preset, and --key=value.

config.yaml is the single place where values and their meaning stand; this file only gives them types and
checks. There is no nesting and no interpolation: `config.lr` is what the file says, searchable by name.
"""

import difflib
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIG_FILE = ROOT / "config.yaml"


class ConfigError(ValueError):
    """A value that cannot be used; the message names the key, the value and what is allowed."""


@dataclass(frozen=True)
class Config:
    """See config.yaml for the meaning, the unit and the paper's value of every key."""

    preset: str
    seed: int
    run_dir: str
    date: str
    resume: str
    model: str
    dtype: str
    engine: str
    engine_memory: float
    kv_tokens: int
    max_in_flight: int
    engine_sleep: bool
    rank_timeout: float
    threads: int
    data: str
    eval_data: str
    eval_questions: int
    limit: int
    method: str
    questions_per_step: int
    group_size: int
    steps: int
    eval_every: int
    log_every: int
    save_every: int
    keep_checkpoints: int
    system_prompt_file: str
    max_tool_calls: int
    max_queries: int
    search_results: int
    max_urls: int
    max_turn_tokens: int
    max_model_len: int
    max_observation_tokens: int
    temperature: float
    top_p: float
    eval_temperature: float
    trajectory_timeout: float
    lr: float
    lr_warmup: int
    lr_decay: bool
    adam_beta1: float
    adam_beta2: float
    weight_decay: float
    max_grad_norm: float
    updates_per_rollout: int
    clip_low: float
    clip_high: float
    kl_coef: float
    entropy_coef: float
    advantage_std: bool
    importance_cap: float
    format_reward: float
    shuffle_rewards: bool
    microbatch_tokens: int
    gradient_checkpointing: bool
    logprob_chunk: int
    offload_optimizer: bool
    search: str
    search_url: str
    corpus: str
    reader: str
    reader_url: str
    reader_model: str
    segment_chars: int
    max_segments: int
    tool_threads: int
    tool_timeout: float
    connect_timeout: float
    read_timeout: float
    max_retries: int
    requests_per_second: float
    connections_per_host: int
    max_page_bytes: int
    allow_private_hosts: bool
    cassette: str
    cassette_mode: str
    search_ttl: float
    price_search: float
    price_reader_token: float
    max_cost: float
    judge_url: str
    judge_model: str

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "method": ("agent", "cot", "rag"),
    "engine": ("auto", "vllm", "hf"),
    "search": ("serper", "searxng", "wikipedia", "retriever", "local", "toy"),
    "reader": ("engine", "openai", "extractive"),
    "cassette_mode": ("live", "record", "replay"),
}
MAY_BE_ZERO = {
    "seed", "kv_tokens", "eval_questions", "limit", "eval_every", "max_tool_calls", "temperature", "eval_temperature",
    "lr_warmup", "weight_decay", "kl_coef", "entropy_coef", "importance_cap", "tool_threads", "max_retries",
    "search_ttl", "price_search", "price_reader_token", "max_cost", "steps",
}  # fmt: skip
MAY_BE_NEGATIVE = {"format_reward"}
FIELD_TYPES = {f.name: f.type for f in fields(Config)}


def load_config(argv: list[str], file: Path = CONFIG_FILE, base: dict[str, Any] | None = None) -> Config:
    """Read config.yaml, lay the preset over it, then every --key=value (or --key value) of argv.

    A bare --flag means true for a boolean key, and "newest" for resume. `base` replaces the file's values and
    preset (eval.py passes the resolved config of a run). Raises ConfigError with the nearest known name.
    """
    values = yaml.safe_load(file.read_text())
    presets = values.pop("presets")
    typed = parse_arguments(argv)
    if base is not None:
        for key in base:
            check_key(key)
        values.update(base)
    preset = typed.get("preset", values["preset"])
    if preset not in presets:
        raise ConfigError(f"unknown preset {preset!r}{nearest(preset, presets)}; presets: {', '.join(presets)}")
    if base is None or "preset" in typed:
        values.update(presets[preset])
    values.update(typed)
    return make_config(values)


def make_config(values: dict[str, Any]) -> Config:
    """A checked Config from a dict of all keys; strings are converted to the key's type."""
    for key in values:
        check_key(key)
    missing = [name for name in FIELD_TYPES if name not in values]
    if missing:
        raise ConfigError(f"config.yaml lacks the keys {', '.join(missing)}")
    config = Config(**{key: convert(key, value) for key, value in values.items()})
    check_values(config)
    return config


def parse_arguments(argv: list[str]) -> dict[str, Any]:
    """['--lr=1e-4', '--steps', '5', '--resume'] -> {'lr': '1e-4', 'steps': '5', 'resume': 'newest'}."""
    typed: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"cannot read the argument {word!r}: write --key=value")
        key, has_value, value = word[2:].partition("=")
        key = key.replace("-", "_")
        check_key(key)
        if not has_value:
            if FIELD_TYPES[key] is bool:
                value = "true"
            elif rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif key == "resume":
                value = "newest"
            else:
                raise ConfigError(f"--{key} needs a value: --{key}=VALUE")
        typed[key] = value
    return typed


def check_key(key: str) -> None:
    if key not in FIELD_TYPES:
        raise ConfigError(f"unknown key {key!r}{nearest(key, FIELD_TYPES)}; config.yaml lists every key")


def nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def convert(key: str, value: Any) -> Any:
    """The value in the type that the dataclass gives to this key."""
    kind = FIELD_TYPES[key]
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() not in words:
            raise ConfigError(f"{key}={value!r}: true or false")
        return words[str(value).lower()]
    if kind is str:
        return "" if value is None else str(value)
    try:
        return (int if kind is int else float)(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}={value!r}: not {'a whole number' if kind is int else 'a number'}") from error


def check_values(config: Config) -> None:
    for key, allowed in CHOICES.items():
        if getattr(config, key) not in allowed:
            value = getattr(config, key)
            raise ConfigError(f"{key}={value!r}{nearest(value, allowed)}; allowed: {', '.join(allowed)}")
    for key, kind in FIELD_TYPES.items():
        value = getattr(config, key)
        if kind not in (int, float) or key in MAY_BE_NEGATIVE:
            continue
        if not value >= 0 or (value == 0 and key not in MAY_BE_ZERO) or value == float("inf"):
            raise ConfigError(f"{key}={value}: must be {'at least 0' if key in MAY_BE_ZERO else 'greater than 0'}")
    if config.max_turn_tokens >= config.max_model_len:
        raise ConfigError(
            f"max_turn_tokens={config.max_turn_tokens}: must be less than max_model_len={config.max_model_len}"
        )
    if config.questions_per_step % config.updates_per_rollout:
        raise ConfigError(
            f"updates_per_rollout={config.updates_per_rollout}: must divide "
            f"questions_per_step={config.questions_per_step}"
        )
    if config.group_size < 2:
        raise ConfigError(f"group_size={config.group_size}: a group needs at least 2 trajectories to compare")


def describe(config: Config, file: Path = CONFIG_FILE) -> str:
    """The resolved config as one line for each key that differs from the values of config.yaml."""
    defaults = yaml.safe_load(file.read_text())
    lines = []
    for key, value in config.to_dict().items():
        if value != convert(key, defaults[key]):
            lines.append(f"  {key}: {value}  (default {defaults[key]})")
    return "\n".join(lines)


def save_config(config: Config, path: Path) -> None:
    """Write all keys as YAML. API keys are never part of the config; they come from the environment."""
    aside = path.with_suffix(".part")
    aside.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    aside.replace(path)  # a kill in between leaves the old file whole


def require_environment(name: str, purpose: str) -> str:
    """The value of an environment variable, or a ConfigError that says what it is for."""
    value = os.environ.get(name, "").strip()
    if not value:
        raise ConfigError(f"{name} is not set: {purpose}")
    return value
