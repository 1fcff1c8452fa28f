"""Stage ``media``: what is decided of a request's pictures from their pixels, before any tower runs.

`stage` applies a plan's reducer and gives media of fewer frames, fewer pixels or fewer cells; `entrance` is how a tower
takes media some of whose cells stay out; `relevance` scores pixels against text; `content` tells documents from photos.
"""
