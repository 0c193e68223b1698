"""How the site is built: ``sphinx-build -W -n docs build/site``, without a network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _sphinx.inventories import local_inventories

from lightning_curvature import __version__

project = "lightning_curvature"
author = "the lightning_curvature authors"
copyright = "2026, the lightning_curvature authors"
release = version = __version__
html_title = f"lightning_curvature {release}"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "myst_nb",
    "sphinx_copybutton",
    "_sphinx.mathml",
    "_sphinx.references",
]
exclude_patterns = ["_sphinx"]
nitpicky = True

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_use_ivar = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
intersphinx_mapping = local_inventories()

html_theme = "furo"
html_static_path = ["_static"]
html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}
pygments_style = "friendly"
smartquotes = False  # two hyphens are an option
