"""Configuration: one flat record of values, from config.yaml, a preset laid over it, and
--key=value.

config.yaml alone knows the keys, their types, values and meanings: a line more there is a key more
here. Beside them stands what all modules need: how things fail (a run that cannot begin, a run that
stops, a call of a tool that fails and is counted), names of hosts, files that survive kills.
"""

import difflib
import hashlib
import math
import os
import re
import sys
import threading
import time
from configparser import ConfigParser
from contextlib import contextmanager
from dataclasses import make_dataclass
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from urllib.parse import unquote

import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIG_FILE = ROOT / "config.yaml"
try:
    DEFAULTS = yaml.safe_load(CONFIG_FILE.read_bytes())
except yaml.YAMLError as error:  # an import cannot raise in one line
    print(f"{CONFIG_FILE} cannot be read: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
PRESETS = DEFAULTS.pop("presets")
TYPES = {key: type(value) for key, value in DEFAULTS.items()}  # bool, int, float or str
ROLES = ("search", "reader", "judge")  # the operator's services, whose failures can stop a run
NO_FAULT = ("no_results", "no_verdict")  # kinds of failure of a service that works
LAST_WORDS = {}  # how a call to each service failed last, for people
COUNT_LOCK = threading.Lock()


class ConfigError(ValueError):
    """A value that cannot be used; the message names the key, the value and what is allowed."""


class WebFailure(Exception):
    """A short name to count, a sentence for the model (that of failures.yaml, if none is given),
    and the server's own words for people.
    """

    counted = False

    def __init__(self, kind, words="", said=""):
        words = words or WORDS.get(kind, kind)
        super().__init__(f"{kind}: {words}{said and f' It said: {said}'}")
        self.kind = kind
        self.words = words
        self.said = said


class RunStopped(Exception):
    """Why a run ends before its end, with everything saved: --resume goes on."""


def table(name):
    """What one of the package's YAML files holds: no code, but what code looks up."""
    return yaml.safe_load((ROOT / f"deepresearcher_min/{name}.yaml").read_bytes())


WORDS = table("failures")


def count(counts, name, amount=1):
    """Add to a counter that several tool threads of one trajectory may share."""
    with COUNT_LOCK:
        counts[name] += amount


def count_failure(counts, source, failure):
    """As fail_<source>_<kind>, once for each failure, however many see it on its way."""
    if not failure.counted:
        failure.counted = True
        count(counts, f"fail_{source}_{failure.kind}")


def seconds_left(deadline):
    """Seconds until a deadline on the monotonic clock; raises WebFailure when it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise WebFailure("timeout")
    return left


@contextmanager
def named(key, value, remedy=""):
    """Whatever a library raises over a user's file, as one line of at most 400 characters that
    names key and value.

    An error that begins with a key already stays as it is. Not every library's errors are
    Exceptions.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        words = shorten(str(error), 400, placeholder=" ...")
        if isinstance(error, ValueError) and re.match(r"[a-z_]+=|[A-Z_]+ is not set", words):
            raise
        if not isinstance(error, OSError | ValueError) or not words:
            words = f"{type(error).__name__}: {words}"
        raise ConfigError(
            f"{key}={value!r}: {words.rstrip('.: ')}{remedy and '; ' + remedy}"
        ) from error


class Config(make_dataclass("Keys", TYPES.items(), frozen=True)):  # type: ignore[misc]
    """All keys of config.yaml, each in its type; never changed (dataclasses.replace makes another,
    unchecked).
    """


def raise_if_down(config, counts, least=1):
    """RunStopped if most of at least `least` calls to a service failed (keys of metrics.jsonl)."""
    if config.cassette_mode == "replay":
        return
    for role in ROLES:
        calls = counts.get(f"cost_{role}_calls", 0)
        failed = counts.get(f"cost_{role}_failed", 0)
        if calls >= least and failed > calls / 2:
            raise RunStopped(
                f"{failed:.0f} of {calls:.0f} calls to the {role} service failed. "
                f"The last one: {LAST_WORDS.get(role, 'see the other ranks')}"
            )


def load_config(argv: list[str], base=None) -> Config:
    """The values of config.yaml, then the preset's, then every --key=value (or --key value) of
    argv.

    `base`, the saved config of a run, comes in place of the preset. Raises ConfigError with the
    nearest known name.
    """
    typed = parse_arguments(argv)
    preset = typed.get("preset", "" if base else DEFAULTS["preset"])
    values = DEFAULTS | (base or {}) | PRESETS.get(preset, {}) | typed
    config = Config(**{key: convert(key, value) for key, value in values.items()})
    check(config)
    return config


def parse_arguments(argv):
    """['--lr=1e-4', '--steps', '5', '--resume'] -> {'lr': '1e-4', 'steps': '5', 'resume':
    'newest'}.
    """
    typed = {}
    rest = list(argv)
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
        if re.search("[\0\ud800-\udfff]", value):  # what Python makes of bytes that are not UTF-8
            raise ConfigError(f"--{key}={value!a}: holds characters that are not UTF-8 text")
        typed[key] = os.path.expanduser(value)
    return typed


def read_config(key, folder: Path):
    """The values in the config.yaml of the run that `key` names; ConfigError where that is no file
    of keys.
    """
    with named(key, str(folder), "mend its config.yaml, or name another run"):
        values = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
        if not isinstance(values, dict):
            raise ValueError("config.yaml holds no `key: value` lines")
        for name, saved in values.items():
            convert(str(name), saved)
    return values


def documented():
    """(heading, key, default, meaning) for each key, as the text of config.yaml has them."""
    heading = ""
    for line in CONFIG_FILE.read_text("utf-8").splitlines():
        found = re.match(r'(\w+): +"?(.*?)"? *(?:#|$) *(.*)', line)
        if line.startswith("# --- "):
            heading = line[6:]
        elif found:
            yield heading, *found.groups()


def help_text():
    """The keys as config.yaml groups them, one `--key=default  meaning` a line."""
    text = "Keys, with the defaults that a preset may replace (see the end of config.yaml):"
    last = ""
    for heading, key, default, meaning in documented():
        if heading != last:
            text += f"\n\n{heading}:"
            last = heading
        text += f"\n{f'--{key}={default}':<32} {meaning}"
    return text


def searches_web(config):
    return config.search not in ("toy", "local")


def uses_web(config):
    return searches_web(config) or config.reader == "openai"


def check_inputs(config, argv, other):
    """ConfigError for an input that this run will not read; a line on typed keys without effect, if
    there are any.

    `other` is the program that is not running: train.py or eval.py.
    """
    typed = parse_arguments(argv)
    unread = {}
    if config.search == "toy":
        remedy = "the toy web does not answer it; add --search=local --corpus=FILE"
        own = "the toy web has its own pages; add --search=local"
        unread = {"data": remedy, "eval_data": remedy, "corpus": own}
    elif other == "train.py" and typed.get("data"):
        unread["eval_data"] = f"data={typed['data']!r} is read instead"
    if other == "eval.py":
        unread["question"] = "python eval.py answers one"
    idle = [
        key
        for heading, key, _, meaning in documented()
        if f"{other} only" in heading or meaning.startswith(f"{other}:")
    ]
    if not searches_web(config):
        idle.append("search_url")
    if config.reader != "openai":
        idle += ["reader_url", "reader_model", "price_reader_token"]
    if not (uses_web(config) or config.judge_url):
        unread["cassette"] = f"search={config.search} opens no web"
        idle.append("cassette_mode")
    for key, why in unread.items():
        value = typed.get(key, DEFAULTS[key])
        if value:
            raise ConfigError(f"{key}={value!r}: this run does not read it: {why}")
    told = ", ".join(key for key in typed if key in idle)
    return [f"Without effect on this run: {told}."] if told else []


def type_of(key):
    if key not in TYPES:
        raise ConfigError(f"unknown key {key!r}{nearest(key, TYPES)}; config.yaml lists every key")
    return TYPES[key]


def nearest(name, known):
    close = difflib.get_close_matches(name, known)
    return f" (did you mean {close[0]!r}?)" if close else ""


def convert(key, value):
    """The value in the type of this key."""
    kind = type_of(key)
    if kind is str:
        return "" if value is None else os.path.expanduser(str(value))
    try:
        if kind is bool:
            return ConfigParser.BOOLEAN_STATES[str(value).lower()]
        return kind(str(value))  # neither True nor 1.5 is an int
    except (KeyError, ValueError):
        wanted = {bool: "true or false", int: "not a whole number", float: "not a number"}[kind]
        raise ConfigError(f"{key}={value!r}: {wanted}") from None


def check(config):
    """ConfigError for a value that its line in config.yaml does not allow, or that does not go with
    another. A line may list choices (a | b), say "at most N", or what "0: ..." stands for.
    """
    for _, key, _, meaning in documented():
        value = getattr(config, key)
        listed = re.match(r"(?:eval\.py: )?(\w+(?: \| \w+)+)", meaning)
        choices = listed[1].split(" | ") if listed else [value]
        if value not in choices:
            raise ConfigError(
                f"{key}={value!r}{nearest(value, choices)}; allowed: {', '.join(choices)}"
            )
        if meaning.startswith("base URL") and not re.match("https?://|$", value):
            raise ConfigError(f"{key}={value!r}: must begin with http:// or https://")
        if isinstance(value, bool | str):
            continue
        if key in ("format_reward", "browse_timeout"):  # may be negative
            fits = math.isfinite(value)
            limit = "a finite number"
        elif DEFAULTS[key] == 0 or " 0: " in f" {meaning}":
            fits = value >= 0
            limit = "at least 0"
        else:
            fits = value > 0
            limit = "greater than 0"
        if not fits:
            raise ConfigError(f"{key}={value}: must be {limit}")
        # All others: what the libraries below can count.
        most = [*re.findall(r"at most ([\d.]+)", meaning), 2**31 - 1][0]
        if value > float(most):
            raise ConfigError(f"{key}={value}: must be at most {most}")
    if config.max_turn_tokens >= config.max_model_len:
        raise ConfigError(
            f"max_turn_tokens={config.max_turn_tokens}: must be less than "
            f"max_model_len={config.max_model_len}"
        )
    if config.questions_per_step % config.updates_per_rollout:
        raise ConfigError(
            f"updates_per_rollout={config.updates_per_rollout}: must divide "
            f"questions_per_step={config.questions_per_step}"
        )
    if 0 < config.sequence_mask <= 1:
        raise ConfigError(f"sequence_mask={config.sequence_mask}: must be above 1, or 0: off")
    host_list(config)  # raises
    if config.group_size < 2:
        raise ConfigError(
            f"group_size={config.group_size}: a group needs at least 2 trajectories to compare"
        )


def host_list(config):
    """The names in `blocked_hosts`, as plain_host writes them; auto, which eval.py spells out, and
    none are empty.
    """
    if config.blocked_hosts in ("auto", "none"):
        return []
    hosts = []
    for word in config.blocked_hosts.split() or [""]:
        host = plain_host(word)
        if not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)+", host):
            raise ConfigError(
                f"blocked_hosts={config.blocked_hosts!r}: {word!r} is no host; write auto, none, "
                "or names like huggingface.co separated by spaces (no http://, port or *: "
                "subdomains count)"
            )
        hosts.append(host)
    return hosts


