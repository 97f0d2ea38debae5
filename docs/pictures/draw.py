"""Draws the pictures of docs/parallel.md: `python docs/pictures/draw.py` writes them beside this file."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
COLOURS = ("#7fb3d5", "#f5b041", "#82c99d", "#d98880")
STYLE = 'font-family="sans-serif" font-size="13"'


class Picture:
    """A drawing as SVG elements."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height
        self.parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, fill: str, dash: bool = False) -> None:
        """A rectangle; dashed for what is borrowed."""
        stroke = ' stroke-dasharray="4 3"' if dash else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="{fill}" stroke="#333"{stroke}/>'
        )

    def text(self, x: float, y: float, words: str, anchor: str = "middle", bold: bool = False) -> None:
        """Words at a point."""
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" {STYLE}{weight}>{words}</text>')

    def arrow(self, x1: float, y1: float, x2: float, y2: float, colour: str = "#333") -> None:
        """A line with a tip."""
        self.parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="1.6" '
            f'marker-end="url(#tip)"/>'
        )

    def save(self, name: str) -> None:
        """Write the file."""
        width, height = self.size
        tip = (
            '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="3" orient="auto">'
            '<path d="M0,0 L7,3 L0,6 z" fill="#333"/></marker></defs>'
        )
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">'
        white = f'<rect width="{width}" height="{height}" fill="white"/>'
        (HERE / name).write_text("\n".join([head, tip, white, *self.parts, "</svg>\n"]), encoding="utf-8")


def parallelism() -> None:
    """Four ranks, two experts, two slices of each: what moves for r = 0, 1, 2."""
    picture = Picture(840, 430)
    rows = (
        ("r = 0: data parallel", "every rank gathers all experts; no token travels", {0, 1, 2, 3}),
        (
            "r = 1: expert parallel",
            "a rank gathers the slices of one expert; a token goes to one of them",
            {0, 1},
        ),
        (
            "r = 2: expert + tensor parallel",
            "nothing is gathered; a token goes to both slices, results add up",
            {0},
        ),
    )
    for line, (title, words, gathered) in enumerate(rows):
        top = 20 + 136 * line
        picture.text(10, top + 12, title, "start", bold=True)
        picture.text(250, top + 12, words, "start")
        for rank in range(4):
            x = 20 + 205 * rank
            picture.box(x, top + 24, 180, 92, "#f7f7f7")
            picture.text(x + 90, top + 40, f"rank {rank}")
            for slot in range(4):
                own = slot == rank
                have = own or (slot // 2 == rank // 2 if gathered == {0, 1} else len(gathered) == 4)
                fill = COLOURS[slot // 2] if have else "white"
                picture.box(x + 10 + 41 * slot, top + 50, 37, 34, fill, dash=not own)
                picture.text(x + 28 + 41 * slot, top + 71, f"{'AB'[slot // 2]}{slot % 2}")
        if gathered == {0, 1, 2, 3}:
            picture.text(110, top + 105, "all tokens of rank 0")
            continue
        picture.text(110, top + 105, "tokens of rank 0")
        targets = (2,) if gathered == {0, 1} else (2, 3)
        for rank in targets:
            height = top + (100 if rank == 2 else 111)
            picture.arrow(165, height, 28 + 205 * rank, height)
            picture.text(110 + 205 * rank, top + 105, "those for B")
    picture.save("parallelism.svg")


def pipelining() -> None:
    """One call with degree 1 and with degree 4 on two resources."""
    picture = Picture(840, 230)

    def bars(top: int, degree: int) -> None:
        unit = 480 / degree
        send, work = unit / 3, unit / 3
        picture.text(10, top + 14, f"degree {degree}", "start", bold=True)
        for words, y in (("network", top + 38), ("experts", top + 68)):
            picture.text(10, y, words, "start")
        arrived = computed = 0.0
        sends, results = [], []
        for chunk in range(degree):
            sends.append((arrived, arrived + send))
            arrived += send
            begin = max(arrived, computed)
            computed = begin + work
            results.append((chunk, begin, computed))
        line = arrived
        for chunk, (begin, end) in enumerate(sends):
            picture.box(90 + begin, top + 24, end - begin, 20, COLOURS[0])
            picture.text(90 + (begin + end) / 2, top + 38, str(chunk))
        for chunk, begin, end in results:
            picture.box(90 + begin, top + 54, end - begin, 20, COLOURS[1])
            picture.text(90 + (begin + end) / 2, top + 68, str(chunk))
            back = max(line, end)
            picture.box(90 + back, top + 24, send, 20, COLOURS[2])
            picture.text(90 + back + send / 2, top + 38, str(chunk))
            line = back + send
        picture.text(100 + line, top + 54, "done", "start")

    bars(10, 1)
    bars(110, 4)
    picture.text(
        90, 216, "blue: rows to their experts    orange: experts    green: results on their way back", "start"
    )
    picture.save("pipelining.svg")


def hierarchical() -> None:
    """Messages of rank 0 in the linear and in the hierarchical exchange, 2 nodes of 4 ranks."""
    picture = Picture(840, 250)
    for half, (title, words) in enumerate(
        (
            ("linear", "7 messages: one to every rank"),
            ("2dh", "3 inside the node, then 1 of four times the size"),
        )
    ):
        left = 10 + 420 * half
        picture.text(left, 18, title, "start", bold=True)
        picture.text(left + 70, 18, words, "start")
        places = {}
        for node in range(2):
            picture.box(left, 34 + 106 * node, 390, 80, "#f7f7f7")
            picture.text(left + 8, 50 + 106 * node, f"node {node}", "start")
            for local in range(4):
                x, y = left + 40 + 88 * local, 62 + 106 * node
                picture.box(x, y, 50, 34, COLOURS[node])
                picture.text(x + 25, y + 21, str(4 * node + local))
                places[node, local] = x + 25, y
        x0, y0 = places[0, 0]
        for local in range(1, 4):
            x, y = places[0, local]
            picture.parts.append(
                f'<path d="M{x0} {y0 + 34} Q{(x0 + x) / 2} {y0 + 58} {x} {y + 36}" fill="none" stroke="#333" '
                f'stroke-width="1.6" marker-end="url(#tip)"/>'
            )
        for local in range(4) if half == 0 else range(1):
            x, y = places[1, local]
            picture.arrow(x0, y0 + 34, x, y - 2, "#b03a2e")
    picture.save("hierarchical.svg")


if __name__ == "__main__":
    parallelism()
    pipelining()
    hierarchical()
