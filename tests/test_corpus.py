"""search.Corpus: local search, and scripts without spaces."""

import json
import re
import time

import pytest

from deepresearcher_min import corpus as corpus_module
from deepresearcher_min import search
from deepresearcher_min.config import ConfigError, code_of
from deepresearcher_min.corpus import (
    SNIPPET_CHARS,
    Corpus,
    SearchResult,
    content_words,
    read_passage,
    words,
)

pytestmark = pytest.mark.quick
DOCUMENTS = [
    ("Amra Sool", "toy:amra-sool", "Amra Sool was born in Velden. Amra Sool wrote The Red Door."),
    ("Velden", "toy:velden", "Velden is a city on the river Ost."),
    ("Ost", "toy:ost", "The Ost is a river."),
]


def test_best_document_first_and_only_documents_that_share_a_word():
    corpus = Corpus(DOCUMENTS)
    assert [r.url for r in corpus.search("Where was Amra Sool born?", 10)] == ["toy:amra-sool"]
    assert [r.url for r in corpus.search("river Ost", 1)] == ["toy:ost"]
    assert corpus.search("zebra", 10) == []
    assert corpus.search("", 10) == []
    assert corpus.search("the", 10) != []  # a query of function words only is still a query
    assert corpus.pages.get("toy:velden") == DOCUMENTS[1][2]
    assert corpus.pages.get("https://elsewhere.example/") is None


def test_snippets_come_from_the_callback_or_from_the_beginning_of_the_text():
    assert (
        Corpus(DOCUMENTS, snippet=lambda i: f"number {i}").search("Velden city", 1)[0].snippet
        == "number 1"
    )
    long = Corpus([("Long", "toy:long", "word " * 200)]).search("long", 1)[0].snippet
    assert len(long) <= SNIPPET_CHARS + 4 and long.endswith("word ...")


def test_equal_scores_keep_corpus_order():
    corpus = Corpus([(f"Page {i}", f"toy:{i}", "Same words in every page.") for i in range(40)])
    assert [r.url for r in corpus.search("same words", 5)] == [f"toy:{i}" for i in range(5)]


def test_toy_size_query_is_cheap():
    corpus = Corpus(
        [
            (f"Person {i}", f"toy:{i}", f"Person {i} was born in City {i % 50} and wrote.")
            for i in range(250)
        ]
    )
    start = time.process_time()
    for i in range(300):
        corpus.search(f"where was Person {i % 250} born", 2)
    assert (
        time.process_time() - start
    ) / 300 < 0.001  # 0.1 ms measured; the limit leaves room for a loaded machine


def test_another_rule_for_words_holds_at_once_and_nothing_is_kept_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"title": "Ost", "url": "u:1", "text": "C++ and C# are languages."}')
    assert Corpus.from_jsonl(file).search("c", 3) and Corpus.from_jsonl(file).search("c", 3)
    monkeypatch.setattr(corpus_module, "WORD", re.compile(r"[a-z+#]+"))
    corpus = Corpus.from_jsonl(file)
    assert corpus.search("c", 3) == [] and corpus.search("c++", 3)
    assert list(tmp_path.iterdir()) == [file]


def test_code_is_known_by_its_file_and_by_the_packages_that_it_uses(tmp_path):
    assert (
        code_of(search.__file__) + code_of(corpus_module.__file__) == search.SOURCE
    )  # what a recorded search is known by
    (tmp_path / "module.py").write_text("x = 1")
    seen = {code_of(str(tmp_path / "module.py")), code_of(str(tmp_path / "module.py"), "bm25s")}
    (tmp_path / "module.py").write_text("x = 2")
    assert len({code_of(str(tmp_path / "module.py"), "bm25s"), *seen}) == 3


PASSAGES = [
    (
        {"title": "Ulm", "url": "https://u.example/", "text": "A city."},
        ("Ulm", "https://u.example/", "A city."),
    ),
    # BEIR
    (
        {"_id": "7", "title": "Ulm", "text": "A city.", "metadata": {}},
        ("Ulm", "passage:7", "A city."),
    ),
    # wiki-18
    (
        {"id": 0, "contents": '"Ulm"\nA city.\nOn a river.'},
        ("Ulm", "passage:0", "A city.\nOn a river."),
    ),
    ({"id": "7", "contents": "A city."}, ("", "passage:7", "A city.")),  # without a title line
    (
        {"id": "7", "title": "Ulm", "contents": "A city.\nOn a river."},
        ("Ulm", "passage:7", "A city.\nOn a river."),
    ),
    ({"id": "7", "title": "Ulm", "contents": "Ulm\nA city."}, ("Ulm", "passage:7", "A city.")),
    (
        {"id": "7", "title": None, "url": None, "text": "A city.", "contents": "x"},
        ("", "passage:7", "A city."),
    ),
    ("Ulm\nA city.", ("Ulm", "passage:2a9069d38f8b", "A city.")),
    # The same.
    ({"title": "Ulm", "text": "A city.", "id": None}, ("Ulm", "passage:2a9069d38f8b", "A city.")),
]


@pytest.mark.parametrize(("row", "passage"), PASSAGES)
def test_passages_are_read_with_whatever_they_lack(tmp_path, row, passage):
    assert read_passage(row) == passage
    (tmp_path / "corpus.jsonl").write_text("\ufeff" + json.dumps(row) + "\r\n", "utf-8")
    corpus = Corpus.from_jsonl(tmp_path / "corpus.jsonl")
    # They can be opened.
    assert corpus.documents == [passage] and corpus.pages == {passage[1]: passage[2]}


