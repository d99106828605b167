"""browse.py: PDF files, broken and encrypted ones included."""

import io
import re

import pypdf
import pytest

from deepresearcher_min.browse import main_text, parse

pytestmark = pytest.mark.quick


def pdf(text):
    """A PDF file of one page."""
    content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        (
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R"
            b"/Resources<</Font<</F1 5 0 R>>>>>>"
        ),
        b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj%s endobj\n" % (number, body)
    rows = b"".join(b"%010d 00000 n \n" % place for place in places)
    return (
        out
        + b"xref\n0 6\n0000000000 65535 f \n%strailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF"
        % (
            rows,
            len(out),
        )
    )


def test_pdf_and_plain_text():
    assert main_text(pdf("The Ost is a river."), "application/pdf") == "The Ost is a river."
    assert main_text(pdf("The Ost is a river."), "text/html") == "The Ost is a river."
    assert main_text(b"a <b> c\r\n\r\n\r\nd\x07", "text/plain") == "a <b> c\n\nd"
    for broken in (
        b"%PDF-1.7",
        b"%PDF-1.4 trailer<</Root 1 0 R>>",
        pdf("x")[:200],
        pdf("x").replace(b"/Kids[3", b"/Kids[2"),
    ):
        assert isinstance(main_text(broken, "application/pdf"), str)


def pdf_of_three(**encryption):
    writer = pypdf.PdfWriter()
    for number in range(3):
        writer.append(io.BytesIO(pdf(f"Page {number} tells of the Ost.")))
    if encryption:
        writer.encrypt(**encryption)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


KIDS = rb"(/Kids \[ \d+ 0 R )\d+"  # the reference to the second page follows
BROKEN_PAGES = {
    "content": lambda file: file.replace(b"12 Tf 72 720 Td (Page 1", b"zz Tf [ << 720 Td (Page 1"),
    "compression": lambda file: file.replace(
        b"stream\nBT /F1 12 Tf 72 720 Td (Page 1", b"stream\nBT ] >> (Page 1"
    ),
    "missing": lambda file: re.sub(KIDS, rb"\g<1>99", file),
    "no page": lambda file: re.sub(KIDS, rb"\g<1>1", file),
}


@pytest.mark.parametrize("name", BROKEN_PAGES)
def test_a_broken_page_of_a_pdf_costs_only_itself(name):
    whole = pdf_of_three()
    broken = BROKEN_PAGES[name](whole)
    text = main_text(broken, "application/pdf")
    assert (
        broken != whole
        and "Page 0 tells of the Ost." in text
        and "Page 2 tells of the Ost." in text
    )


@pytest.mark.parametrize("cut", ["startxref", "trailer", "xref", "endobj"])
def test_a_pdf_without_its_end_gives_what_can_be_read(cut):
    whole = pdf_of_three()
    text = main_text(whole[: whole.rfind(cut.encode())], "application/pdf")
    assert "Page 0 tells of the Ost." in text and "Page 1 tells of the Ost." in text


@pytest.mark.parametrize("algorithm", ["RC4-40", "RC4-128", "AES-128", "AES-256-R5", "AES-256"])
def test_an_encrypted_pdf_is_read_if_it_opens_without_a_password(algorithm):
    free = pdf_of_three(user_password="", owner_password="no printing", algorithm=algorithm)
    assert [f"Page {number}" in main_text(free, "application/pdf") for number in range(3)] == [
        True
    ] * 3
    locked = pdf_of_three(user_password="secret", owner_password="other", algorithm=algorithm)
    assert (
        main_text(locked, "application/pdf") == ""
        and "password" in parse(locked, "application/pdf")[1]
    )
