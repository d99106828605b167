"""browse.py: encodings of pages, and sentences of scripts other than ours."""

import pytest
from test_pages import page

from deepresearcher_min.browse import decode, extract, main_text, parse, segments

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("body", "content_type", "expected"),
    [
        ("Grüße".encode(), "text/html", "Grüße"),
        ("Grüße €".encode("cp1252"), "text/html; charset=ISO-8859-1", "Grüße €"),
        ("Grüße".encode("cp1252"), "text/html", "Grüße"),
        (
            b'<meta charset="windows-1251">' + "Река".encode("cp1251"),
            "text/html",
            '<meta charset="windows-1251">Река',
        ),
        (b'<meta charset="utf-16">' + "Река".encode(), "text/html", '<meta charset="utf-16">Река'),
        ("川".encode("cp932"), "text/html; charset=Shift_JIS", "川"),
        ("河".encode("gb18030"), 'text/html; charset="gb2312"', "河"),
        (b"\xef\xbb\xbf" + "ü".encode(), "text/html; charset=latin-1", "ü"),
        (b"\xff\xfe" + "ü".encode("utf-16-le"), "text/html", "ü"),
        (b"abc", "text/html; charset=rot13", "abc"),
        (b"abc", "text/html; charset=hex", "abc"),
        (b"+ADw-script+AD4-", "text/html; charset=utf-7", "+ADw-script+AD4-"),
        (b"ok \xff\xfe\xfa", "text/html; charset=utf-8", "ok \ufffd\ufffd\ufffd"),
    ],
)
def test_encodings_are_read_as_browsers_read_them(body, content_type, expected):
    assert decode(body, content_type) == expected


SCRIPTS = {
    "gb18030": "这条河发源于山区，流经商人在十八世纪中叶建立的城市，每年春天仍然举行集市。",
    "big5": "這條河發源於山區，流經商人在十八世紀中葉建立的城市，每年春天仍然舉行市集。",
    "shift_jis": "この川は山地に源を発し、十八世紀の半ばに商人たちが築いた町を流れている。①",
    "euc-jp": "この川は山地に源を発し、十八世紀の半ばに商人たちが築いた町を流れている。",
    "euc-kr": "이 강은 산에서 시작하여 십팔 세기 중반에 상인들이 세운 도시를 지나 흐른다.",
    "windows-1251": "Река берёт начало в горах и течёт мимо города, который основали купцы.",
    "koi8-r": "Река берёт начало в горах и течёт мимо города, который основали купцы.",
    "windows-1253": "Ο ποταμός πηγάζει στα βουνά και περνά από την πόλη που ίδρυσαν έμποροι.",
    "windows-1255": "הנהר נובע בהרים ועובר ליד העיר שנוסדה על ידי סוחרים באמצע המאה.",
    "windows-1256": "ينبع النهر من الجبال ويمر بالمدينة التي أسسها التجار في القرن.",
    "windows-874": "แม่น้ำไหลจากภูเขาผ่านเมืองที่พ่อค้าก่อตั้งขึ้นในกลางศตวรรษ",
    "windows-1250": (
        "Rzeka wypływa z gór i przepływa przez miasto Łódź, które założyli także źli kupcy."
    ),
    "windows-1252": (
        "Der Fluß entspringt in den Hügeln, fließt durch größere Städte und heißt schöner Ost."
    ),
}
PYTHON = {"windows-874": "cp874", "shift_jis": "cp932"}


