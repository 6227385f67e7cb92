"""Pages from templates: everything put into them is escaped and printable."""

import unicodedata
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup


def page_template(name: str) -> Template:
    """Return one of the templates beside this file; texts put into it are escaped."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    source = files("bigsimclr.report").joinpath(name).read_text(encoding="utf-8")
    return environment.from_string(source)


def _printable(value: object) -> object:
    """Replace control characters: HTML cannot hold some, and others reorder what is read."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value  # Markup: what a macro returns, whose own parts came here before
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c)[0] == "C" and c not in "\n\t" else c
        for c in value
    )
