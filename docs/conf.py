"Sphinx configuration. `docs/build.py` stages the sources beside a copy of this file and runs Sphinx there."
project = "wmpo_nb"
author = "The wmpo_nb authors"
copyright = "the wmpo_nb authors, Apache License 2.0"
extensions = ["myst_nb", "sphinx.ext.mathjax"]
root_doc = "index"
exclude_patterns = []

# the stored outputs of the notebooks are shown; running them is the tests' business
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"        # tables and links in an output as in a Markdown cell
nb_number_source_lines = False
myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "attrs_inline"]
smartquotes = False                       # shapes such as [B, ...] stay as they are
myst_heading_anchors = 4
myst_dmath_double_inline = True
nb_code_prompt_show = "Show {type}"
# a file may start a section at any level; everything else is an error
suppress_warnings = ["myst.header"]

# no request leaves the page: MathJax and its fonts are in _static, the theme brings no web fonts
mathjax_path = "mathjax/tex-mml-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}, "chtml": {"displayAlign": "left", "displayIndent": "1em"}}
html_theme = "furo"
html_title = "wmpo_nb"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/icon.svg"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": False}
templates_path = []
python_maximum_signature_line_length = 88
add_module_names = False
pygments_style, pygments_dark_style = "friendly", "monokai"
