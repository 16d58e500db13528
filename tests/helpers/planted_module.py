"""Module that nothing may import by a name in its input: the import ends the test.

It is on the path of every test. :mod:`tests.helpers.module_names` has the names that lead to it.
"""


class ImportedByNameError(BaseException):
    """A value made the program import this module; no handler of exceptions catches this."""


raise ImportedByNameError(f"{__name__} was imported by a name in a configuration or a file")
