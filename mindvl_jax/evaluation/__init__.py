"""Score out: tasks, scorers, cached predictions, pages to look at."""
