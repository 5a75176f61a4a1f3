"""Tests of the page about browsers: its code is that of the example."""

from __future__ import annotations

from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs/how-to/browser-client.md"
EXAMPLE = ROOT / "examples/browser_client"


def test_code_of_the_browser_page_is_that_of_the_example() -> None:
    """The code that a reader copies is the code that the browser runs in the tests."""
    page, _, script = (block.code for block in blocks("js") if block.page == PAGE)  # the other one fetches a ticket
    (elements,) = (block.code for block in blocks("html") if block.page == PAGE)
    server = [block.code for block in blocks("python") if block.page == PAGE]
    assert script == (EXAMPLE / "reconnecting_socket.js").read_text()
    assert page in (EXAMPLE / "page.html").read_text()
    assert elements in (EXAMPLE / "page.html").read_text()
    app = (EXAMPLE / "app.py").read_text()
    assert server
    assert [code for code in server if code not in app] == []
