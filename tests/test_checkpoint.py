"""docs/checkpoint.md: its block runs as it stands, against loopback services, with a tiny model."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from urllib3.util import parse_url

import eval as evaluation
from deepresearcher_min import corpus
from deepresearcher_min import web as web_module
from deepresearcher_min.config import CONFIG_FILE, ROOT
from deepresearcher_min.protocol import ChatFormat
from scripts.toy_tokenizer import TEMPLATE

pytestmark = pytest.mark.quick
HEADING = "The published checkpoint, as its authors judged it"
# the toy model's room
TINY = "--max_model_len=768 --max_turn_tokens=64 --max_in_flight=16 --allow_private_hosts"
SEGMENTS = 3
SYSTEM = "Today is {date}. \nTwo tools, one question. \n"
TOOLS = []
for name, argument, meaning in (
    ("web_search", "query", "Find."),
    ("browse_webpage", "url_list", "Read."),
):
    parameters = {"type": "object", "properties": {argument: {"type": "array"}}}
    TOOLS.append(
        {
            "type": "function",
            "function": {"name": name, "description": meaning, "parameters": parameters},
        }
    )
# in front of the toy's own
SHOWS_TOOLS = """\
{% if tools %}<|tool|>{{ messages[0].content }}
{%- for tool in tools %}{{ tool.function.description }}{% endfor %}<|end|>{% endif %}"""


def block() -> str:
    """The bash block under the heading, its lines joined where they end with a backslash."""
    _, _, section = (ROOT / "docs/checkpoint.md").read_text().partition(f"## {HEADING}\n")
    return section.split("```bash\n")[1].split("```")[0].replace("\\\n", "")


class World(ThreadingHTTPServer):
    """The toy web online: a Serper, long pages, a reader that copies, a judge that says no."""

    def __init__(self, world: corpus.World) -> None:
        self.world, self.sent = world, list[tuple[str, dict, dict]]()
        self.texts = {urlsplit(url).path: text for _, url, text in world.corpus.documents}
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, asked: dict) -> dict:
        if path == "/search":
            found = self.world.corpus.search(asked["q"], 2)
            rows = [{"title": one.title, "link": one.url, "snippet": one.snippet} for one in found]
            return {"searchParameters": {}, "organic": rows}
        notes = re.search(
            r"<<<\n(.*?)\n(?:filler|>>>)", asked["messages"][-1]["content"], re.DOTALL
        )
        reply = f"CONTINUE: yes\nNOTES: {notes[1] if notes else 'none'}"
        if path.startswith("/judge"):
            reply = '{"rationale": "something else", "judgement": "incorrect"}'
        return {"choices": [{"message": {"content": reply}}], "usage": {"total_tokens": 10}}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.sent.append((self.path, dict(self.headers), asked))
        self.reply("application/json", json.dumps(self.server.answer(self.path, asked)))

    def do_GET(self) -> None:
        # 107,000 characters.
        filler = "".join(f"<p>filler {'word ' * 100}{i}.</p>" for i in range(210))
        self.reply(
            "text/html",
            f"<html><body><article><p>{self.server.texts[self.path]}</p>{filler}</article></body>",
        )

    def reply(self, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The block's exit code (model, URLs, dtype, engine replaced), what was sent, and prompts."""
    world = corpus.World("held out", 0)
    asked = world.questions(24, 0)
    rows = [
        {"question": one.text, "answers": [one.answers[0], "Mr. X"], "source": one.source}
        for one in asked
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "authors").mkdir()
    (tmp_path / "authors/system.txt").write_bytes(SYSTEM.encode())
    (tmp_path / "authors/tools.json").write_text(json.dumps(TOOLS))
    shutil.copytree(corpus.MODEL_DIR, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(SHOWS_TOOLS + TEMPLATE)
    monkeypatch.chdir(tmp_path)
    *exports, command = block().splitlines()
    for name, value in re.findall(r"(\w+)=(\S+)", " ".join(exports)):
        monkeypatch.setenv(name, value)
    with World(world) as server:
        for key, path in (("search_url", ""), ("reader_url", "/reader"), ("judge_url", "/judge")):
            command = re.sub(rf"--{key}=\S+", f"--{key}={server.url}{path}", command)
        command = re.sub(r"--model=\S+", "--model=model", command)
        command = command.replace("--dtype=bfloat16", "--dtype=float32").replace(
            "--engine=vllm", "--engine=hf"
        )
        argv = shlex.split(f"{command} {TINY} --data=questions.jsonl --run_dir=run")
        assert argv[:2] == ["python", "eval.py"]
        real = web_module.check_url

        def toy_address(url, *rest):  # the toy's addresses lead to the server
            online = url.replace(corpus.SITE.rstrip("/"), server.url)
            return (parse_url(online), ["127.0.0.1"]) if online != url else real(url, *rest)

        monkeypatch.setattr(web_module, "check_url", toy_address)
        render, shown = ChatFormat.template, set[str]()

        def template(self, *arguments, **options):
            shown.add(render(self, *arguments, **options))
            return render(self, *arguments, **options)

        monkeypatch.setattr(ChatFormat, "template", template)
        yield evaluation.main(argv[2:]), server.sent, shown
        server.shutdown()


def test_the_block_under_the_heading_sends_what_the_authors_sent(run):
    code, sent, prompts = run
    assert code == 0
    searches = [asked for path, _, asked in sent if path == "/search"]
    # A trial call of the start may be among them.
    asked = [(path, each) for path, _, each in sent if path != "/search"]
    readings = [
        each for path, each in asked if path.startswith("/reader") and "Page segment" in str(each)
    ]
    rules = (ROOT / "prompts/judge.txt").read_text()
    verdicts = [
        each
        for path, each in asked
        if path.startswith("/judge") and rules == each["messages"][0]["content"]
    ]
    assert len(searches) >= 10 and len(readings) >= SEGMENTS and len(verdicts) >= 5
    assert all(
        {**asked, "q": ""} == {"q": "", "num": 10, "gl": "us", "hl": "en"} for asked in searches
    )
    for asked in readings:
        assert (asked["model"], asked["temperature"]) == (
            "qwen-plus",
            0.6,
        ) and "max_tokens" not in asked
    contents = [asked["messages"][1]["content"] for asked in readings]
    places = [
        re.search(rf"\nPage segment (\d) of {SEGMENTS}:\n<<<\n(.*)\n>>>", each, re.DOTALL)
        for each in contents
    ]
    assert sorted({place[1] for place in places}) == ["1", "2", "3"]
    assert all(len(place[2]) <= 40_960 for place in places)
    assert all(len(place[2]) > 40_000 for place in places if place[1] != "3")
    assert all(re.search(r"Search query: (?!none)\w", each) for each in contents)
    for asked in verdicts:
        case = json.loads(asked["messages"][1]["content"])
        assert (asked["model"], asked["temperature"]) == (
            "gpt-4o-mini",
            0.7,
        ) and "max_tokens" not in asked
        assert case["accepted"][1] == "mr. x" and case["given"] == case["given"].lower() != ""
    keys = {
        path: headers.get("X-API-KEY") or headers.get("Authorization") for path, headers, _ in sent
    }
    assert set(keys.values()) == {"...", "Bearer ..."}
    look_at_the_run_folder(prompts)


def look_at_the_run_folder(prompts):
    summary = json.loads(Path("run/summary.json").read_text())
    assert (
        summary["overall"]["n"] == 24 and summary["overall"]["mbe"] == summary["overall"]["em"] < 1
    )
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (config["eval_temperature"], config["max_tool_calls"], config["system_prompt_file"]) == (
        1.0,
        9,
        "authors/system.txt",
    )
    system = SYSTEM.replace("{date}", config["date"])
    # Not those of the start's trial.
    prompts = [prompt for prompt in prompts if prompt.startswith("<|tool|>")]
    assert len(prompts) >= 24 and all(
        prompt.startswith(f"<|tool|>{system}Find.Read.") for prompt in prompts
    )


def test_the_block_names_every_key_of_the_authors_with_the_value_that_config_yaml_gives_for_them():
    typed = dict(re.findall(r"--(\w+)=(\S+)", block()))
    for key in ("max_urls", "max_segments", "reader_tokens", "reader_memory", "browse_timeout"):
        assert typed[key] == "0", key
    keys, checked = CONFIG_FILE.read_text().partition("presets:")[0], 0
    for key, value in re.findall(
        r"^(\w+): .*\(paper(?:'s code)?: ([\w.,-]+)\)", keys, re.MULTILINE
    ):
        # Ten calls, of which nine are read.
        if typed.get(key, "0") == "0" or key in ("model", "max_tool_calls"):
            continue
        assert typed[key] in (value.replace(",", ""), value.removesuffix(".0")), key
        checked += 1
    assert checked >= 15


OFFICIAL = '''
TOOLS_FOR_WIKI = [1]
TOOLS = [{"type": "function", "function": {"name": "look", "minItems": 1, "uniqueItems": True}}]
class Manager:
    def __init__(self, config):
        if config.search_engine == "rag":
            self.system_prompt = f"""No. {strftime("%Y")}"""
        elif config.search_engine == "online_search":
            self.tools = TOOLS
            self.system_prompt = f"""Day {strftime("%F", gmtime())} \nspaces before the end  \n"""
        else:
            assert False
raise SystemExit("this is not to be run")
'''


def test_the_authors_texts_are_taken_letter_by_letter(tmp_path):
    metrics = "PROMPT='''\\'\\'\\'x{question} \n'''"
    for name, text in (
        ("scrl/llm_agent/generation.py", OFFICIAL),
        ("evaluate/cacluate_metrics.py", metrics),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    command = [
        sys.executable,
        "-m",
        "scripts.official_texts",
        str(tmp_path),
        str(tmp_path / "authors"),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    texts = {path.name: path.read_bytes().decode() for path in (tmp_path / "authors").iterdir()}
    assert texts.pop("tools.json") == json.dumps(
        [{"type": "function", "function": {"name": "look", "minItems": 1, "uniqueItems": True}}]
    )
    assert texts == {
        "system.txt": "Day {date} \nspaces before the end  \n",
        "judge.txt": "'''x{question} \n",
    }
    (tmp_path / "evaluate/cacluate_metrics.py").unlink()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and "cacluate_metrics.py" in done.stderr
        and "Traceback" not in done.stderr
    )
