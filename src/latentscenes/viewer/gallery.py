"""Thumbnails that can be clicked, and the gallery of a library made of them: searched, a page at a time.

Notable: the browser's HTML element may hold pictures but calls nobody back. So every thumbnail is the `<label>` of an
ordinary button, which HTML presses when its label is clicked. The buttons lie in a folder below, by name, for those who
rather use the keyboard.
"""

import base64
import fnmatch
import html
from collections.abc import Callable, Sequence
from functools import partial

from viser import GuiApi, GuiButtonHandle

from latentscenes.api import Library
from latentscenes.core.errors import UserError
from latentscenes.viewer.callbacks import Callbacks

PAGE = 24
"""Scenes on a page."""
STYLE = """<style>
.scenes { display: grid; gap: 6px; padding: 2px 10px 8px; }
.scenes label { cursor: pointer; border-radius: 6px; padding: 3px; text-align: center; min-width: 0; }
.scenes label:hover { background: rgba(34, 139, 230, 0.12); }
.scenes img { width: 100%; aspect-ratio: 1; object-fit: contain; display: block; border-radius: 4px; background: white; }
.scenes div { font-size: 11px; line-height: 1.25; opacity: 0.75; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
</style>"""


class Thumbnails:
    """Up to `count` scenes in rows of `across`; `pick` is called with the name of the one that is clicked."""

    def __init__(self, gui: GuiApi, callbacks: Callbacks, library: Library, count: int, across: int, pick: Callable[[str], None]):
        self._library, self._across, self._pick = library, across, pick
        self._names: list[str] = []
        self._grid = gui.add_html("")
        self._mark = gui.add_html("")
        with gui.add_folder("By name", expand_by_default=False) as self._folder:
            self._buttons = [gui.add_button("", visible=False, color="gray") for _ in range(count)]
        for place, button in enumerate(self._buttons):
            button.on_click(callbacks(partial(self._clicked, place)))

    def _clicked(self, place: int) -> None:
        if place < len(self._names):
            self._pick(self._names[place])

    def show(self, names: Sequence[str], captions: Sequence[str] = ()) -> None:
        """These scenes, at most as many as there is room for, with a second line of text each."""
        self._names = list(names)
        tiles = []
        for place, button in enumerate(self._buttons):
            button.visible = place < len(names)
            if place < len(names):
                button.label = names[place]
                tiles.append(self._tile(button, names[place], captions[place] if captions else ""))
        self._folder.visible = bool(names)
        self._grid.content = f'{STYLE}<div class="scenes" style="grid-template-columns: repeat({self._across}, minmax(0, 1fr))">{"".join(tiles)}</div>'

    def _tile(self, button: GuiButtonHandle, name: str, caption: str) -> str:
        try:
            picture = f"data:image/png;base64,{base64.b64encode(self._library.thumbnail(name)).decode()}"
        except UserError:  # removed since its name was read
            picture = "data:,"
        text, second = html.escape(name), f"<div>{html.escape(caption)}</div>" if caption else ""
        return f'<label for="{element_id(button)}" title="{text}"><img alt="" src="{picture}"><div>{text}</div>{second}</label>'

    def mark(self, name: str) -> None:
        """Put a frame around a scene, if it is here."""
        found = element_id(self._buttons[self._names.index(name)]) if name in self._names else None
        frame = "outline: 2px solid #228be6; background: rgba(34, 139, 230, 0.12);"
        self._mark.content = f'<style>label[for="{found}"] {{ {frame} }}</style>' if found else ""


def element_id(handle: GuiButtonHandle) -> str:
    """The id of a button's element in the page. viser has no public name for it; test_viewer.py clicks one."""
    return handle._impl.uuid


class Gallery:
    """All scenes of a library whose names match, a page at a time. Only the thumbnails of that page are read."""

    def __init__(self, gui: GuiApi, callbacks: Callbacks, library: Library, pick: Callable[[str], None]):
        self._library, self._page, self._marked = library, 0, ""
        self._search = gui.add_text("Search", "", hint="Part of a name, or a pattern with * and ?")
        self._turn = gui.add_button_group("Page", ("previous", "next"))
        self._count = gui.add_html("")
        self._thumbnails = Thumbnails(gui, callbacks, library, PAGE, 3, pick)
        self._search.on_update(callbacks(lambda: self._go(0)))
        self._turn.on_click(callbacks(lambda: self._go(self._page + (1 if self._turn.value == "next" else -1))))
        self._go(0)

    def _go(self, page: int) -> None:
        names = matching(self._library.names, self._search.value)
        pages = max(1, -(-len(names) // PAGE))
        self._page = page % pages
        first = self._page * PAGE
        shown = names[first : first + PAGE]
        text = f"{first + 1:,}–{first + len(shown):,} of {len(names):,}" if shown else "No name is like that."
        self._count.content = f'<div style="padding: 0 14px 6px; font-size: 12px; opacity: 0.75">{text}</div>'
        self._turn.visible = pages > 1
        self._thumbnails.show(shown)
        self._thumbnails.mark(self._marked)

    def mark(self, name: str) -> None:
        """Put a frame around a scene where it is shown."""
        self._marked = name
        self._thumbnails.mark(name)


def matching(names: Sequence[str], wanted: str) -> list[str]:
    """Names that hold `wanted`, or match it if it has * or ?, whatever the case of letters."""
    wanted = wanted.strip().casefold()
    if any(letter in wanted for letter in "*?"):
        return [name for name in names if fnmatch.fnmatchcase(name.casefold(), wanted)]
    return [name for name in names if wanted in name.casefold()]
