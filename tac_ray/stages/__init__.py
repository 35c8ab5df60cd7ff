"""One file a stage: a function from artifacts to an artifact."""
