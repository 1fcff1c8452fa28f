"""What the tests share: media, models, stores and runs of their own."""
