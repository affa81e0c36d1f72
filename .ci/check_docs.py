"""Check the documents against the tree: links lead to files, commands exist, Python blocks parse. Exits 1 on faults."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)\s]+)\)")
MAKE = re.compile(r"(?:^|`)make ([a-z][a-z-]*)", re.MULTILINE)
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def faults(document: Path, targets: set[str]) -> list[str]:
    """One line for each dead link, unknown make target and Python block that does not parse."""
    text = document.read_text(encoding="utf-8")
    name = document.relative_to(ROOT)
    found = []
    for link in LINK.findall(text):
        path = link.split("#")[0]
        if (
            path
            and "://" not in link
            and not link.startswith("mailto:")
            and not (document.parent / path).exists()
        ):
            found.append(f"{name}: link to {link}, which does not exist")
    found += [
        f"{name}: `make {t}` is no target of the Makefile" for t in MAKE.findall(text) if t not in targets
    ]
    for block in PYTHON_BLOCK.findall(text):
        try:
            compile(block, str(name), "exec")
        except SyntaxError as error:
            found.append(
                f"{name}: a Python block does not parse: {error.msg} in {(error.text or '').strip()!r}"
            )
    return found


def main() -> int:
    """Print the faults of every document; return the exit status."""
    targets = set(
        re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    found = [line for document in sorted(documents) for line in faults(document, targets)]
    print("\n".join(found) if found else f"{len(documents)} documents agree with the tree")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
