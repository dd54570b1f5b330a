"""The plug-in for ms-swift, alone in its folder: ms-swift puts that folder before all others in `sys.path`."""
