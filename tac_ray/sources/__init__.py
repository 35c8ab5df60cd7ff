"""Where images come from: listing folders, buckets, shards and tables, and reading from them."""
