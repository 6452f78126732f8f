"""How the packaged mails and pages look to those who read them: in Outlook, on a phone, in the dark, read aloud, and
in the reader's own language."""

import html
import json
import os
import re
import shutil
import subprocess
from datetime import date, datetime, timedelta
from email import message_from_bytes, policy
from html.parser import HTMLParser
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import pytest

from outbox.reports.language import find
from outbox.reports.render import Templates

ZONE = ZoneInfo("America/New_York")
MONDAY, NEXT = datetime(2026, 11, 16, tzinfo=ZONE), datetime(2026, 11, 23, tzinfo=ZONE)
WEEK = [{"day": date(2026, 11, 16) + timedelta(at), "done": done} for at, done in enumerate([9, 14, 6, 0, 11, 3, None])]
WIDE = [
    {"project": name, "budget_hours": 1234567.5 + at, "hours": 8.25, "tasks": at, "cost": 12_450, "note": "x" * at}
    for at, name in enumerate(["Apollo landing page", "Billing", "https://example.com/" + "y" * 80])
]
ITEMS = [
    {"id": n, "title": f"Sales {n}", "link": f"https://example.com/r/{n}", "waiting": 9, "made_at": MONDAY}
    for n in range(3)
]
SHAPES = {
    "week": (WEEK, "en", "progress"),
    "three": ([row | {"minutes": 10} for row in WEEK], "de", "progress"),
    "wide": (WIDE, "en-US", "progress"),
    "one": (WEEK[:1], "fr", "progress"),
    "nothing": ([], "it", "progress"),
    "long": ([{"who": f"w{at}", "done": at} for at in range(200)], "pl", "progress"),
    "right to left": (WEEK, "he", "progress"),
    "digest": (ITEMS, "es", "digest"),
}
VOID = {"meta", "br", "img", "hr"}


def rendered(shape, **changes):
    rows, tag, report = SHAPES[shape]
    language = find(tag)
    label = language.label(MONDAY, NEXT, "weekly")
    context = {
        "report": report,
        "title": "Progress",
        "period": SimpleNamespace(key="2026-W47", label=label, starts_at=MONDAY, ends_at=NEXT),
        "recipient": {"key": "1", "email": "ann@example.com", "name": "Ann"},
        "rows": rows,
        "columns": list(rows[0]) if rows else [],
        "link": "https://reports.example.com/r/3f9a",
        "sender": "Progress reports",
        "unsubscribe": "https://example.com/u/3f9a?a=1&b=2",
    }
    return Templates(None, report).render(context | changes, language)


class Element:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent = tag, attributes, parent
        self.children, self.texts = [], []
        if parent is not None:
            parent.children.append(self)
        self.style = {
            name.strip(): value.strip()
            for name, _, value in (part.partition(":") for part in (attributes.get("style") or "").split(";"))
            if name.strip()
        }

    def walk(self):
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def ancestors(self):
        element = self
        while element is not None:
            yield element
            element = element.parent

    @property
    def classes(self):
        return (self.attributes.get("class") or "").split()

    @property
    def words(self):
        return " ".join(" ".join(element.texts) for element in self.walk()).strip("\u034f\u200c\xa0 \n")


class Strict(HTMLParser):
    """A tree of elements; fails on what browsers would have to mend."""

    def __init__(self, text):
        super().__init__()
        assert text.startswith("<!DOCTYPE html>")
        self.root = self.here = Element("", {}, None)
        self.feed(text)
        self.close()
        assert self.here is self.root, f"<{self.here.tag}> is never closed"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        element = Element(tag, dict(attrs), self.here)
        if tag not in VOID:
            self.here = element

    def handle_endtag(self, tag):
        assert self.here.tag == tag, f"</{tag}> closes <{self.here.tag}>"
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.texts.append(data)


def tree(text):
    return Strict(text).root


def is_decoration(element):
    return any(one.attributes.get("aria-hidden") == "true" for one in element.ancestors)


