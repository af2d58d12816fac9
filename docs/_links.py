"""Hook of MkDocs: the site holds docs/ alone. Links to other files of the repository become their paths, and a line
`--8<-- "PATH"` becomes that file's text."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
INCLUDE = re.compile(r'^--8<-- "([^"]+)"$', re.MULTILINE)
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    text = INCLUDE.sub(lambda found: (ROOT / found[1]).read_text(encoding="utf-8").partition("\n")[2], markdown)
    return OUTSIDE.sub(lambda link: f"{link[1]} (`{link[2]}`)" if link[1] != link[2] else f"`{link[2]}`", text)
