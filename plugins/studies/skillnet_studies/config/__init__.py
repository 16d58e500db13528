"""Configuration of a study and of its claims."""
