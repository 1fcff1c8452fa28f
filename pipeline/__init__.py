"""Media in storage -> text in Parquet. Importing this package loads neither torch, ray nor a decoder."""
