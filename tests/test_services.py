"""Services seen before a run begins: tried, named with their own words, asked without what they
refuse.
"""

import json
from collections import Counter
from dataclasses import replace

import pytest
from loopback import CONFIG, Server
from service_world import KEY, World, arguments, completion, keys, training  # noqa: F401

import eval as evaluation
import train
from deepresearcher_min.rollout import try_services
from deepresearcher_min.search import ask_model
from deepresearcher_min.web import WebFailure


def serper(server: Server | None, **changes):
    address = server.url if server else "http://127.0.0.1:9"
    return replace(CONFIG, search="serper", search_url=address, tool_timeout=5.0, **changes)


# --- before a run begins

REPLIES = [
    (
        (401, {}, {"error": {"message": f"Incorrect API key provided: {KEY}."}}),
        "unauthorized",
        "Incorrect API key",
    ),
    (
        (403, {}, {"message": "Unauthorized.", "statusCode": 403}),
        "unauthorized",
        "It said: Unauthorized.",
    ),
    (
        (403, {}, b"<html><body><h1>Forbidden</h1>json is off</body></html>"),
        "unauthorized",
        "Forbidden json is off",
    ),
    (
        (400, {}, {"message": "Not enough credits", "statusCode": 400}),
        "quota",
        "Not enough credits",
    ),
    ((402, {}, {"detail": "Please pay."}), "quota", "Please pay."),
    (
        (432, {}, {"detail": {"error": "The plan's limit is reached"}}),
        "quota",
        "The plan's limit is reached",
    ),
    (
        (429, {"Retry-After": "900"}, {"error": {"code": "RATE_LIMITED"}}),
        "rate_limited",
        "RATE_LIMITED",
    ),
    ((500, {}, b"\x1b[31mout of memory\x1b[0m"), "http_500", "out of memory"),
    (
        (200, {}, b"<html><script>var x</script><p>Please log in</p></html>"),
        "bad_reply",
        "Please log in",
    ),
    (
        (200, {}, {"error": {"info": "too many requests today"}}),
        "bad_reply",
        "too many requests today",
    ),
    ((200, {}, {"surprise": 1}), "bad_reply", ""),
]


@pytest.mark.quick
@pytest.mark.parametrize(("reply", "kind", "said"), REPLIES)
def test_a_service_that_fails_its_trial_is_named_with_its_own_words(reply, kind, said):
    with Server({"/search": reply}) as server:
        trouble = try_services(serper(server))
    assert (
        f"the search service at {server.url} does not work ({kind}: " in trouble and said in trouble
    )
    assert "SERPER_API_KEY" in trouble and KEY not in trouble and trouble.isprintable()


@pytest.mark.quick
def test_the_trial_of_a_server_that_is_not_there():
    assert "(connection: " in try_services(serper(None))
    nowhere = replace(serper(None), search="retriever", search_url="http://no-such-host.invalid")
    assert "No server with the name no-such-host.invalid can be found" in try_services(nowhere)
    with Server({"/search": None}) as server:
        server.pages["/search"] = lambda _: server.over.wait(20)
        assert "(timeout: " in try_services(replace(serper(server), tool_timeout=0.3))


@pytest.mark.quick
def test_only_what_a_run_will_use_is_tried_and_finding_nothing_passes():
    with Server({"/search": (200, {}, {"organic": []})}) as server:
        assert try_services(serper(server)) == ""
        assert sum(server.requests.values()) == 1
        dead = replace(
            serper(None), reader_url="http://127.0.0.1:9", judge_url="http://127.0.0.1:9"
        )
        assert try_services(dead, asks=False) == try_services(replace(dead, max_tool_calls=0)) == ""
        assert try_services(replace(dead, search="local")) == ""
        assert "the search service" in try_services(replace(dead, max_tool_calls=0, method="rag"))
        assert "the reader service" in try_services(replace(dead, search="local", reader="openai"))
        assert (
            "judge_model and" not in (said := try_services(dead, asks=False, judges=True))
            and "JUDGE_API_KEY" in said
        )


