"""Old place of pipelines/results/page.py, for pipelines/demo.py."""

from pipelines.results.page import Figure, Link, Section, clip_figure, curve_figure, series_of  # noqa: F401
from pipelines.results.page import write_page as write_report  # noqa: F401
