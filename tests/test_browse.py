"""browse.py: segments, readers, and whole pages from corpus and web."""

import asyncio
import json
import time
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loopback import Server
from test_pages import ARTICLE, page

from deepresearcher_min import browse
from deepresearcher_min.browse import Browser, extract, parse_notes, segments
from deepresearcher_min.config import ConfigError, load_config
from deepresearcher_min.corpus import SENTENCE_END, Corpus
from deepresearcher_min.search import check_search
from deepresearcher_min.trajectory import Reading
from deepresearcher_min.web import Web, WebFailure

pytestmark = pytest.mark.quick
TOY = load_config(["--preset=toy"])
PAGE = "Amra Sool is a writer. She was born in Velden. Her cat is grey."


async def inline(function, *args):
    return function(*args)


def read_page(
    url, question, corpus, memory=(), config=TOY, web=None, engine=None, in_thread=inline
):
    counts = Counter()
    browser = Browser(config, web, corpus, in_thread, engine)
    return asyncio.run(browser.browse(url, Reading(question, memory=memory), counts)), counts


def test_corpus_page_gives_the_sentences_that_answer():
    memory = []
    notes, counts = read_page(
        "toy:amra", "Where was Amra Sool born?", Corpus([("Amra", "toy:amra", PAGE)]), memory
    )
    assert notes == [(0, "Amra Sool is a writer. She was born in Velden.")]
    assert not counts


def test_unknown_page_and_useless_page_are_failures_in_words():
    corpus = Corpus([("Amra", "toy:amra", PAGE)])
    for url, question, kind in (
        ("toy:nobody", "Amra", "not_found"),
        ("toy:amra", "zebra?", "no_information"),
    ):
        with pytest.raises(WebFailure) as failure:
            read_page(url, question, corpus)
        assert failure.value.kind == kind and failure.value.words.endswith(".")


