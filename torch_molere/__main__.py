"""``python -m torch_molere report RUN -o report.html``: the page of what a run found out about its rows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for wrong arguments (the message on stderr)."""
    parser = argparse.ArgumentParser("python -m torch_molere", description="What a run found out about its rows.")
    report = parser.add_subparsers(required=True, metavar="report").add_parser("report", help="write a page of a run")
    report.add_argument("run", metavar="RUN", help="the folder of a torch_molere.report.Recorder")
    report.add_argument("-o", "--output", default="report.html", metavar="FILE", help="the page (report.html)")
    report.add_argument("--images", metavar="DATASET", help="thumbnails: ImageFolder, .npy or .parquet, by row")
    report.add_argument("--texts", metavar="FILE:COLUMN", help="texts: a column of a CSV or Parquet file, by row")
    report.add_argument("--classes", metavar="A,B,…", help="names of the classes, in order")
    report.add_argument("--baseline", metavar="RUN", help="a run of plain training on the same rows")
    report.add_argument("--title", default="", help="of the page")
    given = parser.parse_args(arguments)
    try:
        from torch_molere.report.page import write
        from torch_molere.report.pictures import Pictures, texts_of
        from torch_molere.report.recorder import Run

        pictures = Pictures(given.images) if given.images else None
        classes = given.classes.split(",") if given.classes else pictures.classes if pictures else []
        path = write(
            Run(given.run),
            given.output,
            picture=pictures,
            text=texts_of(given.texts) if given.texts else None,
            classes=classes,
            baseline=Run(given.baseline) if given.baseline else None,
            title=given.title,
        )
    except (ImportError, OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
