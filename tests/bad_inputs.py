"""Broken files and model folders for test_bad_input.py, by the names under which they are made in
one place.
"""

import json
import shutil
import sqlite3
from pathlib import Path

from deepresearcher_min import corpus

LOCAL = (
    "--preset=wiki --model={}/m --corpus={}/c.jsonl --data={}/q.jsonl --max_model_len=1000 "
    "--eval_questions=1 --threads=1"
)
ASKED = [
    {"question": "Who built the pier of Ormley?", "answers": ["Ada Quill"]},
    {"question": "q2", "answers": ["b"]},
]
PAGES = [
    {"title": t, "url": f"https://example.org/{t}", "text": f"{t} is a town by the sea."}
    for t in ("Ormley", "Tarn")
]


EYES = {  # as small as they may be; by default they are a large model
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def lines(rows: list) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def config_of(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


MODELS = {  # how a copy of the toy's model is broken
    "m": lambda folder: None,
    "m_no_config": lambda folder: (folder / "config.json").unlink(),
    "m_config_torn": lambda folder: (folder / "config.json").write_text('{"model_type": "lla'),
    "m_config_list": lambda folder: (folder / "config.json").write_text("[]"),
    "m_config_empty": lambda folder: (folder / "config.json").write_text(""),
    "m_config_latin": lambda folder: (folder / "config.json").write_bytes(
        b'{"model_type": "\xe9"}'
    ),
    "m_unknown_type": lambda folder: config_of(folder, model_type="nonesuch"),
    "m_no_decoder": lambda folder: config_of(folder, model_type="vit"),
    "m_no_weights": lambda folder: (folder / "model.safetensors").unlink(),
    "m_weights_torn": lambda folder: (folder / "model.safetensors").write_bytes(
        (corpus.MODEL_DIR / "model.safetensors").read_bytes()[:50_000]
    ),
    "m_weights_empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "m_weights_pointer": lambda folder: (folder / "model.safetensors").write_text(
        "version https://git-lfs\noid 1\n"
    ),
    "m_other_shape": lambda folder: config_of(folder, intermediate_size=96),
    "m_more_layers": lambda folder: config_of(folder, num_hidden_layers=3),
    "m_no_tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "m_tokenizer_torn": lambda folder: (folder / "tokenizer.json").write_text(
        '{"version": "1.0", "model": {'
    ),
    "m_tokenizer_other": lambda folder: (folder / "tokenizer.json").write_text(
        '{"model": {"type": "X"}}'
    ),
    "m_tokenizer_config_torn": lambda folder: (folder / "tokenizer_config.json").write_text("{"),
    "m_no_template": lambda folder: (folder / "chat_template.jinja").unlink(),
    "m_template_syntax": lambda folder: (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role"
    ),
    "m_template_raises": lambda folder: (folder / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system words') }}{% endif %}"
    ),
    "m_template_undefined": lambda folder: (folder / "chat_template.jinja").write_text(
        "{{ messages[9].content.x.y }}"
    ),
    "m_template_types": lambda folder: (folder / "chat_template.jinja").write_text(
        "{{ messages + 1 }}"
    ),
    "m_small_vocabulary": lambda folder: config_of(folder, vocab_size=40),
    "m_generation_torn": lambda folder: (folder / "generation_config.json").write_text("{"),
    "m_nested": lambda folder: config_of(
        folder,
        model_type="gemma3",
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 352},
        vision_config=EYES,
    ),
}


def make(place: Path) -> None:
    """All broken inputs, in this folder."""
    for name, spoil in MODELS.items():
        spoil(Path(shutil.copytree(corpus.MODEL_DIR, place / name)))
    files = {
        "q.jsonl": lines(ASKED),
        "c.jsonl": lines(PAGES),
        "prompt.txt": b"Answer. {date}",
        "empty": b"",
        "file": b"x\n",
        "empty.jsonl": b"",
        "blank.jsonl": b"\n\n",
        "torn.jsonl": lines(ASKED)[:-9],
        "list.jsonl": b"[1, 2]\n",
        "latin.jsonl": '{"question": "Où?", "answers": ["là"]}\n'.encode("latin-1"),
        "keys.jsonl": lines([{"ask": "Who?", "reply": "I"}]),
        "no_answer.jsonl": lines([{"question": "Who?", "answers": []}]),
        "text.parquet": b"no parquet at all",
        "empty.parquet": b"",
        "cut.parquet": b"PAR1" + b"\0" * 40,
        "c_keys.jsonl": lines([{"title": "a", "url": "b"}]),
        "c_latin.jsonl": b'{"title": "\xe9", "url": "u", "text": "t"}\n',
        "c_text.jsonl": b"Once upon a time\n",
        "c_nested.jsonl": b"[" * 100_000,
        "prompt_latin.txt": b"R\xe9ponds.",
        "cassette_text": b"not a database, but some text that is long enough to be looked at" * 20,
    }
    for name, content in files.items():
        (place / name).write_bytes(content)
    configs = {
        "r_yaml": b"seed: [1\n",
        "r_list": b"- 1\n",
        "r_latin": b"model: \xe9\n",
        "r_empty": b"",
        "r_key": b"sed: 1\n",
        "r_value": b"steps: many\n",
        "r_nested": b"steps: [1]\n",
        "r_fraction": b"steps: 1.5\n",
        "r_number": b"7: 1\n",
    }
    for name, content in configs.items():
        (place / name / "checkpoints/step-000001").mkdir(parents=True)
        (place / name / "checkpoints/step-000001/state.json").write_text("{}")
        (place / name / "config.yaml").write_bytes(content)
    (place / "r_folder/config.yaml").mkdir(parents=True)
    (place / "folder").mkdir()
    (place / "loop").symlink_to(place / "loop")
    database = sqlite3.connect(place / "cassette_other")
    database.execute("CREATE VIEW replies AS SELECT 1")
    database.close()


def arguments(base: str, extra: str, place: Path) -> list[str]:
    added = (
        [f"--run_dir={place}/new/run"] if "run_dir" not in extra and "resume" not in extra else []
    )
    return [word.replace("{}", str(place)) for word in [*base.split(), *added, *extra.split(" ")]]
