"""Model growth: runs that add a skill and a task, and the check that old tasks are unchanged."""