@given(st.text(alphabet="ab .\n", max_size=400), st.integers(5, 60))
def test_segments_lose_only_white_space(text, size):
    pieces = segments(text, size)
    assert all(0 < len(piece) <= size for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_segments_prefer_paragraph_borders():
    assert segments("a" * 60 + "\n\n" + "b. " * 20, 100) == ["a" * 60, ("b. " * 20).strip()]
    assert segments("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]


def test_a_long_text_is_cut_in_linear_time():
    start = time.process_time()
    assert sum(map(len, segments("word " * 1_000_000, 8000))) > 4_900_000
    assert time.process_time() - start < 0.3  # 0.01 s measured


def test_extractive_reader_returns_nothing_where_nothing_is_shared():
    assert extract("zebra?", PAGE) == ""


def test_english_sentences_end_as_ever():
    text = 'It is 3.5 m (approx.) high. "Is it?" No!Yes... So “it is.” Dr. Who\nsaid x.y.z. End'
    assert SENTENCE_END.sub("", text) == text
    assert extract("high end", text) == "It is 3.5 m (approx.) high. End"


# --- readers


def test_notes_are_read_from_tidy_and_untidy_replies():
    assert parse_notes("CONTINUE: yes\nNOTES: Born in Velden.") == ("Born in Velden.", True)
    assert parse_notes("NOTES: Born in Velden.\nCONTINUE: no") == ("Born in Velden.", False)
    assert parse_notes("<think>hm</think>**Continue**: No\n**Notes:** none") == ("", False)
    assert parse_notes("She was born in Velden.") == ("She was born in Velden.", False)
    assert parse_notes("") == parse_notes("none.") == ("", False)
    told = "The talks continue. No date is known."
    assert parse_notes(f"CONTINUE: yes\nNOTES: {told}") == (told, True)
    assert parse_notes(f"NOTES: {told}\nCONTINUE: yes") == (told, True)


class Scripted:
    """An engine that says what a script says."""

    def __init__(self, *replies):
        self.replies, self.prompts = list(replies), []

    async def __call__(self, messages):
        self.prompts.append(messages)
        return self.replies.pop(0)


def long_page(parts):
    return Corpus(
        [("Long", "toy:long", "\n\n".join(f"Part {i}. " + "word " * 20 for i in range(parts)))]
    )


def test_the_reader_goes_on_while_it_wants_to_remembers_and_stops_at_the_last_segment():
    config = replace(TOY, reader="engine", segment_chars=120, max_segments=4)
    engine, memory = (
        Scripted(
            "CONTINUE: yes\nNOTES: A.", "CONTINUE: yes\nNOTES: none", "CONTINUE: no\nNOTES: C."
        ),
        ["before"],
    )
    notes, _ = read_page("toy:long", "q", long_page(9), memory, config, engine=engine)
    assert notes == [(0, "A."), (2, "C.")] and memory == ["before"]
    assert (
        "Part 0" in engine.prompts[0][1]["content"]
        and "before\nA." in engine.prompts[1][1]["content"]
    )
    always = Scripted(*["CONTINUE: yes\nNOTES: More."] * 9)
    for parts, read in ((9, 4), (2, 2)):
        notes, _ = read_page("toy:long", "q", long_page(parts), [], config, engine=always)
        assert len(notes) == read


def completion(text, **usage):
    return 200, {}, {"choices": [{"message": {"content": text}}], **usage}


@pytest.fixture
def live(tmp_path, monkeypatch):
    """(server, config, web) of a live page and a reading model, both on loopback."""
    monkeypatch.setenv("READER_API_KEY", "secret-key")
    with Server({"/page": (200, {}, page(f"<article>{ARTICLE}</article>").encode())}) as server:
        config = replace(
            load_config(["--preset=paper"]),
            reader="openai",
            reader_url=server.url + "/v1",
            reader_model="m",
            price_reader_token=0.01,
            allow_private_hosts=True,
            max_retries=0,
            read_timeout=2.0,
            segment_chars=600,
        )
        web = Web(config, tmp_path / "cassette.sqlite")
        yield server, config, web
        web.close()


def test_openai_reader_asks_pays_and_caches_by_content(live):
    server, config, web = live
    server.pages["/v1/chat/completions"] = completion(
        "CONTINUE: no\nNOTES: The Ost.", usage={"total_tokens": 50}
    )
    for round_ in range(2):
        notes, counts = read_page(server.url + "/page", "Which river?", None, [], config, web)
        assert notes == [(0, "The Ost.")]
        assert counts["reader_tokens"] == (0 if round_ else 50)
        assert counts["cache_hits"] == (2 if round_ else 0) and counts["usd"] == (
            0 if round_ else 0.5
        )
    _, headers, body = server.sent[1]
    assert headers["Authorization"] == "Bearer secret-key"
    assert (
        json.loads(body)["model"] == "m"
        and "Which river?" in json.loads(body)["messages"][1]["content"]
    )
    replay = Web(replace(config, cassette_mode="replay"), web.cassette)
    before = sum(server.requests.values())
    assert read_page(server.url + "/page#part", "Which river?", None, [], config, replay)[0] == [
        (0, "The Ost.")
    ]
    with pytest.raises(WebFailure, match="replay_miss"):
        read_page(server.url + "/other", "Which river?", None, [], config, replay)
    assert sum(server.requests.values()) == before
    replay.close()


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ((200, {}, {}), "bad_reply"),
        ((200, {}, b"oops"), "bad_reply"),
        (completion(None), "bad_reply"),
        ((401, {}, b""), "unauthorized"),
        ((500, {}, b""), "http_500"),
        (completion("none"), "no_information"),
    ],
)
def test_a_reader_that_fails_is_a_failure_in_words(live, reply, kind):
    server, config, web = live
    server.pages["/v1/chat/completions"] = reply
    with pytest.raises(WebFailure) as failure:
        read_page(server.url + "/page", "Which river?", None, [], config, web)
    assert failure.value.kind == kind and failure.value.words.endswith(".")