@pytest.mark.parametrize("label", SCRIPTS)
def test_a_page_is_read_in_its_encoding_wherever_that_is_said_or_not_said_at_all(label):
    sentence = SCRIPTS[label]

    def read(content, content_type="text/html", encoding=None):
        return main_text(content.encode(encoding or PYTHON.get(label, label)), content_type)

    paragraphs = f"<p>{sentence}</p>" * 12
    late = (
        "<script>"
        + "/* < */" * 400
        + f"</script><meta http-equiv=a content='text/html; charset={label}'>"
    )
    hidden = f"<!-- <meta charset=utf-8> --><meta charset='{label}'>"
    assert sentence in read(page(paragraphs)), "not declared"
    assert sentence in read(sentence * 4, "text/plain"), "not declared"
    assert sentence in read(page(paragraphs), "text/html; charset=x-unknown")
    assert sentence in read(page(paragraphs), "text/html; charset=utf-8"), "declared wrongly"
    assert label == "windows-1250" or sentence in read(
        page(paragraphs), "text/html; charset=iso-8859-1"
    )
    assert sentence in read(page(sentence), f"text/html; charset={label}")
    assert sentence in read(page(sentence, late))
    assert sentence in read(page(sentence, hidden))
    assert sentence in read(page(sentence, f"<meta charset={label}>"), "text/html; charset=utf-8")
    assert sentence in read(
        f"<?xml version='1.0' encoding='{label}'?>" + page(sentence), "application/xhtml+xml"
    )
    # What is valid UTF-8 is UTF-8, and so is what has one broken byte in it.
    assert sentence in read(page(sentence, f"<meta charset={label}>"), encoding="utf-8")
    assert sentence in read(page(sentence), f"text/html; charset={label}", "utf-8")
    assert sentence in main_text(
        page(paragraphs, f"<meta charset={label}>").encode() + b"\xe4<p>", "text/html"
    )


@pytest.mark.parametrize("label", list(SCRIPTS)[:5])
def test_bytes_too_few_to_be_judged_are_no_text_rather_than_a_wrong_one(label):
    body = SCRIPTS[label][:8].encode(PYTHON.get(label, label))
    assert parse(b"<p>" + body, "text/html") == (
        "",
        "The page's characters are in an unknown encoding.",
    )
    assert parse(b"<p>Only ASCII.", "text/html") == ("Only ASCII.", "")
    assert parse("<p>Grüße aus Köln.".encode("cp1252"), "text/html") == ("Grüße aus Köln.", "")


CHINESE = "绍兴是一座城市。鲁迅于1881年出生在绍兴！他写了「阿Q正传。」后来呢？他去了北京。"
THAI = "เชียงใหม่เป็นจังหวัดทางภาคเหนือ ดอยสุเทพสูง 1676 เมตร ประชากรพูดคำเมือง"


@pytest.mark.parametrize(
    ("question", "page_", "notes"),
    [
        ("鲁迅出生在哪里？", CHINESE, "鲁迅于1881年出生在绍兴！"),
        ("谁写了《阿Q正传》？", CHINESE, "他写了「阿Q正传。」"),
        ("北京", CHINESE, "他去了北京。"),
        (
            "平安京はいつ置かれましたか",
            "京都は古い都です。794年に平安京が置かれました。",
            "794年に平安京が置かれました。",
        ),
        ("ดอยสุเทพสูงเท่าไร", THAI, "ดอยสุเทพสูง 1676 เมตร"),
        ("ទន្លេមេគង្គ", "ភ្នំពេញជារាជធានី។ ទីក្រុងនេះនៅលើទន្លេមេគង្គ។", "ទីក្រុងនេះនៅលើទន្លេមេគង្គ។"),
        ("यमुना", "दिल्ली राजधानी है। यमुना यहाँ बहती है।", "यमुना यहाँ बहती है।"),
        ("斑马", CHINESE, ""),
    ],
)
def test_the_extractive_reader_knows_sentences_of_other_scripts(question, page_, notes):
    assert extract(question, page_) == notes


def test_segments_end_with_sentences_of_other_scripts():
    for sentence in ("鲁迅于一八八一年出生在绍兴。", "猫は何匹いますか？", "ទីក្រុងនេះនៅលើទន្លេមេគង្គ។"):
        pieces = segments(sentence * 50, 100)
        assert len(pieces) > 1 and all(piece.endswith(sentence[-1]) for piece in pieces)
        assert "".join(pieces) == sentence * 50
    assert segments("One. Two! 三。 four", 12)[0] == "One. Two! 三。"
