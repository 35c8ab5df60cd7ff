"""Rows held by shards: nearest centroids and nearest neighbors of all of them."""