@pytest.mark.parametrize("shape", SHAPES)
def test_markup_is_strict_and_says_what_it_is_to_who_has_it_read_aloud(shape):
    language = find(SHAPES[shape][1])
    made = rendered(shape)
    for text, is_mail in ((made.html, True), (made.page, False)):
        elements = list(tree(text).walk())
        ids = [element.attributes["id"] for element in elements if "id" in element.attributes]
        assert len(ids) == len(set(ids))
        (top,) = (element for element in elements if element.tag == "html")
        assert (top.attributes["lang"], top.attributes["dir"]) == (language.tag, language.direction)
        assert [element.tag for element in elements if re.fullmatch("h[1-6]", element.tag)] == ["h1"]
        for element in elements:
            if element.tag == "table" and is_mail:
                heads = [child for child in element.walk() if child.tag == "th"]
                is_data = any(next(one for one in head.ancestors if one.tag == "table") is element for head in heads)
                assert ("role" in element.attributes) != is_data, "a table is either for the layout or has heads"
            if element.tag == "th":
                assert element.attributes["scope"] == "col"
            if element.tag == "a":
                assert element.attributes["href"].startswith("https://")
                assert element.words
            assert element.tag != "img" or "alt" in element.attributes
            if is_decoration(element):
                assert not element.words, "what is said by a bar alone is said to nobody who cannot see it"
        ours = [element for element in elements if element.attributes.get("lang") == "en" and element.tag != "html"]
        assert bool(ours) != language.is_translated, "English in a mail of another language is marked"
    assert "https://example.com/u/3f9a?a=1&amp;b=2" in made.html
    assert "https://example.com/u/3f9a?a=1&b=2" in made.text
    assert max(map(len, made.text.splitlines())) <= 76 or shape == "wide", "a word of the user's may be longer"


# What Word, by which Outlook for Windows shows mail, makes something of, and what may be lost without harm.
TAGS = {"a", "body", "br", "div", "h1", "head", "html", "meta", "p", "span", "style", "table", "tbody", "td", "th",
        "thead", "title", "tr"}  # fmt: skip
SHOWN = {"background-color", "border", "border-bottom", "border-collapse", "color", "font-family", "font-size",
         "font-weight", "height", "line-height", "margin", "mso-line-height-rule", "mso-padding-alt", "padding",
         "text-align", "text-decoration", "white-space", "width"}  # fmt: skip
LOST = {"border-radius", "display", "font-variant-numeric", "max-width", "word-break", "-webkit-text-size-adjust"}
OUTLOOK_ONLY = re.compile(r"<!--\[if mso\]>(.*?)<!\[endif\]-->", re.DOTALL)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mail_keeps_its_looks_in_outlook_which_shows_it_as_word_does(shape):
    text = rendered(shape).html
    only = "".join(OUTLOOK_ONLY.findall(text))
    assert only.count("<table") == only.count("</table>") == 1, "what holds the width where there is no max-width"
    assert 'width="600"' in only
    preheader = next(element for element in tree(text).walk() if "mso-hide" in element.style)
    for element in tree(text).walk():
        if not element.tag or element.style == preheader.style:
            continue
        assert element.tag in TAGS
        style, attributes = element.style, element.attributes
        assert style.keys() <= SHOWN | LOST, element.tag
        if element.tag in {"td", "th"}:
            assert style.get("width", attributes.get("width")) == attributes.get("width")
            assert style.get("background-color") == attributes.get("bgcolor")
            assert style.get("text-align", attributes.get("align")) == attributes.get("align")
            if style.get("height"):
                assert f"{attributes['height']}px" == style["height"]
        if element.tag == "div":
            assert not style, "Word gives a div no looks"
        if element.words and element.tag in {"p", "h1", "th", "a"} and element.texts:
            sized = next(one for one in element.ancestors if "font-size" in one.style)
            assert "font-family" in sized.style, "Word passes no font on into a table"


