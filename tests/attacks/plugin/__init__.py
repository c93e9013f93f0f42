"""The folder of the hostile plugin; a package only so that the tests see its catalogue."""
