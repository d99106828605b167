"""Every name of vLLM that our engine uses stands in vLLM's sources, read and never imported: those
that are installed (a build for CPUs), and, by hand, those of the wheel that requirements.txt names,
which a machine without a GPU can download but not run:

    pytest tests/test_vllm_sources.py -m "quick or by_hand"
"""

import ast
import dataclasses
import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deepresearcher_min import engine

ROOT = Path(__file__).resolve().parent.parent
OURS = ast.parse(Path(engine.__file__).read_text())


class Sources:
    """The Python files of one vLLM."""

    def __init__(self, folder: Path):
        self.folder = folder

    def text(self, file: str) -> str:
        return (self.folder / file).read_text()

    def find(self, file: str, name: str) -> ast.AST:
        """The class, function or method, such as LLM.sleep."""
        node: ast.AST = ast.parse(self.text(file))
        for part in name.split("."):
            inner = [n for n in ast.iter_child_nodes(node) if getattr(n, "name", "") == part]
            assert inner, f"{file} has no {name}"
            node = inner[0]
        return node

    def parameters(self, file: str, name: str) -> list[str]:
        """In order, without self; those behind * as well."""
        given = self.find(file, name).args
        return [argument.arg for argument in [*given.args, *given.kwonlyargs]][1:]

    def fields(self, file: str, name: str) -> set[str]:
        """A class's annotated attributes, and those that a method sets."""
        found = set()
        for node in ast.walk(self.find(file, name)):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
        return found

    def literal(self, file: str, name: str) -> set[str]:
        """The strings of an assignment, such as those of a Literal."""
        for node in ast.parse(self.text(file)).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
                return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
        raise AssertionError(f"{file} has no {name}")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("installed", marks=pytest.mark.quick),
        pytest.param("required", marks=pytest.mark.by_hand),
    ],
)
def sources(request, tmp_path_factory) -> Sources:
    if request.param == "installed":
        installed = importlib.util.find_spec("vllm")
        if installed is None:
            pytest.skip("no vLLM is installed")
        return Sources(Path(installed.origin).parent)
    folder = tmp_path_factory.mktemp("wheel")
    named = re.search(r"^vllm==\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[0]
    options = ["--no-deps", "--only-binary=:all:", "--platform=manylinux_2_28_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "-q", *options, "-d", folder, named]
    subprocess.run(command, check=True, timeout=1200)
    with zipfile.ZipFile(next(folder.glob("vllm-*.whl"))) as wheel:
        for name in wheel.namelist():
            if name.startswith("vllm/") and name.endswith(".py"):
                wheel.extract(name, folder)
    return Sources(folder / "vllm")


def our_class() -> ast.ClassDef:
    return next(node for node in OURS.body if getattr(node, "name", "") == "VLLMEngine")


def our_calls(method: str) -> list[ast.Call]:
    calls = [node for node in ast.walk(our_class()) if isinstance(node, ast.Call)]
    return [call for call in calls if getattr(call.func, "attr", "") == method]


def our_keywords(method: str) -> set[str]:
    """Those of our calls, and those of the dicts that they unpack."""
    found = set()
    for call in our_calls(method):
        for keyword in call.keywords:
            if keyword.arg:
                found.add(keyword.arg)
            elif "asdict" in ast.unparse(keyword.value):
                found |= {field.name for field in dataclasses.fields(engine.Sampling)}
            else:  # **name, or **(name if ... else name)
                for node in ast.walk(keyword.value):
                    if isinstance(node, ast.Name) and node.id != "self":
                        found |= dict_keys(node.id)
    return found


def dict_keys(variable: str, default: tuple | None = None) -> set[str]:
    """Of all dicts that are assigned to a name, and of those that they unpack."""
    found = set()
    for node in ast.walk(our_class()):
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if variable not in [getattr(target, "id", "") for target in targets]:
            continue
        for inner in ast.walk(node.value):
            if isinstance(inner, ast.Call):
                found |= {keyword.arg for keyword in inner.keywords}
            if isinstance(inner, ast.Dict):
                found |= {key.value for key in inner.keys if key is not None}
            if isinstance(inner, ast.Name) and inner.id != variable:
                found |= dict_keys(inner.id, ())
    assert found or default is not None, variable
    return found


def methods_of(owner: str) -> set[str]:
    """What our engine calls on self.llm or self.engine."""
    found = set()
    for node in ast.walk(our_class()):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and ast.unparse(called.value) == f"self.{owner}":
            found.add(called.attr)
    return found


LLM, CORE = "entrypoints/llm.py", "v1/engine/llm_engine.py"


def test_the_model_and_the_request_take_our_keywords(sources):
    known = {*sources.parameters(LLM, "LLM.__init__")}
    known |= sources.fields("engine/arg_utils.py", "EngineArgs")
    assert len(our_keywords("LLM")) > 12
    assert our_keywords("LLM") <= known
    known = sources.fields("sampling_params.py", "SamplingParams")
    assert len(our_keywords("SamplingParams")) > 6
    assert our_keywords("SamplingParams") <= known


@pytest.mark.parametrize(
    ("owner", "file", "name"), [("llm", LLM, "LLM"), ("engine", CORE, "LLMEngine")]
)
def test_the_methods_exist_and_take_our_arguments(sources, owner, file, name):
    methods = methods_of(owner)
    assert len(methods) >= 4
    for method in methods:
        parameters = sources.parameters(file, f"{name}.{method}")
        for call in our_calls(method):
            assert {keyword.arg for keyword in call.keywords} <= {*parameters}, method
            assert len(call.args) <= len(parameters), method


def test_what_they_return_is_what_we_read(sources):
    assert ast.unparse(sources.find(LLM, "LLM.reset_prefix_cache").returns) == "bool"
    assert ast.unparse(sources.find(CORE, "LLMEngine.has_unfinished_requests").returns) == "bool"
    assert "list[RequestOutput" in ast.unparse(sources.find(CORE, "LLMEngine.step").returns)
    request = sources.fields("outputs.py", "RequestOutput")
    assert {"request_id", "prompt_token_ids", "num_cached_tokens", "outputs"} <= request
    completion = sources.fields("outputs.py", "CompletionOutput")
    assert {"token_ids", "logprobs", "finish_reason"} <= completion
    assert "logprobs" in sources.fields("logprobs.py", "FlatLogprobs")
    assert {"stop", "length"} <= sources.literal("v1/engine/__init__.py", "FINISH_REASON_STRINGS")
    assert "FINAL_ONLY" in ast.unparse(sources.find("sampling_params.py", "RequestOutputKind"))
    assert "num_gpu_blocks" in sources.fields("config/cache.py", "CacheConfig")
    sources.find("v1/engine/core_client.py", "InprocClient.shutdown")


def test_our_values_are_known(sources):
    assert "processed_logprobs" in sources.literal("config/model.py", "LogprobsMode")
    launchers = sources.literal("config/parallel.py", "DistributedExecutorBackend")
    assert "external_launcher" in launchers
    # The model's own sampling defaults are left out by this value.
    assert '"vllm"' in ast.unparse(sources.find("config/model.py", "ModelConfig")).replace("'", '"')


def test_the_environment_is_read(sources):
    ours = set(re.findall(r"VLLM_[A-Z0-9_]+", ast.unparse(our_class())))
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" in ours
    assert ours <= set(re.findall(r"VLLM_[A-Z0-9_]+", sources.text("envs.py")))
    launched = ast.unparse(
        sources.find("v1/executor/uniproc_executor.py", "ExecutorWithExternalLauncher")
    )
    assert "os.environ['RANK']" in launched and "os.environ['LOCAL_RANK']" in launched
    assert "env://" in launched


def test_the_worker_takes_new_weights_and_sleeps(sources):
    for runner in (
        "v1/worker/gpu_model_runner.py:GPUModelRunner",
        "v1/worker/gpu/model_runner.py:GPUModelRunner",
    ):
        file, name = runner.split(":")
        assert "weights_iterator" in sources.parameters(file, f"{name}.reload_weights")
    assert "level" in sources.parameters("v1/worker/gpu_worker.py", "Worker.sleep")
    assert "level == 2" in ast.unparse(sources.find("v1/worker/gpu_worker.py", "Worker.sleep"))
    sources.find("v1/worker/gpu_worker.py", "Worker.wake_up")
