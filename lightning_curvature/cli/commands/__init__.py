"""What each command of the command line does; the parser is made from signatures and docstrings (``cli/parser.py``)."""
