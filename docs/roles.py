"""Docstrings name other objects by Sphinx's roles, such as :meth:`step`; the site shows the name alone."""

import re


def on_page_content(html: str, **_: object) -> str:
    return re.sub(r":(?:meth|class|func|attr|mod|data):(?:<code>|`)~?([^<`]+)(?:</code>|`)", r"<code>\1</code>", html)
