"""Check the documents against the tree: links lead to files, make targets exist, Python blocks parse."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)\s]+)\)")
# in backticks anywhere, or alone on a line (with variables or a comment after it)
MAKE = re.compile(
    r"(?:`|^[ \t]*(?:\$ )?(?=make [a-z-]+[ \t]*(?:#|[A-Z_]+=|$)))make ([a-z][a-z-]*)", re.MULTILINE
)
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def faults(document: Path, targets: set[str]) -> list[str]:
    """One line for each dead link, unknown make target and Python block that does not parse."""
    text = document.read_text(encoding="utf-8")
    name = document.relative_to(ROOT)
    found = []
    for link in LINK.findall(text):
        path = link.split("#")[0]
        if path and not re.match(r"[a-z]+:", link) and not (document.parent / path).exists():
            found.append(f"{name}: link to {link}, which does not exist")
    for target in MAKE.findall(text):
        if target not in targets:
            found.append(f"{name}: `make {target}` is no target of the Makefile")
    for block in PYTHON_BLOCK.findall(text):
        try:
            compile(block, str(name), "exec")
        except SyntaxError as error:
            line = (error.text or "").strip()
            found.append(f"{name}: a Python block does not parse: {error.msg} in {line!r}")
    return found


def main() -> int:
    """Print the faults of every document; return the exit status, 1 where there are any."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    found = [line for document in sorted(documents) for line in faults(document, targets)]
    print("\n".join(found) if found else f"{len(documents)} documents agree with the tree")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
