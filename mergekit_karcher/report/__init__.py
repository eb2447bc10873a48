"""The geometry of a merge, before it or with it: measured, judged, written and drawn."""