def plain_host(name):
    """'Bücher.Example.' -> 'xn--bcher-kva.example': one spelling for each name; empty for what
    cannot be one.
    """
    try:
        return name.strip(".").encode("idna").decode().strip(".").lower()
    except UnicodeError:
        return ""


def is_blocked(url, hosts):
    """Whether an address, however spelled, is at one of these (from host_list) or a subdomain."""
    # matches everything, if need be with an empty host
    found = re.findall(r"(?:[^/?#]*//)?(?:[^/?#]*@)?([^/?#:]*)", url.strip().replace("\\", "/"))
    host = plain_host(unquote(found[0]))
    return any(f".{host}".endswith(f".{blocked}") for blocked in hosts)


def describe(config):
    """The resolved config as one line for each key that differs from the values of config.yaml."""
    return "\n".join(
        f"  {key}: {value}  (default {DEFAULTS[key]})"
        for key, value in vars(config).items()
        if value != DEFAULTS[key]
    )


def replace_file(path, content):
    """Write aside and rename: a kill in between leaves the old file whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_bytes(content)
    aside.replace(path)


def require_environment(name, purpose):
    """ConfigError, which says what an environment variable is for, where it is not set."""
    if not os.environ.get(name, "").strip():
        raise ConfigError(f"{name} is not set: {purpose}")


def code_of(file, *packages):
    """What made a cached reply: a hash of a module's file, the versions of what it works with."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() + "".join(map(version, packages))
