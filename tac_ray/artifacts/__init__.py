"""How data moves: storage, manifests, schemas, and the one rule of when a stage runs."""