def test_notes_taken_before_a_failure_are_kept(live):
    server, config, web = live
    first = completion("CONTINUE: yes\nNOTES: First.")
    server.pages["/v1/chat/completions"] = lambda number: first if number == 1 else (500, {}, b"")
    notes, counts = read_page(server.url + "/page", "q", None, [], config, web)
    assert notes == [(0, "First.")] and counts["fail_reader_http_500"] == 1


def test_a_slow_reader_meets_the_deadline_of_the_call(live):
    server, config, web = live
    server.pages["/v1/chat/completions"] = completion("NOTES: none")
    with pytest.raises(WebFailure, match="no_information"):
        # The page is in the cassette now.
        read_page(server.url + "/page", "another question", None, [], config, web)
    server.pages["/v1/chat/completions"] = lambda _: server.over.wait(2) or completion("late")
    start = time.monotonic()
    with pytest.raises(WebFailure, match="timeout"):
        read_page(server.url + "/page", "q", None, [], replace(config, tool_timeout=0.4), web)
    assert time.monotonic() - start < 1.2
    replay = Web(replace(config, cassette_mode="replay"), web.cassette)
    with pytest.raises(WebFailure, match="timeout"):
        # What is recorded is that it was late.
        read_page(server.url + "/page", "q", None, [], config, replay)
    replay.close()


@pytest.mark.parametrize(
    ("changes", "temperature", "cap"),
    [
        ({}, 0, 600),
        ({"reader_temperature": 0.6, "reader_tokens": 0}, 0.6, None),
        ({"reader_tokens": 9}, 0, 9),
    ],
)
def test_the_reader_is_sent_the_temperature_and_the_cap_that_the_keys_say(
    live, changes, temperature, cap
):
    server, config, web = live
    server.pages["/v1/chat/completions"] = completion("NOTES: The Ost.")
    read_page(server.url + "/page", "Which river?", None, [], replace(config, **changes), web)
    sent = json.loads(server.sent[-1][2])
    assert sent["temperature"] == temperature and sent.get("max_tokens") == cap
    assert sent.keys() - {"max_tokens"} == {"model", "messages", "temperature"}


@pytest.mark.parametrize(
    "changes",
    [
        {"reader_temperature": 0.6},
        {"reader_tokens": 0},
        {"reader_model": "other"},
        {"segment_chars": 500},
    ],
)
def test_a_recording_under_other_settings_of_the_reader_does_not_answer(live, changes):
    server, config, web = live
    server.pages["/v1/chat/completions"] = completion("NOTES: The Ost.")
    url = server.url + "/page"
    read_page(url, "Which river?", None, [], config, web)
    replay = Web(replace(config, cassette_mode="replay"), web.cassette)
    assert read_page(url, "Which river?", None, [], config, replay)[0] == [(0, "The Ost.")]
    with pytest.raises(WebFailure, match="replay_miss"):
        read_page(url, "Which river?", None, [], replace(config, **changes), replay)
    replay.close()


def test_the_reader_sees_as_much_of_earlier_notes_as_it_may():
    memory = ["oldest " * 5, "middle", "newest"]
    for most, seen in ((12, "iddle\nnewest"), (0, "\n".join(memory))):
        engine = Scripted("NOTES: none")
        with pytest.raises(WebFailure, match="no_information"):
            config = replace(TOY, reader="engine", reader_memory=most)
            read_page(
                "toy:amra", "q", Corpus([("Amra", "toy:amra", PAGE)]), memory, config, engine=engine
            )
        assert f"Earlier notes: {seen}\n\nPage segment 1 of 1:" in engine.prompts[0][1]["content"]


