"""Programs that draw figures and write tables and pages of the documentation."""
