"""Reading of files: directories, object stores, tar and zip archives, and media files.

All readers share three rules. Nothing is extracted or written. A failing disk or store raises an
error and is never counted as a bad row. Limits reject files that would exhaust memory or never end.
"""
