"""Random calls of the public functions against an oracle of their own, in float64."""
