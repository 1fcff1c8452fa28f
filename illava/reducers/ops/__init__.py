"""What several reducers share: choosing by score, similarity, frames cell by cell, boxes."""