def test_an_address_with_several_passages_opens_as_all_of_them(tmp_path):
    rows = [
        ("Ost", "u:1", "Ost is a river."),
        ("Velden", "u:2", "A city."),
        ("Ost", "u:1", "Its spring is cold."),
    ]
    (tmp_path / "c.jsonl").write_text(
        "\n".join(json.dumps(dict(zip(("title", "url", "text"), r, strict=True))) for r in rows)
    )
    for corpus in (Corpus(rows), Corpus.from_jsonl(tmp_path / "c.jsonl")):
        assert corpus.search("cold spring", 3) == [
            SearchResult("Ost", "u:1", "Its spring is cold.")
        ]
        assert corpus.pages == {"u:1": "Ost is a river.\n\nIts spring is cold.", "u:2": "A city."}


# --- scripts without spaces

WORLD = [
    ("绍兴", "绍兴是浙江省的一座城市。鲁迅于1881年出生在绍兴。"),
    ("北京", "北京是中国的首都。它有２１００万人口。"),
    ("東京", "東京は日本の首都である。人口は約1400万人。"),
    ("京都", "京都は古い都です。794年に平安京が置かれました。"),
    ("กรุงเทพมหานคร", "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย ก่อตั้งเมื่อ พ.ศ. 2325"),
    ("เชียงใหม่", "เชียงใหม่เป็นจังหวัดทางภาคเหนือ มีดอยสุเทพ"),
    ("ភ្នំពេញ", "ភ្នំពេញជារាជធានីនៃប្រទេសកម្ពុជា។ ទីក្រុងនេះស្ថិតនៅលើទន្លេមេគង្គ។"),
    ("ရန်ကုန်", "ရန်ကုန်သည် မြန်မာနိုင်ငံ၏ အကြီးဆုံးမြို့ဖြစ်သည်။"),
    ("ວຽງຈັນ", "ວຽງຈັນແມ່ນນະຄອນຫຼວງຂອງປະເທດລາວ"),
    ("서울", "서울은 대한민국의 수도이다. 한강이 흐른다."),
    ("दिल्ली", "दिल्ली भारत की राजधानी है। यमुना यहाँ बहती है।"),
    ("London", "London is the capital of the United Kingdom."),
]
SCRIPTS = Corpus([(title, f"w:{title}", text) for title, text in WORLD])


@pytest.mark.parametrize(
    ("query", "title"),
    [
        ("鲁迅出生在哪里？", "绍兴"),
        ("中国的首都是哪个城市？", "北京"),
        ("2100万", "北京"),
        ("日本の首都はどこですか？", "東京"),
        ("平安京が置かれたのはいつですか", "京都"),
        ("都", "京都"),
        ("เมืองหลวงของประเทศไทยคืออะไร", "กรุงเทพมหานคร"),
        ("ดอยสุเทพอยู่ที่ไหน", "เชียงใหม่"),
        ("រាជធានីនៃប្រទេសកម្ពុជា", "ភ្នំពេញ"),
        ("မြန်မာနိုင်ငံ", "ရန်ကုန်"),
        ("ນະຄອນຫຼວງຂອງລາວ", "ວຽງຈັນ"),
        ("대한민국의 수도는?", "서울"),
        ("भारत की राजधानी", "दिल्ली"),
        ("capital of the United Kingdom", "London"),
    ],
)
def test_questions_find_pages_in_scripts_without_spaces(query, title):
    assert SCRIPTS.search(query, 3)[0].title == title


def test_words_of_scripts_without_spaces():
    assert words("iPad平板电脑") == ["ipad", "平板", "板电", "电脑"]
    assert words("食べた ｺｰﾋｰ") == ["食", "べた", "コー", "ーヒ", "ヒー"]
    assert words("ไทย ลาว") == ["ไทย", "ลาว"] and words("กรุงเทพ")[0] == "กรุ"
    assert words("ＮＨＫは１８８１年") == ["nhk", "は", "1881", "年"]
    assert words("दिल्ली है।") == ["दिल्ली", "है"]
    assert SCRIPTS.search("斑马有几条腿", 3) == SCRIPTS.search("ม้าลาย", 3) == []


def test_snippets_of_scripts_without_spaces_are_cut_anywhere():
    text = "绍兴是浙江省的一座城市。" * 60
    snippet = Corpus([("绍兴", "u", text)]).search("绍兴", 1)[0].snippet
    assert snippet == text[:SNIPPET_CHARS] + " ..."


def test_other_scripts_change_nothing_for_english():
    """Scores as the first version of this package computed them, with \\w+ as the only rule."""
    corpus = Corpus(DOCUMENTS)
    query = content_words("Where was Amra Sool's Red Door born in Velden?")
    assert query == ["amra", "sool", "s", "red", "door", "born", "velden"]
    scores = corpus.index.get_scores_from_ids(corpus.index.get_tokens_ids(query))
    assert scores.tolist() == [2.3118462562561035, 0.2746620774269104, 0.0]
    accented = "Brontë’s café – déjà vu, 10² m, ½ ﬁn, Łódź, Ἀθῆναι, Москва́"
    assert words(accented) == re.findall(r"\w+", accented.casefold())


HALF = '{"title": "a", "text": "half \\ud83d"}'  # half a surrogate pair, which no tokenizer takes


@pytest.mark.parametrize(
    "line", ["not json", '{"title": "x"}', "[1]", "7", "null", "[" * 100_000, HALF]
)
def test_a_bad_line_of_the_corpus_is_named(tmp_path, line):
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"title": "a", "url": "u", "text": "t"}\n' + line + "\n")
    with pytest.raises(ConfigError, match="line 2"):
        Corpus.from_jsonl(file)
