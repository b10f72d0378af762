"""The configuration of the docs site.

pip install -e '.[docs]'
sphinx-build -W docs build/site        # then open build/site/index.html

`generate.py` writes the pages that come from the code: those of the formats, of the notebooks and of files elsewhere in
the repository. Git ignores them.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ["NUMBA_ENABLE_CUDASIM"] = "1"  # modules of kernels can then be imported without numba-cuda

import generate  # noqa: E402
from docutils import nodes  # noqa: E402
from sphinx.domains.python import PyObject  # noqa: E402

from numba_dequant.version import VERSION  # noqa: E402

project = "numba_dequant"
author = "the contributors of numba_dequant"
copyright = author
version = release = VERSION

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
highlight_language = "text"
default_role = "py:obj"  # docstrings put names of Python in single backquotes

# The text of the docstrings says the types. Overloads would repeat each signature.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
# The pages need neither PyTorch nor a GPU.
autodoc_mock_imports = [name for name in ("torch", "cuda") if find_spec(name) is None]
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"numba_dequant {VERSION}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
LONG_CELL = 24
pygments_style, pygments_dark_style = "default", "monokai"


def mark_long_cells(app, doctree):
    """Cells with a sentence keep a width on a phone, where the table scrolls."""
    for entry in doctree.findall(nodes.entry):
        if len(entry.astext()) > LONG_CELL:
            entry["classes"].append("long")


def setup(app):
    """Write the generated pages, and let links from pages to the rest of the repository stay on the site."""
    generate.write(HERE)
    app.connect("source-read", lambda _, name, source: source.__setitem__(0, generate.on_site(source[0], name)))
    app.connect("autodoc-process-docstring", generate.as_rst, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", generate.own_signature)
    app.connect("doctree-read", mark_long_cells)
    (attributes,) = (field for field in PyObject.doc_field_types if field.name == "variable")
    attributes.label = "Attributes"  # the word of the docstrings; Sphinx says Variables
