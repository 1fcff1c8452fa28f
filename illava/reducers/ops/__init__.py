"""Holds what several reducers share: selection by score, similarity, frame grids, boxes."""
