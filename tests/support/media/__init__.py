"""Makes videos, pictures and documents, sound and damaged ones."""
