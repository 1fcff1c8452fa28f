"""The generated pages of docs/: each module makes one page from the code that the page describes."""
