"""The page that shows what augmentation makes of images: one HTML file without scripts."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass

from bigsimclr.report.pages import page_template


@dataclass(frozen=True)
class Shown:
    """A picture and what is to be read beside it."""

    png: bytes
    words: str

    @property
    def address(self) -> str:
        """Return the picture as an address that needs no file."""
        return f"data:image/png;base64,{b64encode(self.png).decode('ascii')}"


@dataclass(frozen=True)
class PreviewRow:
    """An image with the crops marked in it, and its views."""

    original: Shown
    views: tuple[Shown, ...]


def preview_page(title: str, rows: Sequence[PreviewRow]) -> str:
    """Return the page; every text is escaped.

    Args:
        title: what is shown, such as the recipe.
        rows: all with the same number of views.
    """
    views = len(rows[0].views) if rows else 0
    return page_template("preview.html.j2").render(title=title, rows=rows, views=views)
