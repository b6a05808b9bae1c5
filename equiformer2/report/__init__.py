"""Self-contained HTML pages: everything that a page shows is inside its file, no network is needed."""

from equiformer2.report.html import bullets, page, picture, table
from equiformer2.report.viewer import structure_viewer, viewer_script

__all__ = ["bullets", "page", "picture", "structure_viewer", "table", "viewer_script"]
