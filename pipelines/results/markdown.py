"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def plain(text: str) -> str:
    """Text that cannot end a cell of a table, begin a tag or end a code span."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;").replace("`", "'")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts that are escaped already."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
