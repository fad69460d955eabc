"""Loading of backbones from a package, a folder or the hub, and their identity."""
