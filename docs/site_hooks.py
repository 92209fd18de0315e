"""What mkdocs needs beside its own: formulas without a script, and docstrings in TRL's grammar read as Google's.

Named in `mkdocs.yml`, as a hook and as griffe's extension. Not part of the package, nor of the site.
"""

import ast
import re
from typing import Any

import griffe
from latex2mathml.converter import convert

HEADER = re.compile(r"^(?P<indent> *)(?P<name>\*{0,2}\w+) \((?P<type>.+)\):[ ]*$", re.MULTILINE)
"""A parameter in TRL's grammar: name (`type`, *optional*, defaults to `value`):, its text on the next lines."""
REFERENCE = re.compile(r"\[`~?(?P<name>[\w.]+)`\]")
"""A name in transformers' brackets, such as [`ReferencePool`] or [`~datasets.Dataset`]."""
RETURNED = re.compile(r"(?<=\n)(?P<indent> +)`(?P<type>[^`\n]+)`: ", re.MULTILINE)
STAR = re.compile(r"(?<=[AV])\*(?!\*)")
"""The star of A*-PO and of V*, which must not begin an emphasis."""
PAGE = re.compile(r"`docs/([\w/-]+\.md)`|\bdocs/([\w/-]+\.md)\b")
"""A page as README, docstrings and messages name it."""
FENCE = re.compile(r"(^ *(?:```|~~~).*?^ *(?:```|~~~) *$)", re.MULTILINE | re.DOTALL)


def formula(source: str, language: str, css_class: str, options: Any, md: Any, **kwargs: Any) -> str:
    """A block ```math as MathML, which browsers draw by themselves."""
    space = '<mspace width="0.17em" />'
    drawn = convert(source, display="block").replace("<mi>ln</mi>", f"{space}<mi>ln</mi>{space}")
    return f'<div class="math-block">{drawn}</div>'


def on_config(config: Any) -> Any:
    """Hand ```math blocks to `formula`; a page shows them as GitHub does."""
    fences = config["mdx_configs"].setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": formula})
    return config


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Make a link of each page that the text names by its path, such as docs/pag.md, under the page's title in the menu."""
    titles = {path: title for title, path in _pages(config["nav"])}
    if page.file.src_uri in ("index.md", "start.md", "results.md"):  # alone under their tabs
        page.meta["hide"] = ["navigation"]

    def link(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in titles:
            return found[0]
        return f"[{titles[name]}]({'../' * page.file.src_uri.count('/')}{name})"

    parts = FENCE.split(markdown)
    return "".join(part if number % 2 else PAGE.sub(link, part) for number, part in enumerate(parts))


def _pages(nav: Any) -> Any:
    for entry in nav:
        for title, below in entry.items():
            if isinstance(below, str):
                yield title, below
            else:
                yield from _pages(below)


class TrlDocstrings(griffe.Extension):
    """Rewrites docstrings from TRL's grammar into Google's, and lists the options of dataclasses with their help."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Walk the package once it is read."""
        self._walk(pkg, set())

    def _walk(self, found: Any, seen: set[str]) -> None:
        if found.is_alias or found.path in seen:
            return
        seen.add(found.path)
        if found.docstring is not None:
            found.docstring.value = google(found.docstring.value)
        if found.is_class:
            options = list(_options(found))
            if options:
                intro = found.docstring.value.rstrip() if found.docstring else ""
                found.docstring = griffe.Docstring(f"{intro}\n\nAttributes:\n{''.join(options)}", parent=found)
        for member in list(found.members.values()):
            self._walk(member, seen)


def google(text: str) -> str:
    """A docstring in Google's grammar: types are those of the signature, so what TRL's repeats of them is dropped."""
    text = HEADER.sub(lambda found: f"{found['indent']}{found['name']}:", text)
    text = REFERENCE.sub(lambda found: f"`{found['name'].rpartition('.')[2]}`", text)
    text = RETURNED.sub(lambda found: f"{found['indent']}{found['type'].replace(' | ', ' or ')}: ", text)
    text = PAGE.sub(lambda found: f"[docs/{found[1] or found[2]}](../{found[1] or found[2]})", text)
    return "`".join(part if number % 2 else STAR.sub(r"\\*", part) for number, part in enumerate(text.split("`")))


def _options(found: griffe.Class) -> Any:
    """The fields of a dataclass of options that have a help text, as lines of an `Attributes:` section."""
    for name, member in found.members.items():
        if member.is_alias or not member.is_attribute or member.value is None:
            continue
        call = ast.parse(str(member.value), mode="eval").body
        if not (isinstance(call, ast.Call) and getattr(call.func, "id", "") == "field"):
            continue
        given = {word.arg: word.value for word in call.keywords}
        metadata = given.get("metadata")
        if not isinstance(metadata, ast.Dict):
            continue
        help_text = next((value for key, value in _pairs(metadata) if key == "help"), None)
        if help_text is None:
            continue
        default = f" Default: `{ast.unparse(given['default'])}`." if _says_something(given.get("default")) else ""
        yield f"    {name}: {' '.join(help_text.replace('%%', '%').split())}{default}\n"


def _pairs(metadata: ast.Dict) -> Any:
    for key, value in zip(metadata.keys, metadata.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
            yield key.value, str(value.value)


def _says_something(default: ast.expr | None) -> bool:
    return default is not None and not (isinstance(default, ast.Constant) and default.value is None)
