"""Draw the pictures of "How it works": the front of a real search, and where the adapters of its knee sit.

python -m docs.pictures autopeft_runs/SEARCH    # after `make demo`
"""

from __future__ import annotations

import argparse
from pathlib import Path

from autopeft.optimization.study_store import load_study
from autopeft.reporting.configuration_image import configuration_svg
from autopeft.reporting.front import ParetoFront
from autopeft.reporting.front_plots import static_front_figure

PICTURES = Path(__file__).parent / "images"


def main() -> None:
    """Read the study, and write both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("search", type=Path, help="Folder of a search.")
    parser.add_argument("--to", type=Path, default=PICTURES)
    arguments = parser.parse_args()
    front = ParetoFront.stored(*load_study(arguments.search))
    arguments.to.mkdir(exist_ok=True)
    static_front_figure(front.records, front.members, front.objectives).savefig(arguments.to / "front.png")
    knee = front.knee()
    (arguments.to / "placement.svg").write_text(configuration_svg(knee.configuration), encoding="utf-8")
    print(f"{len(front)} points, knee: {knee!r}")


if __name__ == "__main__":
    main()
