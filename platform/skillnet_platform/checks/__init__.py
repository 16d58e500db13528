"""TODO: package platform/skillnet_platform/checks."""
