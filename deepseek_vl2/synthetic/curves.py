"""Draw the curves of a training log as SVG.

Example:
    python -m deepseek_vl2.synthetic.curves runs/nano/training_log.jsonl --output curves.svg
"""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

# Name in the log, title, logarithmic scale
CURVES = (("loss", "loss", True), ("learning_rate", "learning rate", False), ("load_max", "busiest expert", False))
WIDTH, HEIGHT, LEFT, GAP = 720, 180, 70, 46


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the records of a log that have a loss.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no JSON object, or no line has a loss.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}.") from error
        if isinstance(record, dict) and "loss" in record:
            records.append(record)
    if not records:
        raise ValueError(f"{path} holds no record with a loss.")
    return records


def _panel(steps: Sequence[float], values: Sequence[float], title: str, logarithmic: bool, top: float) -> list[str]:
    scaled = [math.log10(max(value, 1e-12)) for value in values] if logarithmic else list(values)
    low, high = min(scaled), max(scaled)
    span, last = (high - low) or 1.0, max(steps) or 1.0
    points = " ".join(
        f"{LEFT + (WIDTH - LEFT) * step / last:.1f},{top + HEIGHT * (1 - (value - low) / span):.1f}"
        for step, value in zip(steps, scaled, strict=True)
    )
    text = [f'<text x="{LEFT}" y="{top - 8}">{title}</text>']
    text += [
        f'<text x="0" y="{top + 10}">{max(values):.3g}</text>',
        f'<text x="0" y="{top + HEIGHT}">{min(values):.3g}</text>',
    ]
    frame = f'<rect x="{LEFT}" y="{top}" width="{WIDTH - LEFT}" height="{HEIGHT}" fill="none" stroke="#bbb"/>'
    return [frame, f'<polyline points="{points}" fill="none" stroke="#2060c0" stroke-width="1.5"/>', *text]


def draw_curves(records: Sequence[dict[str, float]]) -> str:
    """Return the curves of a log's records over its steps as an SVG document; the loss on a logarithmic scale."""
    parts, top = [], 30.0
    for name, title, logarithmic in CURVES:
        kept = [record for record in records if name in record]
        if kept:
            steps, values = [record["step"] for record in kept], [record[name] for record in kept]
            parts += _panel(steps, values, title, logarithmic, top)
            top += HEIGHT + GAP
    parts.append(f'<text x="{LEFT}" y="{top - 22}">steps, 0 to {max(record["step"] for record in records):.0f}</text>')
    size = f'width="{WIDTH + 10}" height="{top:.0f}"'
    style = 'font-family="sans-serif" font-size="13" fill="#333"'
    parts.insert(0, f'<rect {size} fill="#fff"/>')  # dark pages would show dark words on dark ground
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit code is 1 for a user's mistake."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="a training_log.jsonl")
    parser.add_argument("--output", type=Path, default=Path("curves.svg"), help="default: curves.svg")
    args = parser.parse_args(argv)
    try:
        args.output.write_text(draw_curves(read_log(args.log)), encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
