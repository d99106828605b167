"""The configuration: one place for values, typed, with errors that help."""

import re
from dataclasses import asdict

import pytest
import yaml

from deepresearcher_min.config import (
    CONFIG_FILE,
    ROLES,
    ROOT,
    TYPES,
    ConfigError,
    describe,
    load_config,
    named,
    replace_file,
)

pytestmark = pytest.mark.quick


def test_every_key_stands_once_in_the_file_with_a_comment_that_says_what_it_means():
    text = CONFIG_FILE.read_text()
    values = yaml.safe_load(text)
    presets = values.pop("presets")
    head = text.partition("presets:")[0]
    for key in values:
        lines = re.findall(rf"^{key}:.*$", head, re.MULTILINE)
        assert len(lines) == 1 and len(lines[0].partition("#")[2].strip()) > 5, key
    assert set(presets) == {"toy", "wiki", "paper"}
    assert all(type(values[key]) in (bool, int, float, str) for key in values)
    assert all(
        type(value) is type(values[key])
        for preset in presets.values()
        for key, value in preset.items()
    )


def test_the_code_reads_only_keys_that_exist():
    files = [*(ROOT / "deepresearcher_min").glob("*.py"), ROOT / "train.py", ROOT / "eval.py"]
    text = "\n".join(file.read_text() for file in files)
    assert (
        set(re.findall(r"(?<!model\.)\bconfig\.([a-z]\w*)(?![\w(])", text)) - {"yaml", "json"}
        <= TYPES.keys()
    )
    # And there is none that nothing reads, by its name or as that of a service.
    for tail in re.findall(r"\{role\}(_\w+)", text):
        text += "".join(f'"{role}{tail}"' for role in ROLES)
    assert not [key for key in TYPES if not re.search(rf"[.\"]{key}\b", text)]


@pytest.mark.parametrize("preset", ["toy", "wiki", "paper"])
def test_presets_load_and_survive_a_round_trip_through_a_file(preset, tmp_path):
    config = load_config([f"--preset={preset}"])
    assert config.preset == preset
    replace_file(tmp_path / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False).encode())
    assert load_config([], base=yaml.safe_load((tmp_path / "config.yaml").read_text())) == config


def test_the_paper_preset_has_the_papers_values():
    config = load_config(["--preset=paper"])
    assert (config.questions_per_step, config.group_size, config.steps) == (256, 16, 80_000 // 256)
    assert (config.lr, config.kl_coef, config.clip_low, config.clip_high) == (1e-6, 0.001, 0.2, 0.2)
    assert (config.max_tool_calls, config.max_queries, config.search_results) == (10, 3, 10)
    assert (config.max_turn_tokens, config.max_model_len) == (2000, 32768)
    assert (config.model, config.search, config.format_reward) == (
        "Qwen/Qwen2.5-7B-Instruct",
        "serper",
        -1.0,
    )


def test_arguments_are_typed_and_win_over_presets():
    config = load_config(
        ["--preset=toy", "--lr=1e-3", "--steps", "7", "--advantage-std=no", "--shuffle_rewards"]
    )
    assert (config.lr, config.steps, config.advantage_std, config.shuffle_rewards) == (
        1e-3,
        7,
        False,
        True,
    )
    assert load_config(["--resume"]).resume == "newest"
    assert load_config(["--model="]).model == ""


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--learning_rate=1", "unknown key"),
        ("--kl_coeff=1", "did you mean 'kl_coef'"),
        ("--preset=papr", "'paper'"),
        ("--steps=1.5", "steps='1.5': not a whole number"),
        ("--lr=fast", "lr='fast': not a number"),
        ("--lr=0", "lr=0.0: must be greater than 0"),
        ("--temperature=0", "temperature=0.0: must be greater"),
        ("--modle=x", "did you mean 'model'"),
        ("--lr=nan", "lr=nan"),
        ("--lr=inf", "lr=inf"),
        ("--advantage_std=maybe", "true or false"),
        ("--engine=vlm", "did you mean 'vllm'"),
        ("-x", "cannot read"),
        ("--steps", "--steps needs a value"),
    ],
)
def test_errors_name_key_value_and_limit(argument, words):
    with pytest.raises(ConfigError) as error:
        load_config([argument])
    assert words in str(error.value)


def test_limits_that_may_be_switched_off_and_the_deadline_that_may_be_another_ones():
    argv = [
        f"--{key}=0"
        for key in ("max_urls", "max_segments", "browse_timeout", "reader_tokens", "reader_memory")
    ]
    config = load_config(argv)
    assert not any(getattr(config, word[2:].partition("=")[0]) for word in argv)
    assert load_config([]).browse_timeout < 0 and load_config(["--preset=paper"]).max_urls == 10
    for argument in (
        "--max_urls=-1",
        "--max_segments=-1",
        "--reader_tokens=-1",
        "--reader_temperature=-1",
    ):
        with pytest.raises(ConfigError, match="must be at least 0"):
            load_config([argument])
    for argument in ("--browse_timeout=nan", "--browse_timeout=inf", "--format_reward=nan"):
        with pytest.raises(ConfigError, match="must be a finite number"):
            load_config([argument])


@pytest.mark.parametrize("key", ["steps", "max_tool_calls", "weight_decay", "kl_coef", "seed"])
def test_a_number_may_be_zero_where_its_line_says_what_zero_means(key):
    assert getattr(load_config([f"--{key}=0"]), key) == 0
    with pytest.raises(ConfigError, match="must be at least 0"):
        load_config([f"--{key}=-1"])


def test_describe_shows_only_what_differs():
    text = describe(load_config(["--preset=paper", "--lr=2e-6"]))
    assert "lr: 2e-06  (default 1e-06)" in text and "group_size" not in text


def test_no_secret_is_a_config_key():
    assert not [
        key for key in TYPES if "key" in key or "secret" in key or "token" in key.split("_")[:-1]
    ]


def test_what_names_its_key_already_is_not_named_twice():
    for error, said in (
        (ValueError("model=dir: computed otherwise"), "model=dir: computed otherwise"),
        (ConfigError("READER_API_KEY is not set: why"), "READER_API_KEY is not set: why"),
        (KeyError("x"), "model='dir': KeyError: 'x'; a remedy"),
        (ValueError("no key"), "model='dir': no key; a remedy"),
    ):
        with pytest.raises(ValueError) as raised, named("model", "dir", "a remedy"):
            raise error
        assert str(raised.value) == said
