"""Draws docs/overview.svg: the three systems over one engine, and what is under it. Run it when that has changed."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 880, 430
SYSTEM, ENGINE, NIC, WIRE = "#dbeafe", "#1e3a8a", "#e5e7eb", "#64748b"


def box(
    x: int, y: int, w: int, h: int, fill: str, title: str, lines: tuple[str, ...] = (), ink: str = "#111827"
) -> str:
    text = [f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="{fill}"/>']
    middle = x + w // 2
    top = y + (h - 18 * len(lines)) // 2 + 5
    text.append(
        f'<text x="{middle}" y="{top}" fill="{ink}" font-weight="600" text-anchor="middle">{escape(title)}</text>'
    )
    for i, line in enumerate(lines):
        place = f'x="{middle}" y="{top + 19 * (i + 1)}" text-anchor="middle"'
        text.append(f'<text {place} fill="{ink}" font-size="13">{escape(line)}</text>')
    return "\n".join(text)


def arrow(x: int, y: int, to_y: int) -> str:
    return f'<path d="M{x} {y} V{to_y}" stroke="{WIRE}" stroke-width="2" marker-end="url(#end)"/>'


def main() -> None:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="15">',
        f'<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{WIRE}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    systems = [
        (
            "KV-cache transfer",
            ("railwire.kvcache", "prefill writes pages, layer by layer,", "into the decoder's cache"),
        ),
        ("Weight updates", ("railwire.weights", "every trainer rank writes", "into every inference rank")),
        ("Expert parallelism", ("railwire.moe", "tokens go to their experts", "and come back")),
    ]
    for i, (title, lines) in enumerate(systems):
        x = 20 + i * 285
        parts.append(box(x, 20, 270, 100, SYSTEM, title, lines))
        parts.append(arrow(x + 135, 122, 158))
    engine = ("writes with an immediate · counters · fences", "one API, several NICs per GPU, any order of delivery")
    parts.append(box(20, 162, 840, 84, ENGINE, "TransferEngine", engine, "white"))
    nics = [
        ("ConnectX", ("libibverbs",)),
        ("AWS EFA", ("libfabric",)),
        ("tcp", ("sockets",)),
        ("shm", ("rings, CMA,", "mapped memory")),
        ("NVLink, one GPU", ("CUDA IPC,", "copy kernels")),
    ]
    for i, (title, lines) in enumerate(nics):
        x = 20 + i * 170
        parts.append(arrow(x + 80, 248, 284))
        parts.append(box(x, 288, 160, 84, NIC, title, lines))
    parts.append(f'<text x="20" y="404" fill="{WIRE}" font-size="13">between machines: the first three</text>')
    parts.append(
        f'<text x="530" y="404" fill="{WIRE}" font-size="13">between processes of one machine: the last two</text>'
    )
    parts.append("</svg>\n")
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "docs" / "overview.svg")
    out.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
