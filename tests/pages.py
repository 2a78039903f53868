"""What the tests of pages of HTML ask of them."""

from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """What the tests ask of a page: its elements with their attributes, and the text of every section."""

    def __init__(self, file):
        super().__init__()
        self.elements, self.texts, self.section, self.hidden = [], {}, "", False
        self.source = Path(file).read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.hidden = tag == "style"
        if tag == "section":
            self.section = dict(attrs)["id"]

    def handle_endtag(self, tag):
        self.hidden = False
        if tag == "section":
            self.section = ""

    def handle_data(self, data):
        if not self.hidden:
            self.texts[self.section] = " ".join(f"{self.texts.get(self.section, '')} {data}".split())

    def images(self):
        return [attributes for tag, attributes in self.elements if tag == "img"]


def alone(page):
    """Whether a page needs no other file, and every picture has a text."""
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert not [tag for tag, _ in page.elements if tag in ("script", "link", "iframe", "object", "embed")]
    assert "url(" not in page.source
    assert "@import" not in page.source
    for tag, attributes in page.elements:
        for name in ("src", "srcset"):
            assert attributes.get(name, "data:image/").startswith("data:image/"), tag
        assert attributes.get("href", "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    assert page.images()
    assert all(len(attributes["alt"]) > 40 for attributes in page.images())
    anchors = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {attributes["href"][1:] for tag, attributes in page.elements if tag == "a"} <= anchors
    return True
