"""Output for users: the report, the plot of the ranks, and ``doctor``."""
