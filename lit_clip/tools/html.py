"""Pages that need no other file and no network."""

from html import escape

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def page(title: str, style: str, body: str) -> str:
    """A whole page.

    Args:
        title: as text; it is escaped.
        style: CSS.
        body: HTML, in which what comes from the data has been escaped.
    """
    return _PAGE.format(title=escape(title), style=style, body=body)
