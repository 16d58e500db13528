"""Formats that read most data of a user: folders and tables, tars, and saved datasets."""
