"""The inference engine: when things are computed. See README.md; import what you need from the modules."""
