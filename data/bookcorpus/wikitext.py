"""Prose out of a Wikipedia dump: the articles of its XML with the wiki markup taken off.

Not a parser of MediaWiki: templates, tables, lists, headings and formulas are left out.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator

SHORTEST = 500  # characters of prose; a shorter article is a stub or a list

_PAGE = re.compile(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.DOTALL)
_NAMESPACE = re.compile(r"(talk|user|wikipedia|image|file|mediawiki|template|help|category|portal)( talk)?:", re.I)
_GONE = re.compile(
    r"<!--.*?-->|<(ref|math|gallery|table|pre|code|nowiki|div|timeline)\b[^>]*?(/>|>.*?</\1\s*>)", re.S | re.I
)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.S)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_URL_WITH_LABEL = re.compile(r"\[(?:https?|ftp|news|mailto):[^\s\]]*\s*([^\]]*)\]")
_URL = re.compile(r"(?:https?|ftp)://\S+")
_QUOTES = re.compile(r"'{2,}")
_NO_PROSE = ("*", "#", ":", ";", "=", "|", "!", "{", "}", "<", "[")
_SENTENCE_END = re.compile(r"""[.!?:;,)"'…]$""")


def articles(chunks: Iterable[bytes]) -> Iterator[str]:
    """Prose of every article in a stream of a dump's bytes, paragraphs set apart by an empty line.

    Redirects, pages outside the articles' namespace and articles of less than `SHORTEST` characters are left out; so is
    a page that the stream cuts off.
    """
    rest = b""
    for chunk in chunks:
        *pages, rest = (rest + chunk).split(b"</page>")
        for page in pages:
            found = _PAGE.search(page.decode("utf-8", errors="replace"))
            if found is None or _NAMESPACE.match(found[1]) or found[2].lstrip().lower().startswith("#redirect"):
                continue
            prose = strip_markup(found[2])
            if len(prose) >= SHORTEST:
                yield prose


def strip_markup(text: str) -> str:
    """The running text of one article's source, as it stands in the XML (entities still escaped)."""
    text = html.unescape(html.unescape(text))  # the XML's own escapes, then those written in the article
    text = _GONE.sub(" ", text)
    text = _until_same(_TEMPLATE, "", text)
    text = _until_same(_TABLE, "", text)
    text = _until_same(_LINK, _label, text)
    text = _URL_WITH_LABEL.sub(r"\1", text)
    text = _TAG.sub(" ", _URL.sub("", text))
    text = _QUOTES.sub("", text)
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n\n".join(line for line in lines if _is_prose(line))


def _until_same(pattern: re.Pattern, replacement, text: str, most: int = 8) -> str:
    """Replace from the inside out: the outer one of nested markup matches only once the inner one is gone."""
    for _ in range(most):
        text, count = pattern.subn(replacement, text)
        if not count:
            break
    return text


def _label(link: re.Match) -> str:
    """What a reader sees of `[[target|label]]`; nothing of images, categories and other languages."""
    target, _, label = link[1].partition("|")
    return "" if ":" in target else (label.rpartition("|")[2] or target)


def _is_prose(line: str) -> bool:
    return (
        len(line) >= 40
        and not line.startswith(_NO_PROSE)
        and not any(mark in line for mark in ("{{", "}}", "{|", "|}", "[[", "]]", "||"))
        and _SENTENCE_END.search(line) is not None
    )
