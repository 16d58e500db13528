"""All code that uses private modules and names of Ray.

Ray changes its private names between minor versions, so ``pyproject.toml`` bounds ``ray`` to the
tested minor version, and a test keeps private names out of all other modules. The rest of the
project uses the plain classes and functions of these modules:

- :mod:`~skillnet_platform.ray_internals.errors`: exceptions that end an elastic worker group.
- :mod:`~skillnet_platform.ray_internals.failure_policy`: what Ray Train does when workers fail, and
  a function that runs first in a worker.
- :mod:`~skillnet_platform.ray_internals.elastic`: how many workers an elastic run gets, and where.
- :mod:`~skillnet_platform.ray_internals.stop_signal`: a stop signal for all processes of a cluster.
- :mod:`~skillnet_platform.ray_internals.single_node`: start and end of a Ray on loopback, and
  workers that keep their interpreter.
- :mod:`~skillnet_platform.ray_internals.job_server`: client and URL of a cluster's job server.

All modules but ``errors`` and ``single_node`` import Ray: import those inside functions.
"""
