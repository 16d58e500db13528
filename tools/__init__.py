"""Programs for the maintenance of this repository; not part of the package."""
