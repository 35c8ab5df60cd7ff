"""The page people look at: pictures of every cluster, its names, and the run's own facts."""