def test_a_whole_browse_has_a_deadline_of_its_own_and_each_reading_keeps_tool_timeout(live):
    server, config, web = live
    url = server.url + "/page"
    server.pages["/v1/chat/completions"] = lambda _: (
        time.sleep(0.25) or completion("CONTINUE: yes\nNOTES: More.")
    )
    config = replace(config, segment_chars=190, max_segments=0)
    # The page is in the cassette now.
    read_page(url, "q", None, [], replace(config, max_segments=1), web)
    config, read = replace(config, tool_timeout=0.7), {}
    for limit in (-1.0, 0.0, 1.3):
        notes, counts = read_page(
            url, f"q {limit}", None, [], replace(config, browse_timeout=limit), web
        )
        read[limit] = len(notes), counts["fail_page_timeout"] + counts["fail_reader_timeout"]
    assert read[0.0][0] >= 6 and read[0.0][1] == 0 and read[-1.0][1] == read[1.3][1] == 1
    assert 1 <= read[-1.0][0] <= 2 < read[1.3][0] <= 5
    # One reading alone has no longer than tool_timeout.
    with pytest.raises(WebFailure, match="timeout"):
        read_page(url, "late", None, [], replace(config, browse_timeout=0.0, tool_timeout=0.1), web)


def test_a_model_may_be_silent_until_its_reply_is_whole_and_a_page_may_not(live):
    server, config, web = live
    server.pages["/v1/chat/completions"] = lambda _: (
        time.sleep(0.5) or completion("NOTES: The Ost.")
    )
    hasty = Web(replace(config, read_timeout=0.2), web.cassette)
    assert read_page(server.url + "/page", "Which river?", None, [], hasty.config, hasty)[0] == [
        (0, "The Ost.")
    ]
    with pytest.raises(WebFailure, match="timeout"):
        read_page(server.url + "/fault/silence", "q", None, [], hasty.config, hasty)
    hasty.close()


def test_a_reader_waits_in_the_thread_that_tools_are_given_and_counts_tokens_as_it_can(live):
    server, config, web = live
    server.pages["/v1/chat/completions"] = completion("NOTES: The Ost.", usage={"prompt_tokens": 7})
    asked = []

    async def in_thread(function, *args):
        asked.append(function.__name__)
        return function(*args)

    url = server.url + "/page"
    notes, counts = read_page(url, "Which river?", None, [], config, web, in_thread=in_thread)
    assert notes == [(0, "The Ost.")]
    assert asked == ["fetch_text", "ask_service"] and counts["reader_tokens"] > 100


@pytest.mark.parametrize("mode", ["live", "record"])
def test_a_page_that_other_code_has_read_is_read_again_in_mode_live_only(live, monkeypatch, mode):
    server, config, web = live
    config = replace(config, reader="extractive", cassette_mode=mode)
    again = Web(config, web.cassette)
    for _ in range(2):
        read_page(server.url + "/page", "Where does the Ost rise?", None, [], config, again)
    assert server.requests["/page"] == 1
    monkeypatch.setattr(browse, "EXTRACTOR", "after an edit")
    for _ in range(2):
        read_page(server.url + "/page", "Where does the Ost rise?", None, [], config, again)
    assert server.requests["/page"] == (2 if mode == "live" else 1)
    again.close()


def test_live_pages_that_cannot_be_read_say_so(live):
    server, config, web = live
    config = replace(config, reader="extractive")
    server.pages["/empty"] = (200, {}, b"<html><body></body></html>")
    server.pages["/script"] = (200, {}, b"<html><body><script>render()</script></body></html>")
    for path, kind in (
        ("/empty", "no_text"),
        ("/script", "no_text"),
        ("/missing", "http_404"),
        ("/fault/picture", "content_type"),
    ):
        with pytest.raises(WebFailure) as failure:
            read_page(server.url + path, "q", None, [], config, web)
        assert failure.value.kind == kind
    notes, counts = read_page(
        server.url + "/page", "Where does the Ost rise?", None, [], config, web
    )
    assert "Velden" in notes[0][1] and counts["bytes"] > 0


def test_readers_say_what_they_lack(monkeypatch):
    monkeypatch.delenv("READER_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="reader_url"):
        check_search(replace(TOY, reader="openai"))
    with pytest.raises(ConfigError, match="READER_API_KEY"):
        check_search(replace(TOY, reader="openai", reader_url="http://x/v1", reader_model="m"))