@pytest.mark.quick
def test_a_run_does_not_begin_without_its_services(tmp_path, capsys):
    with World(lambda role, number: True) as server:
        for main, more in (
            (train.main, training(server, tmp_path)),
            (
                evaluation.main,
                arguments(server, tmp_path, "--model=toy", f"--run_dir={tmp_path / 'run'}"),
            ),
        ):
            assert main(more) == 2
            shown = capsys.readouterr()
            assert shown.out == "" and len(shown.err.splitlines()) == 1
            assert "maintenance until noon" in shown.err and server.url in shown.err
        assert not (tmp_path / "run").exists() and server.calls["search"] == 2


# --- endpoints that refuse a parameter

DIALECTS = [  # refused parameter -> message, how it is asked for then, status, body
    (
        "temperature",
        "",
        400,
        {"error": {"message": "temperature: only the default (1) is supported"}},
    ),
    ("temperature", "", 400, {"error": {"message": "Unsupported value", "param": "temperature"}}),
    (
        "temperature",
        "",
        422,
        {"detail": [{"loc": ["body", "temperature"], "msg": "Extra inputs are not permitted"}]},
    ),
    (
        "temperature",
        "",
        400,
        {"object": "error", "message": "`temperature` is deprecated for this model."},
    ),
    ("max_tokens", "", 400, b"unknown field maxTokens"),
    (
        "max_tokens",
        "max_completion_tokens",
        400,
        {
            "error": {
                "message": "'max_tokens' is not supported with this "
                "model. Use 'max_completion_tokens' instead.",
                "param": "max_tokens",
            }
        },
    ),
]


@pytest.mark.quick
@pytest.mark.parametrize(("name", "instead", "status", "body"), DIALECTS)
def test_a_refused_parameter_is_left_out_from_then_on(
    open_web, capsys, name, instead, status, body
):
    with Server() as server:

        def answer(_):
            sent = json.loads(server.sent[-1][2])
            return (status, {}, body) if name in sent else completion("Fine.")

        server.pages["/chat/completions"] = answer
        web, payload = (
            open_web(),
            {"model": "m", "messages": [], "temperature": 0, "max_tokens": 600},
        )
        for _ in range(3):
            assert (
                ask_model(
                    web, server.url + "/chat/completions", "READER_API_KEY", payload, Counter(), 1e9
                )[0]
                == "Fine."
            )
        sent = [json.loads(body) for _, _, body in server.sent]
        assert len(sent) == 4 and [name in each for each in sent] == [True, False, False, False]
        assert not instead or [each.get(instead) for each in sent] == [None, 600, 600, 600]
        other = {"temperature", "max_tokens"} - {name}
        assert all(other <= each.keys() for each in sent)
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1 and f"refuses {name}" in shown and server.url in shown


@pytest.mark.quick
def test_two_refused_parameters_and_what_is_no_refusal(open_web):
    def both(_):
        sent = json.loads(server.sent[-1][2])
        found = [name for name in ("max_tokens", "temperature") if name in sent]
        return (400, {}, {"error": f"no {found[0]}, please"}) if found else completion("Fine.")

    with Server(
        {"/both": both, "/never": (400, {}, {"error": "temperature, max_tokens: all is wrong"})}
    ) as server:
        web, payload = (
            open_web(),
            {"model": "m", "messages": [], "temperature": 0, "max_tokens": 600},
        )
        assert (
            ask_model(web, server.url + "/both", "READER_API_KEY", payload, Counter(), 1e9)[0]
            == "Fine."
        )
        assert len(server.sent) == 3
        with pytest.raises(WebFailure, match="all is wrong"):
            ask_model(web, server.url + "/never", "READER_API_KEY", payload, Counter(), 1e9)
        assert server.requests["/never"] == 3
        server.pages["/never"] = (400, {}, {"error": "context length: lower max_tokens"})
        server.sent.clear()
        with pytest.raises(WebFailure, match="context length"):
            ask_model(web, server.url + "/never", "READER_API_KEY", payload, Counter(), 1e9)
        # Nothing was remembered.
        assert [json.loads(body)["max_tokens"] for _, _, body in server.sent] == [600]