def luminance(colour):
    levels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
    return sum(weight * level for weight, level in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    """WCAG 2.2, 1.4.3."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def looks(text, *, dark):
    """Each text of a mail with its colour and what is behind it, as the inline styles or the dark rules give them."""
    rules = {}
    if dark:
        (block,) = re.findall(r"@media \(prefers-color-scheme: dark\) \{\n(.*?)\n\}", text, re.DOTALL)
        for names, body in re.findall(r"^ +(.*?) \{ (.*?) \}$", block, re.MULTILINE):
            values = dict(re.findall(r"([a-z-]+): (#[0-9a-f]{6}) !important", body))
            for name in names.split(", "):
                rules.setdefault(name.removeprefix("."), {}).update(values)

    def of(element, name):
        for one in element.ancestors:
            for found in (*(rules.get(key, {}).get(name) for key in (*one.classes, one.tag)), one.style.get(name)):
                if found:
                    return found
        raise AssertionError(f"<{element.tag}> has no {name}")

    for element in tree(text).walk():
        hidden = any("mso-hide" in one.style for one in element.ancestors)
        if not hidden and element.tag not in {"style", "title"} and "".join(element.texts).strip(" \n\xa0"):
            yield "".join(element.texts).strip(), of(element, "color"), of(element, "background-color")


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_stands_out_from_what_is_behind_it_in_light_and_dark(dark):
    seen = 0
    for shape in SHAPES:
        made = rendered(shape)
        for words, colour, ground in looks(made.html, dark=dark):
            seen += 1
            assert contrast(colour, ground) >= 4.5, (shape, words, colour, ground)
    assert seen > 100
    for block in re.findall(r":root \{(.*?)\}", made.page):  # light, dark, print
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block))
        for text, ground in (("ink", "card"), ("soft", "card"), ("soft", "ground"), ("link", "card")):
            assert contrast(colours[text], colours[ground]) >= 4.5
        assert contrast(colours["bar"], colours["card"]) >= 3, "what is drawn (WCAG 2.2, 1.4.11)"


def test_a_mail_is_small_whatever_the_rows():
    assert len(rendered("week").html.encode()) < 20_000
    for text in ("語" * 500, "&" * 500, "x"):
        for columns in (1, 8, 40):
            rows = [{f"c{at}": text for at in range(columns)} | {"n": 1}] * 300
            html = rendered("week", rows=rows, columns=list(rows[0])).html
            assert len(html.encode()) < 102_000, "Gmail clips what is longer"


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = """<!DOCTYPE html><meta charset="utf-8"><body>%s<script>
onload = () => {
  const found = [...document.querySelectorAll('iframe')].map((frame) => {
    const page = frame.contentDocument, small = []
    const texts = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT)
    for (let text; (text = texts.nextNode());) {
      const style = frame.contentWindow.getComputedStyle(text.parentElement)
      if (text.data.trim() && text.parentElement.getClientRects().length && parseFloat(style.fontSize) < 14)
        small.push(text.data.trim())
    }
    return [frame.title, page.documentElement.scrollWidth, small]
  })
  document.body.textContent = 'MEASURED' + JSON.stringify(found) + 'END'
}
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is on PATH")
def test_on_a_phone_nothing_must_be_moved_sideways_and_no_text_is_small(tmp_path):
    frames = []
    for shape in SHAPES:
        made = rendered(shape)
        for kind, text in (("mail", made.html), ("page", made.page)):
            frames.append(f'<iframe width="320" title="{shape}, {kind}" srcdoc="{html.escape(text)}"></iframe>')
    page = tmp_path / "phone.html"
    page.write_text(MEASURE % "".join(frames))
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    said = subprocess.run(
        [CHROMIUM, "--headless", *root, "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         "--virtual-time-budget=5000", page.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    measured = json.loads(html.unescape(said.stdout.split("MEASURED")[1].split("END")[0]))
    assert len(measured) == 2 * len(SHAPES)
    assert [(title, width) for title, width, _ in measured if width > 320] == []
    assert [(title, small) for title, _, small in measured if small] == []


LOCALES = """select id::text as key, email, name,
 case id when 1 then 'de' when 2 then 'pt-BR'
         when 3 then 'klingon; drop' when 4 then null when 5 then 'xx' end as locale
 from people order by id"""


async def test_each_recipient_reads_in_their_language_and_an_unknown_one_hinders_nobody(fleet):
    await fleet.hire(5)
    fleet.recipients = LOCALES
    fleet.report = 'locale = "fr"'
    ended = await fleet.run("generate")
    assert ended.code == 0, ended
    assert ended.err.count("names no language") == 1, "it is said once"
    assert re.search("recipient (3: the locale 'klingon; drop'|5: the locale 'xx') names no language", ended.err)
    assert "so the report is in fr" in ended.err
    rows = await fleet.connection.fetch(
        "SELECT r.title, r.html, e.message FROM outbox.report r JOIN outbox.email e ON e.report = r.id"
        " ORDER BY r.recipient_key"
    )
    assert len(rows) == 5
    expected = [
        ("de", "Guten Tag Person 1,"),
        ("pt-BR", "Olá, Person 2!"),
        *(("fr", f"Bonjour Person {n},") for n in (3, 4, 5)),
    ]
    for row, (tag, greeting) in zip(rows, expected, strict=True):
        mail = message_from_bytes(row["message"], policy=policy.default)
        assert greeting in mail.get_body(("plain",)).get_content()
        assert f'<html lang="{tag}"' in mail.get_body(("html",)).get_content()
        assert f'<html lang="{tag}"' in row["html"]
        label = row["title"].removeprefix("Progress, ")
        assert label in mail["Subject"]
        assert label in row["html"]
    ended = await fleet.run("preview", "progress", "--for", "2", "--json")
    assert json.loads(ended.out)["locale"] == "pt-BR"
    fleet.report = 'locale = "klingon"'
    ended = await fleet.run("generate")
    assert (ended.code, ended.out) == (2, "")
    assert ended.sentences == [
        'reports.progress.locale: "klingon" names no language; write one like en, de, fr-CA or pt-BR.'
    ]
